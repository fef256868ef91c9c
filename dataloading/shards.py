"""Packed images: tar shards and one columnar manifest, written by `dataloading.pack`.

    ROOT/<split>/000000.tar …   plain tar files of some 64 MB; any tar program and WebDataset read them
    ROOT/<split>/manifest.arrow the images in row order: where each lies, what it is, and its checksum
    ROOT/<split>/damaged.jsonl  images that were left out or marked, with the reason; only where there are any
    ROOT/<split>/.parts/        plan and reports of a packing that is under way or was interrupted

The manifest is an uncompressed Arrow IPC file of one record batch, so that processes of a machine map it and share its
pages: an index of 100 million images costs a worker no memory of its own.

Shapes: N rows, S shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataloading import notes
from dataloading.index import (
    CHECKSUM_BYTES,
    DatasetError,
    DatasetIndex,
    Names,
    ShardLayout,
    list_digest,
)
from dataloading.manifest_checks import check_places, check_shard, check_values, column_digest
from dataloading.numerals import whole_number
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import raise_if_of_memory
from dataloading.row_choice import FIRST_ROWS_RULE, choice_notes, chosen_rows

MANIFEST, DAMAGED = "manifest.arrow", "damaged.jsonl"
REPORTS = ".parts"
"""Folder of what packing leaves until the manifest is written."""
PLAN = f"{REPORTS}/plan"
"""Its first file: a folder that has it and no manifest was not packed to the end."""
PIECE_BYTES = 8 << 20
"""Shards are read and checked in pieces of this size."""
FORMAT = "instdisc shards 1"
DIGESTS = ("list", "checksums", "pixels")
"""What the digest covers beside the names, as in the index of the source: byte sizes (a folder, objects, tars), the
images' bytes (parquet), or their pixels (images that the source holds decoded)."""
_COLUMNS = {
    "name": pa.large_binary(),
    "length": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "bad": pa.uint8(),
    "shard": pa.int32(),
    "offset": pa.int64(),
    "checksum": pa.binary(CHECKSUM_BYTES),
    "label": pa.int64(),
    "row_of_place": pa.int64(),
}
_OPTIONAL, _BINARY = {"label", "row_of_place"}, {"name", "checksum"}
_ABOUT, _ABOUT_DIGEST = "instdisc", "instdisc sha256"
"""Keys of the schema's metadata: what the manifest says beside its columns, as JSON, and the digest of that."""
_FINGERPRINT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Shard:
    """A tar file."""

    name: str
    num_bytes: int
    num_rows: int
    pieces: tuple[str, ...]
    """Checksum (hex) of each piece of `PIECE_BYTES`."""


@dataclass(frozen=True, eq=False)
class ShardManifest:
    """What the manifest says."""

    index: DatasetIndex
    shards: tuple[Shard, ...]
    shard_N: NDArray[np.int32]
    offset_N: NDArray[np.int64]
    length_N: NDArray[np.int64]
    checksum_N: NDArray[np.void]
    """16 bytes each: `dataloading.index.image_checksum`."""
    row_of_place_N: NDArray[np.integer] | None
    """As in `ShardLayout`."""
    digest_of: str
    """One of `DIGESTS`."""
    fingerprint: str
    """Of everything that the manifest says; names the data set in caches."""
    depending: dict[str, int] = field(default_factory=dict)
    """How many images depend on each of the pixel rules (by the name of its field), so that other rules would give
    other sizes, pixels or damaged images; empty in manifests of versions before the rules."""
    column_digests: dict[str, str] = field(default_factory=dict)
    """sha256 (hex) of each column, `column_digest`; empty in older manifests."""

    @property
    def layout(self) -> ShardLayout:
        """How the rows lie in the shards."""
        num_rows_S = np.array([shard.num_rows for shard in self.shards], dtype=np.int64)
        numbers_S = np.flatnonzero(num_rows_S)
        return ShardLayout(numbers_S, num_rows_S[numbers_S], self.row_of_place_N)

    def checksum_array(self) -> pa.FixedSizeBinaryArray:
        """Return the checksums as the manifest has them."""
        buffers = [None, pa.py_buffer(np.ascontiguousarray(self.checksum_N))]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(CHECKSUM_BYTES), len(self.checksum_N), buffers)

    def chosen(self, max_rows: int | None, rule: int) -> ShardManifest:
        """Return the manifest of some rows alone, the same ones, with the same digest, as of the source.

        rule: of the layout, `dataloading.layout.Part`.
        """
        index, num_rows = self.index, self.index.num_rows
        # CIFAR and the demo, which their sources hold decoded, are in random order.
        spread = rule != FIRST_ROWS_RULE and self.digest_of != "pixels"
        kept = chosen_rows(num_rows, max_rows, spread=spread)
        if len(kept) == num_rows:
            return self
        names = Names(Names.of(index.names).array.take(pa.array(kept)))
        new_N = np.full(num_rows, -1, dtype=np.int64)
        new_N[kept] = np.arange(len(kept))
        assert index.num_bytes_N is not None
        content = b""
        if self.digest_of == "checksums":
            content = hashlib.sha256(self.checksum_N[kept].tobytes()).digest()
        rows_S = np.bincount(self.shard_N[kept], minlength=len(self.shards)).tolist()
        places = self.row_of_place_N
        return ShardManifest(
            index=DatasetIndex(
                source=index.source,
                names=names,
                heights_N=index.heights_N[kept],
                widths_N=index.widths_N[kept],
                labels_N=None if index.labels_N is None else index.labels_N[kept],
                class_names=index.class_names,
                bad_N=index.bad_N[kept],
                digest=list_digest(names, index.num_bytes_N[kept], content),
                reasons={int(new_N[row]): reason for row, reason in index.reasons.items() if new_N[row] >= 0},
                num_bytes_N=index.num_bytes_N[kept],
                rules=index.rules,
                notes=(*index.notes, *choice_notes(num_rows, len(kept), spread=spread)),
            ),
            shards=tuple(Shard(s.name, s.num_bytes, num, s.pieces) for s, num in zip(self.shards, rows_S, strict=True)),
            shard_N=self.shard_N[kept],
            offset_N=self.offset_N[kept],
            length_N=self.length_N[kept],
            checksum_N=self.checksum_N[kept],
            row_of_place_N=None if places is None else new_N[places][new_N[places] >= 0],
            digest_of=self.digest_of,
            fingerprint=self.fingerprint,
            depending=self.depending,
        )

    def under(self, where: str, rules: PixelRules | None) -> ShardManifest:
        """Return the manifest for images that are seen by other rules than its own; None: by its own.

        where: its place, for messages. Raises DatasetError where any image depends on the difference.
        """
        if rules is None or rules == self.index.rules:
            return self
        own, asked = asdict(self.index.rules), asdict(rules)
        for name, value in own.items():
            num_images = self.depending.get(name)
            if asked[name] != value and num_images != 0:
                found = "images" if num_images is None else f"{num_images:,} images"
                option = f"--{name.replace('_', '-')}"
                raise DatasetError(
                    f"{where} was packed by the pixel rule {name} {value!r}, asked for {asked[name]!r}: sizes, pixels "
                    f"or damage of {found} differ. Pack again with {option} {asked[name]}, or ask for data.{name} "
                    f"{value!r} in a new run"
                )
        return replace(self, index=replace(self.index, rules=rules))

    def save(self, path: Path) -> None:
        """Write the manifest to a local file."""
        index = self.index
        columns: dict[str, pa.Array] = {
            "name": Names.of(index.names).array,
            "length": pa.array(self.length_N, pa.int64()),
            "height": pa.array(index.heights_N, pa.int32()),
            "width": pa.array(index.widths_N, pa.int32()),
            "bad": pa.array(index.bad_N.view(np.uint8), pa.uint8()),
            "shard": pa.array(self.shard_N, pa.int32()),
            "offset": pa.array(self.offset_N, pa.int64()),
            "checksum": self.checksum_array(),
        }
        if index.labels_N is not None:
            columns["label"] = pa.array(index.labels_N, pa.int64())
        if self.row_of_place_N is not None:
            columns["row_of_place"] = pa.array(self.row_of_place_N, pa.int64())
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "source": index.source,
            "digest": index.digest,
            "digest_of": self.digest_of,
            "class_names": index.class_names,
            "reasons": {str(row): reason for row, reason in index.reasons.items()},
            "notes": [note.to_plain() for note in index.notes],
            "piece_bytes": PIECE_BYTES,
            "pixels": asdict(index.rules),
            "depending": self.depending,
            "columns": {name: column_digest(column) for name, column in columns.items()},
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps(about)
        metadata = {_ABOUT: text, _ABOUT_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
        batch = pa.record_batch(columns).replace_schema_metadata(metadata)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)


def load_manifest(where: str, buffer: pa.Buffer) -> ShardManifest:
    """Return the manifest in a buffer, whose memory it goes on using. where: its place, for messages.

    Names and checksums, which nobody reads at once, are not compared with their digests: `instdisc verify` does that.
    Raises DatasetError for anything else than a whole manifest.
    """
    try:
        with pa.ipc.open_file(pa.BufferReader(buffer)) as reader:
            if reader.num_record_batches != 1:
                raise ValueError(f"{reader.num_record_batches} record batches")
            batch = reader.get_batch(0)
        batch.validate(full=True)  # places outside of a column would end the process when they are read
        metadata = batch.schema.metadata or {}
        text, digest = metadata.get(_ABOUT.encode(), b"{}"), metadata.get(_ABOUT_DIGEST.encode())
        if digest is not None and hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("what it says of the shards differs from its digest")
        about = json.loads(text)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError("another format")
        return _manifest(about, {name: batch.column(name) for name in batch.schema.names})
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_if_of_memory(error, where)
        raise DatasetError(
            f"{where} is not a whole manifest: found {type(error).__name__}: {error}, expected {FORMAT!r}; pack the "
            "images again"
        ) from error


def _manifest(about: dict[str, Any], columns: dict[str, pa.Array]) -> ShardManifest:
    for name, kind in _COLUMNS.items():
        if name not in columns and name not in _OPTIONAL:
            raise ValueError(f"no column {name}")
        if name in columns and (columns[name].type != kind or columns[name].null_count):
            raise ValueError(f"column {name} of {columns[name].type} with {columns[name].null_count} nulls, not {kind}")
    digests = about.get("columns", {})
    expected = digests.keys() or _COLUMNS.keys()
    if not columns.keys() <= expected or (digests and columns.keys() != expected):
        raise ValueError(f"columns {', '.join(columns)}, not {', '.join(expected)}")
    for name in columns.keys() & _COLUMNS.keys() - _BINARY if digests else ():
        if column_digest(columns[name]) != digests.get(name):
            raise ValueError(f"column {name} differs from its digest")
    if about["piece_bytes"] != PIECE_BYTES or about["digest_of"] not in DIGESTS:
        raise ValueError(f"pieces of {about['piece_bytes']} bytes, digest of {about['digest_of']!r}")
    shards = tuple(Shard(**{**shard, "pieces": tuple(shard["pieces"])}) for shard in about["shards"])
    for shard in shards:
        check_shard(shard, PIECE_BYTES)
    if not _FINGERPRINT.fullmatch(about["fingerprint"]):
        raise ValueError(f"fingerprint {about['fingerprint']!r}")  # it names a folder of the cache
    values = {
        name: columns[name].to_numpy(zero_copy_only=True) for name in _COLUMNS if name in columns.keys() - _BINARY
    }
    checksums = columns["checksum"]
    start = checksums.offset * CHECKSUM_BYTES
    checksum_N = np.frombuffer(checksums.buffers()[1], f"V{CHECKSUM_BYTES}", len(checksums), start)
    heights_N, widths_N = values["height"], values["width"]
    index = DatasetIndex(
        source=about["source"],
        names=Names(columns["name"]),
        heights_N=heights_N,
        widths_N=widths_N,
        labels_N=values.get("label"),
        class_names=tuple(about["class_names"]),
        bad_N=values["bad"].view(np.bool_),
        digest=about["digest"],
        reasons={whole_number(row): reason for row, reason in about["reasons"].items()},
        notes=notes.from_plain(about.get("notes", ())),
        num_bytes_N=values["length"] if about["digest_of"] != "pixels" else heights_N.astype(np.int64) * widths_N * 3,
        rules=PixelRules.stated(about.get("pixels")),
    )
    check_values(index)
    check_places(shards, values)
    return ShardManifest(
        index=index,
        shards=shards,
        shard_N=values["shard"],
        offset_N=values["offset"],
        length_N=values["length"],
        checksum_N=checksum_N,
        row_of_place_N=values.get("row_of_place"),
        digest_of=about["digest_of"],
        fingerprint=about["fingerprint"],
        depending=about.get("depending", {}),
        column_digests=digests,
    )


def fingerprint_of(*parts: bytes) -> str:
    """Return a name (hex) for what the parts say."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
