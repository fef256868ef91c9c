"""Checks packed images against their manifest: shards by their checksums, images by theirs and by decoding them.

Every piece of a shard is read once. What is wrong is told by shard and image, not raised: a person wants the list.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataloading.index import Names, image_checksum, list_digest
from dataloading.manifest_checks import column_digest
from dataloading.pack_unit import look_at
from dataloading.pixel_rules import PixelRules
from dataloading.shard_reader import CutShortError, ShardBytes, in_pieces
from dataloading.shards import PIECE_BYTES, Shard, ShardManifest
from dataloading.storage import ParallelMap
from dataloading.tars import TAR_ERRORS, members_of, open_tar


@dataclass(frozen=True)
class VerifyTask:
    """One shard and what the manifest says of its images. Picklable."""

    number: int
    shard: Shard
    source: ShardBytes
    names: tuple[str, ...]
    offsets_R: NDArray[np.int64]
    lengths_R: NDArray[np.int64]
    checksums_R: NDArray[np.void]
    heights_R: NDArray[np.int32]
    widths_R: NDArray[np.int32]
    bad_R: NDArray[np.bool_]
    labels_R: NDArray[np.int64] | None
    rules: PixelRules


def verify(
    manifest: ShardManifest,
    source: ShardBytes,
    parallel: ParallelMap,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[str]:
    """Yield a line for each thing that is wrong. on_progress(images done, all images, bytes read).

    Raises OSError where a shard that is there cannot be read: that says nothing about it.
    """
    index = manifest.index
    if manifest.digest_of == "list" and list_digest(Names.of(index.names), manifest.length_N) != index.digest:
        yield "manifest: names and sizes do not give its digest; pack the images again"
    columns = {"name": Names.of(index.names).array, "checksum": manifest.checksum_array()}
    for name, column in columns.items():
        if manifest.column_digests and column_digest(column) != manifest.column_digests[name]:
            yield f"manifest: column {name} differs from its digest; pack the images again"
    if others := source.other_tars():
        yield (
            f"{len(others)} tars that are none of its shards, for instance {others[0]}: programs that read all tars "
            "would read them; remove them"
        )
    order = np.argsort(manifest.shard_N, kind="stable")
    ends_S = np.cumsum(np.bincount(manifest.shard_N, minlength=len(manifest.shards)))
    rows_of_shard = np.split(order, ends_S[:-1])
    tasks = (_task(manifest, source, number, rows) for number, rows in enumerate(rows_of_shard))
    images = num_bytes = 0
    if on_progress:
        on_progress(0, index.num_rows, 0)
    for problems, num_images, size in parallel(verify_shard, tasks):
        yield from problems
        images, num_bytes = images + num_images, num_bytes + size
        if on_progress:
            on_progress(images, index.num_rows, num_bytes)


def _task(manifest: ShardManifest, source: ShardBytes, number: int, rows: NDArray[np.int64]) -> VerifyTask:
    index = manifest.index
    return VerifyTask(
        number=number,
        shard=manifest.shards[number],
        source=source,
        names=tuple(index.names[int(row)] for row in rows),
        offsets_R=manifest.offset_N[rows],
        lengths_R=manifest.length_N[rows],
        checksums_R=manifest.checksum_N[rows],
        heights_R=index.heights_N[rows],
        widths_R=index.widths_N[rows],
        bad_R=index.bad_N[rows],
        labels_R=None if index.labels_N is None else index.labels_N[rows],
        rules=index.rules,
    )


def verify_shard(task: VerifyTask) -> tuple[list[str], int, int]:
    """Return what is wrong with a shard, its images and its bytes. Raises OSError where nothing can be known of it."""
    shard, problems, data = task.shard, [], bytearray()
    try:
        for piece in in_pieces(task.source, task.number, shard.num_bytes):
            number = len(data) // PIECE_BYTES
            if image_checksum(piece).hex() != shard.pieces[number]:
                problems.append(f"{shard.name}: piece {number} (bytes from {len(data):,}) differs from its checksum")
            data += piece
        if (found := task.source.num_bytes(task.number)) > shard.num_bytes:
            problems.append(
                f"{shard.name}: found {found:,} bytes, expected {shard.num_bytes:,}: something was appended, which "
                "programs that read tars see; pack the images again"
            )
    except (FileNotFoundError, CutShortError) as error:
        return [f"{shard.name}: {error}"], len(task.names), len(data)
    problems += _tar_problems(task, data)
    for i, name in enumerate(task.names):
        start, length = int(task.offsets_R[i]), int(task.lengths_R[i])
        encoded = bytes(data[start : start + length])
        if image_checksum(encoded) != task.checksums_R[i].tobytes():
            problems.append(f"{shard.name}: {name}: its bytes differ from its checksum")
            continue
        looked = look_at(encoded, task.rules)
        if bool(looked.reason) != bool(task.bad_R[i]):
            problems.append(f"{shard.name}: {name}: {looked.reason or 'marked as damaged, but decodes'}")
        elif not looked.reason and (looked.height, looked.width) != (task.heights_R[i], task.widths_R[i]):
            problems.append(
                f"{shard.name}: {name}: found {looked.width} x {looked.height} pixels, expected "
                f"{task.widths_R[i]} x {task.heights_R[i]}"
            )
    return problems, len(task.names), len(data)


def _tar_problems(task: VerifyTask, data: bytearray) -> list[str]:
    """Return what other programs would stumble over: members that are not where, or what, the manifest has them."""
    shard, places, labels = task.shard.name, {}, {}
    try:
        with open_tar(len(data), file=io.BytesIO(data)) as tar:
            for member in members_of(tar, len(data)):
                folder, _, last = member.name.rpartition("/")
                sample, _, ending = last.partition(".")
                if member.isfile() and ending == "cls":
                    labels[folder, sample] = bytes(data[member.offset_data : member.offset_data + member.size])
                elif member.isfile():
                    places[member.offset_data, member.size] = (folder, sample)
    except TAR_ERRORS as error:
        return [f"{shard}: no whole tar file: {error}"]
    problems: list[str] = []
    samples = [places.pop(place, None) for place in zip(task.offsets_R.tolist(), task.lengths_R.tolist(), strict=True)]
    lost = [name for name, sample in zip(task.names, samples, strict=True) if sample is None]
    if lost:
        problems.append(f"{shard}: {len(lost)} images are no members of the tar, for instance {lost[0]}")
    if places:
        foreign = "/".join(filter(None, next(iter(places.values()))))
        problems.append(f"{shard}: {len(places)} members that the manifest does not know, for instance {foreign}")
    for i, sample in enumerate(samples if task.labels_R is not None else ()):
        expected = str(task.labels_R[i]).encode() if task.labels_R is not None else b""
        if sample is not None and labels.get(sample) != expected:
            found = labels.get(sample, b"none")[:40].decode(errors="replace")
            problems.append(f"{shard}: {task.names[i]}: found label {found}, the manifest says {expected.decode()}")
    return problems
