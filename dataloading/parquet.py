"""Images in parquet files in the layout of the Hugging Face hub.

    root/<split>-00000-of-00002.parquet, root/data/<split>-….parquet, root/<split>/….parquet, or one file as the root

A column `image` or `img` holds the encoded images (a struct with `bytes`, or the bytes themselves); `label`,
`fine_label` or `coarse_label` is optional. A row's name is its file and its number in it; rows are in file order.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataloading.headers import Progress
from dataloading.index import (
    MAX_CLASSES,
    Dataset,
    DatasetError,
    DatasetIndex,
    Names,
    NoSplit,
    image_checksum,
    list_digest,
    require_same,
)
from dataloading.listing import SPLIT_NAMES, contents, existing_root, list_files
from dataloading.parquet_reader import ParquetReader
from dataloading.pixel_rules import PixelRules
from dataloading.scanned import holds, scan_dataset

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "coarse_label")
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
    class_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return self.starts[-1]


def open_parquet(
    root: str | None,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return the images of parquet files. Arguments and errors as `dataloading.sources.open_dataset`."""
    files, listed, reader = _list(root, split, max_rows)
    require_same(files.where, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index, None, reader)
    dataset = _scan(files, listed, reader, on_progress, rules)
    require_same(files.where, index, dataset.index)
    return dataset


def list_parquet(root: str | None, split: str, *, max_rows: int | None = None) -> tuple[DatasetIndex, ParquetReader]:
    """Return the images of parquet files as far as footers and labels tell; the digest needs the images' bytes."""
    return _list(root, split, max_rows)[1:]


def _list(root: str | None, split: str, max_rows: int | None) -> tuple[_Files, DatasetIndex, ParquetReader]:
    path = existing_root(root, "parquet", Path.exists)
    files = _open_files(path, split)
    num_rows = files.num_rows if max_rows is None else min(max_rows, files.num_rows)
    listed = _listing(f"parquet {path} ({split})", files, num_rows)
    return files, listed, ParquetReader(files.paths, files.starts, files.image)


def parquet_files(root: Path, split: str) -> list[str]:
    """Return the parquet files of a split relative to `root`, sorted; [""] where `root` is itself one of it."""
    if root.is_file():
        return [""] if _belongs(root.name, split) or (split == "train" and not _any_split(root.name)) else []
    found = [name for name, _ in list_files(root, root, {".parquet"})]
    for split_name in SPLIT_NAMES[split]:
        if mine := [name for name in found if _is_of(name, split_name)]:
            return mine
    return found if split == "train" and len(found) == 1 and not _any_split(found[0]) else []


def _is_of(name: str, split_name: str) -> bool:
    path = Path(name)
    return path.stem == split_name or path.stem.startswith(f"{split_name}-") or path.parent.name == split_name


def _belongs(name: str, split: str) -> bool:
    return any(_is_of(name, split_name) for split_name in SPLIT_NAMES[split])


def _any_split(name: str) -> bool:
    return any(_belongs(name, split) for split in SPLIT_NAMES)


def _open_files(root: Path, split: str) -> _Files:
    names = parquet_files(root, split)
    if not names:
        found = contents(root) if root.is_dir() else root.name
        expected = " or ".join(f"{name}-*.parquet" for name in SPLIT_NAMES[split])
        raise NoSplit(f"no {split} split in {root}: found {found}; expected files {expected}. Add them")
    paths = tuple(root / name if name else root for name in names)
    starts, schemas = [0], []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                starts.append(starts[-1] + file.metadata.num_rows)
                schemas.append(file.schema_arrow)
        except pa.ArrowException as error:
            raise DatasetError(f"{path} is not a whole parquet file ({error}); fetch or write it again") from error
    image, label = _columns(paths[0], schemas[0])
    for path, schema in zip(paths, schemas, strict=True):
        if _columns(path, schema) != (image, label):
            raise DatasetError(
                f"{path}: found columns {schema.names}, expected those of {paths[0]}: {schemas[0].names}. Keep other "
                "data sets in other folders"
            )
    if starts[-1] == 0:
        raise DatasetError(
            f"no images in {root}: found {len(paths)} parquet files of no rows; expected at least one row"
        )
    class_names = _class_names(schemas[0], label)
    short_names = tuple(name or root.name for name in names)
    return _Files(str(root), paths, short_names, tuple(starts), image, label, class_names)


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str | None]:
    """Return the leaf column of the images and the column of the labels, if any."""
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        label = None
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name, label
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{name}.bytes", label
    raise DatasetError(
        f"{path}: found columns {', '.join(schema.names)}; expected a column {' or '.join(IMAGE_COLUMNS)} with the "
        "encoded images (a struct with `bytes`). Rename the column, or write the images as a folder"
    )


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Return the class names of the Hugging Face metadata, () where there are none."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(str(name) for name in about["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _listing(source: str, files: _Files, num_rows: int) -> DatasetIndex:
    """Return the index as far as footers and labels tell it: without looking at the images."""
    labels_N = _labels(files, num_rows)
    class_names = files.class_names if labels_N is not None else ()
    if labels_N is not None and not class_names:
        class_names = tuple(str(label) for label in range(int(labels_N.max()) + 1))
    return DatasetIndex(
        source=source,
        names=Names.of(_row_names(files, num_rows)),
        heights_N=np.zeros(num_rows, dtype=np.int32),
        widths_N=np.zeros(num_rows, dtype=np.int32),
        labels_N=labels_N,
        class_names=class_names,
        bad_N=np.zeros(num_rows, dtype=np.bool_),
        digest="",
        files={name: path.stat().st_size for name, path in zip(files.names, files.paths, strict=True)},
    )


def _row_names(files: _Files, num_rows: int) -> Iterator[str]:
    for row in range(num_rows):
        file = bisect_right(files.starts, row) - 1
        yield f"{files.names[file]}/{row - files.starts[file]}"


def _labels(files: _Files, num_rows: int) -> NDArray[np.int64] | None:
    """Return the labels of the first `num_rows` rows; None where one of them has none (missing or negative)."""
    if files.label is None:
        return None
    column = pa.chunked_array(
        [chunk for path in files.paths for chunk in pq.ParquetFile(path).read([files.label]).column(0).chunks]
    )[:num_rows]
    if column.null_count:
        return None
    labels_N = column.to_numpy().astype(np.int64)
    if labels_N.min() < 0:
        return None
    limit = len(files.class_names) or MAX_CLASSES
    if labels_N.max() >= limit:
        row = int(labels_N.argmax())
        raise DatasetError(
            f"{files.where}, column {files.label}, row {row}: found label {labels_N[row]}, expected below {limit:,}. "
            "Correct or remove the column"
        )
    return labels_N


def _scan(
    files: _Files,
    listed: DatasetIndex,
    reader: ParquetReader,
    on_progress: Progress | None,
    rules: PixelRules | None,
) -> Dataset:
    content = hashlib.sha256()
    sizes: list[int] = []

    def chunks() -> Iterator[list[bytes | None]]:
        for images in reader.batches(listed.num_rows, _CHUNK):
            for image in images:
                sizes.append(len(image or b""))
                content.update(image_checksum(image or b""))
            yield images

    dataset = scan_dataset(
        listed, reader, chunks(), _open_bytes, where=files.where, on_progress=on_progress, rules=rules
    )
    num_bytes_N = np.array(sizes, dtype=np.int64)
    digest = list_digest(Names.of(listed.names), num_bytes_N, content.digest())
    return replace(dataset, index=replace(dataset.index, digest=digest, num_bytes_N=num_bytes_N))


def _open_bytes(image: bytes | None) -> BinaryIO:
    if image is None:
        raise ValueError("the row holds no bytes (only a path?)")
    return io.BytesIO(image)
