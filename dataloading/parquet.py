"""Images in parquet files in the layout of the Hugging Face hub.

    root/<split>-00000-of-00002.parquet, root/data/<split>-….parquet, root/<split>/….parquet, or one file as the root

A column `image` or `img` holds the encoded images (a struct with `bytes`, or the bytes themselves); a column of labels
(`parquet_labels.LABEL_COLUMNS`) is optional. A row's name is its file and its number in it; rows are in file order.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataloading import notes
from dataloading.headers import Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, image_checksum, list_digest, require_same
from dataloading.labels import Labels, first_labelled, no_labels
from dataloading.layout import Part
from dataloading.listing import existing_root, list_files
from dataloading.parquet_labels import TooLong, class_names, column_labels, is_label_kind, label_column, read_labels
from dataloading.parquet_reader import ParquetReader, RowsOf
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import raise_if_of_memory
from dataloading.row_choice import FIRST_ROWS_RULE, choice_notes, chosen_rows
from dataloading.scanned import holds, scan_dataset
from dataloading.split_files import FilesChoice, choose_files

IMAGE_COLUMNS = ("image", "img")
_CHUNK = 64


@dataclass(frozen=True)
class _Files:
    """The parquet files of a split, and the columns in them."""

    where: str
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    starts: tuple[int, ...]
    """Row at which each file starts, and the number of rows at the end."""
    image: str
    """Path of the leaf column with the encoded images."""
    label: str | None
    label_kinds: tuple[tuple[pa.DataType, str], ...]
    """Types of the column of labels, with the name of a file of each."""
    class_names: tuple[str, ...]
    unused: tuple[str, ...]
    """The other columns."""

    @property
    def num_rows(self) -> int:
        return self.starts[-1]


def open_parquet(
    root: str | None,
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
    spread: bool = True,
) -> Dataset:
    """Return the images of parquet files. Arguments and errors as `dataloading.sources.open_dataset`.

    spread: whether `max_rows` takes rows of the whole list, where the layout rule does.
    """
    files, rows_R, listed, reader = _list(root, part, max_rows, spread)
    require_same(files.where, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index.with_notes(listed.notes), None, _of_rows(reader, files, rows_R))
    dataset = _scan(files, rows_R, listed, reader, on_progress, rules)
    require_same(files.where, index, dataset.index)
    return dataset


def list_parquet(
    root: str | None, part: Part, *, max_rows: int | None = None, spread: bool = True
) -> tuple[DatasetIndex, ParquetReader | RowsOf]:
    """Return the images of parquet files as far as footers and labels tell; the digest needs the images' bytes."""
    files, rows_R, listed, reader = _list(root, part, max_rows, spread)
    return listed, _of_rows(reader, files, rows_R)


def _of_rows(reader: ParquetReader, files: _Files, rows_R: NDArray[np.int64]) -> ParquetReader | RowsOf:
    return reader if len(rows_R) == files.num_rows else reader.subset(rows_R)


def _list(
    root: str | None, part: Part, max_rows: int | None, spread: bool
) -> tuple[_Files, NDArray[np.int64], DatasetIndex, ParquetReader]:
    path, left_out = existing_root(root, "parquet", Path.exists), Counter[str]()
    found = [path.name]
    if path.is_dir():
        found = [name for name, _ in list_files(path, path, {".parquet"}, left_out=left_out)]

    spread = spread and part.rule != FIRST_ROWS_RULE

    def list_one(choice: FilesChoice) -> tuple[DatasetIndex, tuple[_Files, NDArray[np.int64]]]:
        files = _open_files(path, choice.names)
        rows_R = chosen_rows(files.num_rows, max_rows, spread=spread)
        listed = _listing(f"parquet {path} ({part.split})", files, rows_R)
        columns = notes.unused(files.unused, "columns" if len(files.unused) > 1 else "column")
        chosen = choice_notes(files.num_rows, len(rows_R), spread=spread)
        told = (*choice.notes, *chosen, *columns, *notes.left_out(left_out))
        return replace(listed, notes=(*told, *listed.notes)), (files, rows_R)

    listed, (files, rows_R) = first_labelled(choose_files(found, part, where=str(path), what="parquet files"), list_one)
    return files, rows_R, listed, ParquetReader(files.paths, files.starts, files.image)


def _open_files(root: Path, names: tuple[str, ...]) -> _Files:
    paths = tuple(root if root.is_file() else root / name for name in names)
    starts, schemas = [0], []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                starts.append(starts[-1] + _num_rows(path, file.metadata))
                schemas.append(file.schema_arrow)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise_if_of_memory(error, str(path))
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _not_whole(path, error) from error
    image, label = _image_column(paths[0], schemas[0]), label_column(schemas[0])
    for path, schema in zip(paths, schemas, strict=True):
        if (_image_column(path, schema), label_column(schema)) != (image, label):
            raise DatasetError(
                f"{path}: found columns {_columns(schema)}; expected those of {paths[0]}: {_columns(schemas[0])}. Keep "
                "other data sets in other folders"
            )
    if starts[-1] == 0:
        raise DatasetError(
            f"no images in {root}: found {len(paths)} parquet files of no rows; expected at least one row"
        )
    used = {image.partition(".")[0], label}
    unused = tuple(name for name in schemas[0].names if name not in used)
    by_kind = (
        {} if label is None else {schema.field(label).type: name for schema, name in zip(schemas, names, strict=True)}
    )
    kinds = tuple(by_kind.items())
    return _Files(str(root), paths, names, tuple(starts), image, label, kinds, class_names(schemas[0], label), unused)


def _num_rows(path: Path, about: pq.FileMetaData) -> int:
    """Return the rows of a file. Raises ValueError where its footer contradicts itself, or claims the impossible."""
    groups = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != about.num_rows:
        raise ValueError(f"{about.num_rows:,} rows, but row groups of {groups[:8]}")
    if about.num_rows > (num_bytes := path.stat().st_size):
        raise ValueError(f"{about.num_rows:,} rows in {num_bytes:,} bytes")
    return about.num_rows


def _not_whole(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not a whole parquet file ({error}); fetch or write it again")


def _image_column(path: Path, schema: pa.Schema) -> str:
    """Return the leaf column of the images."""
    for name in (name for wanted in IMAGE_COLUMNS for name in schema.names if name.lower() == wanted):
        if len(schema.get_all_field_indices(name)) == 1:
            kind = schema.field(name).type
            if _is_bytes(kind):
                return name
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
                return f"{name}.bytes"
    raise DatasetError(
        f"{path}: found columns {_columns(schema)}; expected a column {' or '.join(IMAGE_COLUMNS)} with the "
        "encoded images (bytes, or a struct with `bytes`). Rename the column, or write the images as a folder"
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _columns(schema: pa.Schema) -> str:
    """Return the columns with their types, for messages."""
    return notes.some([f"{field.name} ({str(field.type)[:60]})" for field in schema])


def _listing(source: str, files: _Files, rows_R: NDArray[np.int64]) -> DatasetIndex:
    """Return the index of some rows as far as footers and labels tell it: without looking at the images."""
    labels, num_rows = _labels(files, rows_R), len(rows_R)
    return DatasetIndex(
        source=source,
        names=Names.of(_row_names(files, rows_R)),
        heights_N=np.zeros(num_rows, dtype=np.int32),
        widths_N=np.zeros(num_rows, dtype=np.int32),
        labels_N=labels.labels_N,
        class_names=labels.class_names,
        bad_N=np.zeros(num_rows, dtype=np.bool_),
        digest="",
        files={name: path.stat().st_size for name, path in zip(files.names, files.paths, strict=True)},
        notes=labels.notes,
    )


def _row_names(files: _Files, rows_R: NDArray[np.int64]) -> Iterator[str]:
    for row in rows_R.tolist():
        file = bisect_right(files.starts, row) - 1
        yield f"{files.names[file]}/{row - files.starts[file]}"


def _labels(files: _Files, rows_R: NDArray[np.int64]) -> Labels:
    if files.label is None:
        return no_labels(f"{files.names[0]} has no column of labels")
    kind, odd = next(((kind, path) for kind, path in files.label_kinds if not is_label_kind(kind)), (None, None))
    if kind is not None:
        return no_labels(f"column {files.label} of {odd} holds {kind}; expected whole numbers or texts")
    try:
        columns = [read_labels(path, files.label) for path in files.paths]
    except TooLong as error:
        return no_labels(str(error))
    kinds = list(dict.fromkeys(column.type for column in columns))
    if len(kinds) > 1 and not all(map(pa.types.is_integer, kinds)):
        return no_labels(f"column {files.label} holds {' in one file, '.join(map(str, kinds))} in another")
    kind = kinds[0] if len(kinds) == 1 else pa.int64()
    column = pa.chunked_array([chunk for column in columns for chunk in column.cast(kind).chunks], kind)
    if len(column) < files.num_rows:
        raise DatasetError(
            f"{files.where}, column {files.label}: found {len(column):,} labels of {files.num_rows:,} rows"
        )
    if len(rows_R) < files.num_rows:
        column = column.take(pa.array(rows_R))

    def place(chosen: int) -> str:
        row = int(rows_R[chosen])
        file = bisect_right(files.starts, row) - 1
        return f"{files.names[file]}, row {row - files.starts[file]}"

    return column_labels(column, files.label, files.class_names, place)


def _scan(
    files: _Files,
    rows_R: NDArray[np.int64],
    listed: DatasetIndex,
    reader: ParquetReader,
    on_progress: Progress | None,
    rules: PixelRules | None,
) -> Dataset:
    content = hashlib.sha256()
    sizes: list[int] = []

    def chunks() -> Iterator[list[bytes | ValueError]]:
        first = 0
        for batch in reader.batches(int(rows_R[-1]) + 1, _CHUNK):
            here = rows_R[slice(*np.searchsorted(rows_R, (first, first + len(batch))))] - first
            images, first = [batch[place] for place in here.tolist()], first + len(batch)
            for image in images:
                encoded = image if isinstance(image, bytes) else b""
                sizes.append(len(encoded))
                content.update(image_checksum(encoded))
            yield images

    dataset = scan_dataset(
        listed,
        _of_rows(reader, files, rows_R),
        chunks(),
        _open_bytes,
        where=files.where,
        on_progress=on_progress,
        rules=rules,
    )
    num_bytes_N = np.array(sizes, dtype=np.int64)
    digest = list_digest(Names.of(listed.names), num_bytes_N, content.digest())
    return replace(dataset, index=replace(dataset.index, digest=digest, num_bytes_N=num_bytes_N))


def _open_bytes(image: bytes | ValueError) -> BinaryIO:
    if isinstance(image, ValueError):
        raise image
    return io.BytesIO(image)
