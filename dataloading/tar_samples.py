"""The samples of WebDataset tars as their members come by: images, and the labels beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dataloading.headers import EXTENSIONS
from dataloading.index import DatasetError
from dataloading.labels import MAX_LABEL_BYTES, Labels, no_labels, spelt
from dataloading.listing import has_ending
from dataloading.notes import HIDDEN, LABELS, Note, ending_of

LINKS = "links"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Image:
    """A member that is an image."""

    name: str
    """The tar and the member."""
    shard: int
    offset: int
    length: int
    label: str | None = None
    """As it is written; None where there is none."""


@dataclass
class Samples:
    """What the members of all tars are; those that share a name up to the first dot of its last part are one sample."""

    keep_hidden: bool = False
    """Whether hidden members are images too, as they were to older versions."""
    images: list[Image] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    """Members that should hold a label and do not."""
    num_apart: int = 0
    """Labels that do not stand next to their image."""

    def add_tar(self, where: str, tar: str, shard: int) -> TarSamples:
        """Return what takes the members of the next tar, one after the other."""
        return TarSamples(self, where, tar, shard)

    def labels(self) -> Labels:
        """Return the labels of all images, or why there are none."""
        images = self.images
        missing = [image.name for image in images if image.label is None]
        if self.unreadable and missing:
            return no_labels(
                f"{self.unreadable[0]} holds no text of 1 to {MAX_LABEL_BYTES} bytes ({len(self.unreadable):,} such)",
                len(self.unreadable),
            )
        if missing:
            return no_labels(
                f"{missing[0]} has no label, a member of the same name that ends in .cls "
                f"({len(missing):,} of {len(images):,} images have none)",
                len(missing),
            )
        found = spelt([image.label or "" for image in images], lambda row: f"the label of {images[row].name}")
        if not self.num_apart:
            return found
        text = f"{self.num_apart:,} labels stand apart from their images in the tars; they were found by their names"
        return replace(found, notes=(*found.notes, Note(LABELS, text, self.num_apart)))


class TarSamples:
    """The samples of one tar."""

    def __init__(self, samples: Samples, where: str, tar: str, shard: int) -> None:
        self._all, self._where, self._tar, self._shard = samples, where, tar, shard
        self._images: list[tuple[Image, int, tuple[str, str]]] = []
        self._text_of_run: dict[int, str] = {}
        self._texts_of_key: dict[tuple[str, str], set[str]] = {}
        self._key: tuple[str, str] | None = None
        self._run = 0

    def add(self, name: str, offset: int, length: int, read: Callable[[], bytes]) -> None:
        """Take a member that is a file. read(): its bytes. Raises DatasetError for a second image in a sample."""
        folder, _, last = name.rpartition("/")
        if not self._all.keep_hidden and any(part.startswith(".") for part in name.split("/") if part != "."):
            if has_ending(last, EXTENSIONS):
                self._all.left_out[HIDDEN] += 1
            return
        stem, _, ending = last.partition(".")
        key = (folder, stem)
        if key != self._key:
            self._key, self._run = key, self._run + 1
        if "." + ending.rpartition(".")[2].lower() in EXTENSIONS:
            if self._images and self._images[-1][1] == self._run:
                raise _two_images(self._where, self._images[-1][0].name, f"{self._tar}/{name}")
            image = Image(f"{self._tar}/{name}", self._shard, offset, length)
            self._images.append((image, self._run, key))
        elif ending.rpartition(".")[2].lower() == "cls":
            self._add_label(name, key, ending.lower() == "cls", read() if length <= MAX_LABEL_BYTES else b"")
        else:
            self._all.left_out[ending_of(name)] += 1

    def add_link(self, name: str) -> None:
        """Take a member that is a link: there is nothing to read in it."""
        if has_ending(name, EXTENSIONS):
            self._all.left_out[LINKS] += 1

    def end(self) -> None:
        """Give the images their labels: all members were seen."""
        for image, run, key in self._images:
            texts = self._texts_of_key.get(key, set())
            label = self._text_of_run.get(run)
            if label is None and len(texts) == 1:
                (label,) = texts
                self._all.num_apart += 1
            self._all.images.append(replace(image, label=label))

    def _add_label(self, name: str, key: tuple[str, str], is_plain: bool, content: bytes) -> None:
        try:
            text = content.decode("utf-8-sig").strip(" \t\r\n\0")
        except UnicodeDecodeError:
            text = ""
        if not text or _CONTROL.search(text):
            self._all.unreadable.append(f"{self._tar}/{name}")
            return
        self._texts_of_key.setdefault(key, set()).add(text)
        # x.cls is the sample's label; x.target.cls is where there is no such member.
        if is_plain or self._run not in self._text_of_run:
            self._text_of_run[self._run] = text


def _two_images(where: str, first: str, second: str) -> DatasetError:
    return DatasetError(
        f"{where}: found two images in one sample, {first!r} and {second!r}: in WebDataset what agrees up to the first "
        "dot of the last part is one sample; expected one image in each. Write the images under names of their own, "
        "or unpack the tars into a folder and pack that"
    )
