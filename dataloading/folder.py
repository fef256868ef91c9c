"""A folder of images, with or without class folders.

    root/<class>/x.jpg            only the train split
    root/train/<class>/x.jpg      and root/test or root/val for the test split
    root/x.jpg, root/train/x.jpg  no labels

README.md has the rule by which splits are found. Deeper folders are allowed; the class is the first one below the
split's, and a folder without images is none. A row's name is its path under the split's folder, and rows are sorted by
name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataloading import notes
from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, list_digest, require_same
from dataloading.labels import apart, first_labelled, folder_labels
from dataloading.layout import Part
from dataloading.listing import contents, existing_root, folders_in, list_files
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import advised
from dataloading.row_choice import FIRST_ROWS_RULE, choice_notes, chosen_rows
from dataloading.scanned import holds, scan_dataset
from dataloading.split_folders import FolderChoice, choose_folder

_CHUNK = 64


@dataclass(frozen=True)
class FolderReader:
    """Reads a row's file."""

    base: Path
    names: Names
    is_remote = False

    def __call__(self, row: int) -> bytes:
        path = self.base / self.names[row]
        with advised(path):
            return path.read_bytes()

    def subset(self, rows_R: NDArray[np.int64]) -> FolderReader:
        """Return the reader of some rows, numbered from 0."""
        return FolderReader(self.base, Names.of(self.names[row] for row in rows_R.tolist()))


def open_folder(
    root: str | None,
    part: Part,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return the images of a folder. Arguments and errors as `dataloading.sources.open_dataset`."""
    listed, read = list_folder(root, part, max_rows=max_rows)
    require_same(read.base, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index.with_notes(listed.notes), None, read)
    chunks = (list(read.names[row : row + _CHUNK]) for row in range(0, len(read.names), _CHUNK))
    return scan_dataset(
        listed,
        read,
        chunks,
        lambda name: _open(read.base / name),
        where=str(read.base),
        on_progress=on_progress,
        rules=rules,
    )


def _open(path: Path) -> BinaryIO:
    with advised(path):
        return open(path, "rb")


def list_folder(root: str | None, part: Part, *, max_rows: int | None = None) -> tuple[DatasetIndex, FolderReader]:
    """Return the images of a folder as far as the list of files tells: their sizes are not looked at."""
    path = existing_root(root, "folder")
    tree = _LocalTree(path, every_path=part.rule == 1)
    choices = choose_folder(tree, part, where=str(path))
    index, base = first_labelled(choices, lambda choice: _listing(tree, part, choice, max_rows))
    return index, FolderReader(base, Names.of(index.names))


def _listing(tree: _LocalTree, part: Part, choice: FolderChoice, max_rows: int | None) -> tuple[DatasetIndex, Path]:
    path, base = tree.root, tree.root / choice.base
    left_out: Counter[str] = Counter()
    files = tree.files(choice.base, left_out)
    if not files:
        shown = notes.left_out(left_out)
        raise DatasetError(
            f"no images in {base}: found {shown[0].text if shown else contents(base)}; expected files that end in "
            f"{', '.join(sorted(EXTENSIONS))}, directly or in one folder per class"
        )
    # Of all splits, so that a class has one number in all of them; only of images, as where there are no folders.
    own = {name.split("/", 1)[0] for name, _ in files if "/" in name}
    others = {(other, folder) for other in choice.others for folder in folders_in(path / other)}
    others = {name for at, name in others if name in own or tree.holds_images_below(f"{at}/{name}")}
    loose = sorted(entry.name for entry in path.iterdir() if choice.base and _is_image(entry))
    told = (*choice.notes, *notes.loose(loose), *notes.left_out(left_out), *apart(own, others))
    source = f"folder {path} ({part.split})"
    files, told = chosen_files(files, max_rows, part.rule, told)
    return file_index(source, files, sorted(own | others), choice.is_literal, told), base


def chosen_files(
    files: list[tuple[str, int]], max_rows: int | None, rule: int, told: tuple[notes.Note, ...]
) -> tuple[list[tuple[str, int]], tuple[notes.Note, ...]]:
    """Return the files of a sorted list that are taken, and what is told of them after `told`."""
    spread = rule != FIRST_ROWS_RULE
    rows = chosen_rows(len(files), max_rows, spread=spread).tolist()
    return [files[row] for row in rows], (*told, *choice_notes(len(files), len(rows), spread=spread))


class _LocalTree:
    """The folders of a local data root; what is below them is listed only where it is asked for."""

    def __init__(self, root: Path, *, every_path: bool) -> None:
        self.root, self._every_path = root, every_path

    def folders(self, at: str) -> list[str]:
        return folders_in(self.root / at)

    def holds_images(self, at: str) -> bool:
        return any(map(_is_image, (self.root / at).iterdir()))

    def holds_images_below(self, at: str) -> bool:
        folder = self.root / at
        try:
            return folder.is_dir() and bool(list_files(folder, self.root, EXTENSIONS, first_only=True))
        except DatasetError:
            return False  # a link out of the root: nothing there is ever read

    def image_folders(self) -> Iterable[str]:
        return {name.rpartition("/")[0] for name, _ in self._all[0]}

    def files(self, at: str, left_out: Counter[str]) -> list[tuple[str, int]]:
        """Return the images below a folder, sorted, and count what else lies there."""
        if at:
            return self._list(self.root / at, left_out)
        left_out.update(self._all[1])
        return self._all[0]

    def _list(self, base: Path, left_out: Counter[str]) -> list[tuple[str, int]]:
        return list_files(base, self.root, EXTENSIONS, left_out=left_out, every_path=self._every_path)

    @cached_property
    def _all(self) -> tuple[list[tuple[str, int]], Counter[str]]:
        left_out: Counter[str] = Counter()
        return self._list(self.root, left_out), left_out


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def file_index(
    source: str,
    files: list[tuple[str, int]],
    classes: list[str],
    dates_are_classes: bool,
    told: tuple[notes.Note, ...],
) -> DatasetIndex:
    """Return the index as far as the list of files tells it: without the images' sizes."""
    num_rows = len(files)
    names = Names.of(name for name, _ in files)
    num_bytes_N = np.array([size for _, size in files], dtype=np.int64)
    labels_N, about_labels = folder_labels([name for name, _ in files], classes, dates_are_classes=dates_are_classes)
    return DatasetIndex(
        source=source,
        names=names,
        heights_N=np.zeros(num_rows, dtype=np.int32),
        widths_N=np.zeros(num_rows, dtype=np.int32),
        labels_N=labels_N,
        class_names=() if labels_N is None else tuple(classes),
        bad_N=np.zeros(num_rows, dtype=np.bool_),
        digest=list_digest(names, num_bytes_N),
        num_bytes_N=num_bytes_N,
        notes=(*told, *about_labels),
    )
