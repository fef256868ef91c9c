"""Packs images of any source into tar shards with a manifest (`dataloading.shards`).

The images are divided into units of about one shard; each unit is packed by itself (`dataloading.pack_unit`), in any
process, and leaves a report. Whatever is interrupted goes on with the units that have no report yet. Shards hold
the images in a random order, so that the images which training reads near each other are no neighbours in the source;
row numbers and digest remain those of the source.

Shapes: N images of the source, K of them packed, U units.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataloading.index import CHECKSUM_BYTES, DatasetError, DatasetIndex, Names, list_digest
from dataloading.notes import LEFT_OUT, Note
from dataloading.pack_unit import PackTask, UnitReport, labels_of, pack_unit, report_key
from dataloading.philox import Purpose, words
from dataloading.pixel_rules import BEFORE_RULES, PixelRules
from dataloading.shards import DAMAGED, MANIFEST, PLAN, REPORTS, Shard, ShardManifest, fingerprint_of, load_manifest
from dataloading.sources import SourceImages
from dataloading.storage import Objects, ParallelMap

SHARD_MB = (0.001, 4096.0)
_TAR_BYTES = 1536
"""A member's header and padding, on average."""
_PARQUET_GUESS_BYTES = 100_000

OnPacked = Callable[[int, int, int], None]


@dataclass(frozen=True)
class PackReport:
    """What was packed."""

    num_rows: int
    num_shards: int
    num_bytes: int
    digest: str
    damaged: dict[str, str] = field(default_factory=dict)
    """Reason per damaged image, by name."""
    was_packed: bool = False
    """Whether nothing was left to do."""


def pack(
    images: SourceImages,
    target: Objects,
    split: str,
    *,
    parallel: ParallelMap,
    shard_mb: float = 64.0,
    shuffle: bool = True,
    keep_bad: bool = False,
    rules: PixelRules | None = None,
    on_progress: OnPacked | None = None,
) -> PackReport:
    """Pack images (`dataloading.sources.list_images`) below `target`, or go on with what was interrupted.

    shard_mb: size of a shard in 10^6 bytes.
    shuffle: whether shards hold the images in a random order; else in the source's. keep_bad: pack damaged images as
    well, marked as such, so that row numbers and digest are the source's. rules: how their pixels are made, stated in
    the manifest; None: the present ones. on_progress(images done, all images, bytes
    written) counts what earlier calls did.

    Raises DatasetError where `target` holds other packed images, or where no image is good.
    """
    if not SHARD_MB[0] <= shard_mb <= SHARD_MB[1]:
        raise DatasetError(f"size of a shard: found {shard_mb:g} MB, expected {SHARD_MB[0]:g} to {SHARD_MB[1]:g}")
    plan = _Plan(images, target, split, shard_mb, shuffle, keep_bad, rules or PixelRules())
    if (done := plan.packed_already()) is not None:
        return done
    plan.begin()
    reported = plan.reported_units()
    num_done = sum(len(plan.units[unit]) for unit in reported)
    num_bytes = sum(reported.values())
    if on_progress:
        on_progress(num_done, images.index.num_rows, num_bytes)
    tasks = (plan.task(unit) for unit in range(len(plan.units)) if unit not in reported)
    for _, num_images, size in parallel(pack_unit, tasks):
        num_done, num_bytes = num_done + num_images, num_bytes + size
        if on_progress:
            on_progress(num_done, images.index.num_rows, num_bytes)
    return plan.finish()


class _Plan:
    """Which image goes into which unit: a pure function of the source and of what was asked."""

    def __init__(
        self,
        images: SourceImages,
        target: Objects,
        split: str,
        shard_mb: float,
        shuffle: bool,
        keep_bad: bool,
        rules: PixelRules,
    ) -> None:
        self.images, self.target, self.folder = images, target, f"{split}/"
        self.keep_bad, self.rules = keep_bad, rules
        index = images.index
        # What was packed before there were rules keeps its name.
        stated = "" if rules == BEFORE_RULES else json.dumps(asdict(rules))
        self.name = fingerprint_of(
            index.digest.encode() or json.dumps(index.files).encode(),
            f"{index.num_rows} {shard_mb} {shuffle} {keep_bad} {images.digest_of}{stated}".encode(),
            b"" if index.labels_N is None else index.labels_N.astype("<i8").tobytes(),
        )
        self.row_of_place_N = np.arange(index.num_rows)
        if shuffle:
            keys = words(0, 0, purpose=Purpose.PLACEMENT, num=index.num_rows)
            self.row_of_place_N = np.argsort(keys, kind="stable")
        self.units = self._divide(shard_mb)

    def task(self, unit: int) -> PackTask:
        index, rows = self.images.index, self.units[unit]
        return PackTask(
            number=unit,
            plan=self.name,
            names=tuple(index.names[int(row)] for row in rows),
            labels=labels_of(index.labels_N, rows.tolist()),
            read=self.images.read.subset(rows),
            target=self.target,
            folder=self.folder,
            keep_bad=self.keep_bad,
            rules=self.rules,
        )

    def packed_already(self) -> PackReport | None:
        """Return what is packed if it is this plan. Raises DatasetError if it is another."""
        key = f"{self.folder}{MANIFEST}"
        try:
            data = self.target.get(key)
        except FileNotFoundError:
            return None
        manifest = load_manifest(f"{self.target.uri}/{key}", pa.py_buffer(data))
        if not manifest.fingerprint.startswith(self.name[:16]):
            raise DatasetError(
                f"{self.target.uri}/{key} is already there, packed from {manifest.index.source} "
                f"({manifest.index.num_rows:,} images) by {manifest.index.rules}, or with other options; choose "
                "another place, or remove that folder"
            )
        return _report_of(manifest, self._read_damaged(), was_packed=True)

    def begin(self) -> None:
        """Mark the folder as one that is being packed. Raises DatasetError where it holds tars of somebody else."""
        found = [key.removeprefix(self.folder) for key, _ in self.target.list_sizes(self.folder)]
        tars = [name for name in found if name.endswith(".tar")]
        if tars and not any(name.startswith(f"{REPORTS}/") for name in found):
            raise DatasetError(
                f"{self.target.uri}/{self.folder}: found {len(tars)} tars ({', '.join(tars[:3])}…) without a manifest, "
                "expected an empty folder, since shards would replace them; remove them, or choose another place"
            )
        self.target.put(f"{self.folder}{PLAN}", self.name.encode())

    def reported_units(self) -> dict[int, int]:
        """Return the units of this plan that are done, with the bytes of their shards."""
        sizes = dict(self.target.list_sizes(self.folder))
        done = {}
        for unit in range(len(self.units)):
            report = self._read_report(unit) if report_key(self.folder, unit) in sizes else None
            if report is not None and sizes.get(f"{self.folder}{report.shard.name}") == report.shard.num_bytes:
                done[unit] = report.shard.num_bytes
        return done

    def finish(self) -> PackReport:
        """Write the manifest from the reports, and remove those."""
        packed = _Packed(self.images.index, self.rules)
        for unit, rows in enumerate(self.units):
            report = self._read_report(unit)
            if report is None or len(report.images) != len(rows):
                raise DatasetError(f"{self.target.uri}/{report_key(self.folder, unit)} is gone or damaged; pack again")
            packed.add(report, rows)
        manifest, damaged = packed.manifest(self.name, self.images.digest_of)
        if damaged:
            lines = (json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in damaged.items())
            self.target.put(f"{self.folder}{DAMAGED}", "".join(lines).encode())
        else:
            self.target.delete(f"{self.folder}{DAMAGED}")
        self._remove_other_shards({shard.name for shard in manifest.shards})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MANIFEST
            manifest.save(path)
            # Last: without a manifest there are no packed images.
            self.target.put(f"{self.folder}{MANIFEST}", path.read_bytes())
        for key, _ in self.target.list_sizes(f"{self.folder}{REPORTS}/"):
            self.target.delete(key)
        # Of this folder too: a killed process leaves the unfinished file of its shard.
        self.target.remove_leftovers(self.folder.rstrip("/"))
        return _report_of(manifest, damaged)

    def _remove_other_shards(self, names: set[str]) -> None:
        """Remove what an interrupted plan with other options left: readers of plain tars would see its images too."""
        for key, _ in self.target.list_sizes(self.folder):
            name = key.removeprefix(self.folder)
            if re.fullmatch(r"\d{6,}\.tar", name) and name not in names:
                self.target.delete(key)

    def _divide(self, shard_mb: float) -> list[NDArray[np.int64]]:
        """Return the rows of each unit, in the order in which the shard holds them."""
        index = self.images.index
        if index.num_bytes_N is not None:
            sizes_N = index.num_bytes_N
        elif index.files:
            sizes_N = np.full(index.num_rows, max(1, sum(index.files.values()) // index.num_rows))
        else:
            sizes_N = np.full(index.num_rows, _PARQUET_GUESS_BYTES)
        ends_N = np.cumsum(sizes_N[self.row_of_place_N] + _TAR_BYTES)
        # Equal parts rather than full ones and a rest.
        num_units = max(1, round(int(ends_N[-1]) / (shard_mb * 1e6)))
        cuts = np.searchsorted(ends_N, ends_N[-1] * np.arange(1, num_units) / num_units)
        return [part for part in np.split(self.row_of_place_N, np.unique(cuts)) if len(part)]

    def _read_report(self, unit: int) -> UnitReport | None:
        try:
            report = UnitReport.from_json(self.target.get(report_key(self.folder, unit)))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return report if report.plan == self.name and report.number == unit else None

    def _read_damaged(self) -> dict[str, str]:
        try:
            lines = self.target.get(f"{self.folder}{DAMAGED}").decode().splitlines()
        except FileNotFoundError:
            return {}
        return {line["name"]: line["reason"] for line in map(json.loads, lines)}


class _Packed:
    """Collects what became of every image of the source."""

    def __init__(self, index: DatasetIndex, rules: PixelRules) -> None:
        num = index.num_rows
        self._index, self._rules = index, rules
        self._depending = dict.fromkeys(asdict(rules), 0)
        self._shards: list[Shard] = []
        self._heights_N, self._widths_N, self._shard_N = (np.zeros(num, dtype=np.int32) for _ in range(3))
        self._length_N, self._offset_N = np.zeros(num, dtype=np.int64), np.full(num, -1, dtype=np.int64)
        self._checksum_N = np.zeros(num, dtype=f"V{CHECKSUM_BYTES}")
        self._reasons: dict[int, str] = {}
        self._places: list[NDArray[np.int64]] = []

    def add(self, report: UnitReport, rows: NDArray[np.int64]) -> None:
        number = len(self._shards)
        self._shards.append(report.shard)
        for row, image in zip(rows.tolist(), report.images, strict=True):
            self._heights_N[row], self._widths_N[row] = image.height, image.width
            self._shard_N[row], self._offset_N[row], self._length_N[row] = number, image.offset, image.length
            if image.checksum:
                self._checksum_N[row] = np.void(base64.b64decode(image.checksum))
            if image.reason:
                self._reasons[row] = image.reason
            for name in image.depends_on:
                self._depending[name] += 1
        self._places.append(rows[self._offset_N[rows] >= 0])

    def _notes(self, num_kept: int) -> tuple[Note, ...]:
        """Return what was told of the source, and how many damaged images were left out."""
        lost = self._index.num_rows - num_kept
        if not lost:
            return self._index.notes
        text = f"{lost:,} damaged images were left out when the images were packed ({DAMAGED} names them)"
        return (*self._index.notes, Note(LEFT_OUT, text, lost))

    def manifest(self, plan: str, digest_of: str) -> tuple[ShardManifest, dict[str, str]]:
        """Return the manifest, and the reasons of the damaged images by name."""
        index, kept_K = self._index, np.flatnonzero(self._offset_N >= 0)
        damaged = {index.names[row]: reason for row, reason in sorted(self._reasons.items())}
        if len(self._reasons) == index.num_rows:
            name, reason = next(iter(damaged.items()))
            raise DatasetError(
                f"none of the {index.num_rows:,} images of {index.source} can be decoded, for instance {name}: {reason}"
            )
        all_kept = len(kept_K) == index.num_rows
        names = index.names if all_kept else Names.of(index.names[row] for row in kept_K.tolist())
        row_of_source_N = np.full(index.num_rows, -1)
        row_of_source_N[kept_K] = np.arange(len(kept_K))
        row_of_place_K = row_of_source_N[np.concatenate(self._places)]
        lengths_K, checksums_K = self._length_N[kept_K], self._checksum_N[kept_K]
        heights_K, widths_K = self._heights_N[kept_K], self._widths_N[kept_K]
        sizes_K = heights_K.astype(np.int64) * widths_K * 3 if digest_of == "pixels" else lengths_K
        content = hashlib.sha256(checksums_K.tobytes()).digest() if digest_of == "checksums" else b""
        digest = index.digest
        if not (all_kept and digest):
            digest = list_digest(Names.of(names), sizes_K, content)
        reasons = {int(row_of_source_N[r]): why for r, why in self._reasons.items() if row_of_source_N[r] >= 0}
        bad_K = np.zeros(len(kept_K), dtype=np.bool_)
        bad_K[list(reasons)] = True
        packed = DatasetIndex(
            source=f"packed {index.source.removeprefix('packed ')}",
            names=Names.of(names),
            heights_N=heights_K,
            widths_N=widths_K,
            labels_N=None if index.labels_N is None else index.labels_N[kept_K],
            class_names=index.class_names,
            bad_N=bad_K,
            digest=digest,
            reasons=reasons,
            num_bytes_N=sizes_K,
            rules=self._rules,
            notes=self._notes(len(kept_K)),
        )
        is_in_order = bool((row_of_place_K == np.arange(len(kept_K))).all())
        pieces = json.dumps([shard.pieces for shard in self._shards]).encode()
        return ShardManifest(
            index=packed,
            shards=tuple(self._shards),
            shard_N=self._shard_N[kept_K],
            offset_N=self._offset_N[kept_K],
            length_N=lengths_K,
            checksum_N=checksums_K,
            row_of_place_N=None if is_in_order else row_of_place_K,
            digest_of=digest_of,
            fingerprint=plan[:16] + fingerprint_of(digest.encode(), pieces)[:16],
            depending=self._depending,
        ), damaged


def _report_of(manifest: ShardManifest, damaged: dict[str, str], *, was_packed: bool = False) -> PackReport:
    return PackReport(
        num_rows=manifest.index.num_rows,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        digest=manifest.index.digest,
        damaged=damaged,
        was_packed=was_packed,
    )
