"""Packing one shard: read its images, decode each in full, write the tar and then the report that it is done.

Runs in other processes and on other machines. Nothing is pickled to the storage: the report is JSON.

Shapes: R images of the unit.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from dataloading import headers, other_formats, pillow, samples
from dataloading.index import Reader, image_checksum
from dataloading.orientation import TAIL_BYTES, orientation_of
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import raise_if_of_memory
from dataloading.shards import PIECE_BYTES, REPORTS, Shard
from dataloading.storage import Objects


@dataclass(frozen=True)
class PackTask:
    """What one unit is. Picklable."""

    number: int
    plan: str
    """Name of the plan that it belongs to; a report of another plan does not count."""
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    read: Reader
    """Reads the unit's images, numbered from 0."""
    target: Objects
    folder: str
    keep_bad: bool
    rules: PixelRules

    @property
    def shard_name(self) -> str:
        return f"{self.number:06d}.tar"

    @property
    def report_key(self) -> str:
        return report_key(self.folder, self.number)


@dataclass(frozen=True)
class PackedImage:
    """What became of one image."""

    height: int = 0
    width: int = 0
    length: int = 0
    offset: int = -1
    """Place of its first byte in the shard; -1: it was left out."""
    checksum: str = ""
    """Base64."""
    reason: str = ""
    """Why it is damaged; empty where it is not."""
    depends_on: tuple[str, ...] = ()
    """Fields of the pixel rules with other values of which it would have another size, other pixels or damage."""


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit's images, in its order."""

    number: int
    plan: str
    shard: Shard
    images: tuple[PackedImage, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> UnitReport:
        """Read a report. Raises ValueError, KeyError or TypeError for anything else."""
        document: dict[str, Any] = json.loads(text)
        shard = Shard(**{**document["shard"], "pieces": tuple(document["shard"]["pieces"])})
        images = tuple(
            PackedImage(**{**image, "depends_on": tuple(image["depends_on"])}) for image in document["images"]
        )
        if type(document["number"]) is not int:
            raise TypeError(f"number of a unit: found {document['number']!r}")
        return cls(document["number"], str(document["plan"]), shard, images)


def report_key(folder: str, number: int) -> str:
    """Return the key of a unit's report."""
    return f"{folder}{REPORTS}/{number:06d}.json"


def pack_unit(task: PackTask) -> tuple[int, int, int]:
    """Pack one unit; return its number, its images and the bytes of its shard.

    Raises OSError where an image cannot be read: that is a storage that fails, and no damage.
    """
    buffer = io.BytesIO()
    images: list[PackedImage] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (name, sample) in enumerate(zip(task.names, sample_names(task.names), strict=True)):
            try:
                encoded = task.read(number)
            except ValueError as error:
                encoded, looked = b"", PackedImage(reason=f"cannot be read: {error}"[:200])
            else:
                looked = look_at(encoded, task.rules)
            if looked.reason and not task.keep_bad:
                images.append(looked)
                continue
            offset = _add(tar, buffer, f"{sample}{_ending(name, encoded)}", encoded)
            if task.labels is not None:
                _add(tar, buffer, f"{sample}.cls", str(task.labels[number]).encode())
            checksum = base64.b64encode(image_checksum(encoded)).decode()
            images.append(replace(looked, length=len(encoded), offset=offset, checksum=checksum))
    data = buffer.getbuffer()
    num_rows = sum(image.offset >= 0 for image in images)
    pieces = tuple(image_checksum(data[i : i + PIECE_BYTES]).hex() for i in range(0, len(data), PIECE_BYTES))
    report = UnitReport(task.number, task.plan, Shard(task.shard_name, len(data), num_rows, pieces), tuple(images))
    task.target.put(f"{task.folder}{task.shard_name}", data)
    # The report comes last: a shard without one was interrupted and is written again.
    task.target.put(task.report_key, report.to_json())
    return task.number, len(task.names), len(data)


def look_at(encoded: bytes, rules: PixelRules | None = None) -> PackedImage:
    """Return an image's size after decoding it in full by the rules (None: the present ones), or why it is damaged."""
    height = width = 0
    depends_on: tuple[str, ...] = ()
    try:
        # Filters are global, but this process has one thread.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=headers.FORMATS) as image:
                depends_on = _depends_on(image, encoded)
                height, width = headers.checked_size(image, rules or PixelRules(), encoded[-TAIL_BYTES:])
            pixels_HWC = pillow.decode(encoded, rules)
        assert pixels_HWC.shape == (height, width, 3), f"decoded to {pixels_HWC.shape}"
    except Exception as error:  # a decoder that meets a damaged file raises nearly anything
        raise_if_of_memory(error, f"an image of {width} x {height} pixels")
        why = headers.reason(error, encoded[: other_formats.NUM_BYTES])
        return PackedImage(height, width, len(encoded), reason=why, depends_on=depends_on)
    return PackedImage(height, width, len(encoded), depends_on=depends_on)


def _depends_on(image: Image.Image, encoded: bytes) -> tuple[str, ...]:
    turned = orientation_of(image, encoded[-TAIL_BYTES:]) != 1
    deep = samples.depends_on_rules(image)
    return ("orientation",) * turned + ("deep_samples",) * deep


def sample_names(names: Sequence[str]) -> list[str]:
    """Return the names of a shard's images in the tar, without their endings: those of the source where they serve.

    WebDataset takes members whose names agree up to the first dot of their last part for one sample. So dots become
    "_", and images that would share a name ("x.jpg", "x.jpeg") are numbered. The manifest keeps the source's names.
    """
    stems = [name.removesuffix(_known_ending(name)) for name in names]
    plain = [f"{folder}{slash}{last.replace('.', '_')}" for folder, slash, last in (s.rpartition("/") for s in stems)]
    # Names that can stay do, whoever else would like to have them.
    taken = {stem: place for place, stem in reversed(list(enumerate(stems))) if stem == plain[place]}
    found = []
    for place, stem in enumerate(plain):
        sample, number = stem, 1
        while taken.setdefault(sample, place) != place:
            number += 1
            sample = f"{stem}-{number}"
        found.append(sample)
    return found


def _known_ending(name: str) -> str:
    ending = PurePosixPath(name).suffix
    return ending if ending.lower() in headers.EXTENSIONS else ""


def _ending(name: str, encoded: bytes) -> str:
    """Return the ending of an image's member: the source's, or its format's."""
    if ending := _known_ending(name):
        return ending
    try:
        with Image.open(io.BytesIO(encoded), formats=headers.FORMATS) as image:
            ending = (image.format or "img").lower()
    except Exception as error:  # a damaged image that is packed all the same
        raise_if_of_memory(error, "the header of an image")
        ending = "img"
    return f".{ending}"


def _add(tar: tarfile.TarFile, buffer: io.BytesIO, name: str, data: bytes) -> int:
    """Add a member, the same bytes whoever packs it and when; return the place of its first byte."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return buffer.tell() - padded


def labels_of(labels_N: Any, rows: Sequence[int]) -> tuple[int, ...] | None:
    """Return the labels of some rows, None where there are none."""
    return None if labels_N is None else tuple(int(labels_N[row]) for row in rows)
