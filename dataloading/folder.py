"""A folder of images, with or without class folders.

    root/<class>/x.jpg            only the train split
    root/train/<class>/x.jpg      and root/test or root/val for the test split
    root/x.jpg, root/train/x.jpg  no labels

Deeper folders are allowed; the class is the first one, and a folder without images is none. A row's name is its path
under the split's folder, and rows are sorted by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, Names, NoSplit, list_digest, require_same
from dataloading.listing import SPLIT_NAMES, contents, existing_root, folders_in, list_files
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import advised
from dataloading.scanned import holds, scan_dataset

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
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return the images of a folder. Arguments and errors as `dataloading.sources.open_dataset`."""
    listed, read = list_folder(root, split, max_rows=max_rows)
    require_same(read.base, index, listed)
    if index is not None and holds(index, rules):
        return Dataset(index, None, read)
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


def list_folder(root: str | None, split: str, *, max_rows: int | None = None) -> tuple[DatasetIndex, FolderReader]:
    """Return the images of a folder as far as the list of files tells: their sizes are not looked at."""
    path = existing_root(root, "folder")
    name, others = _split_folder(path, split)
    base = path / name
    files = list_files(base, path, EXTENSIONS)
    if not files:
        raise DatasetError(
            f"no images in {base}: found {contents(base)}; expected files that end in {', '.join(sorted(EXTENSIONS))}, "
            "directly or in one folder per class"
        )
    # Of all splits, so that a class has one number in all of them; only of images, as where there are no folders.
    classes = {name.split("/", 1)[0] for name, _ in files if "/" in name}
    for other in others:
        folders = (folder for folder in folders_in(path / other) if folder not in classes)
        classes.update(folder for folder in folders if _holds_images_below(path / other / folder, path))
    index = file_index(f"folder {path} ({split})", files[:max_rows], sorted(classes))
    return index, FolderReader(base, Names.of(index.names))


def _split_folder(root: Path, split: str) -> tuple[str, list[str]]:
    """Return the folder of a split ("": the root itself), and those of the other splits."""
    found = choose_split(folders_in(root), split, lambda name: _holds_images(root / name))
    if found is None:
        raise _no_split(root, split)
    name, splits = found
    return name, [other for other in splits if other != name]


def choose_split(here: list[str], split: str, holds_images: Callable[[str], bool]) -> tuple[str, list[str]] | None:
    """Return the folder of a split ("": the root itself) and the folders of all splits; None where there is none.

    here: the folders in the root. A folder called "train" can be a class among others (VOC has one): then it and its
    neighbours hold images directly, as `holds_images` says.
    """
    splits = [name for names in SPLIT_NAMES.values() for name in names if name in here]
    others = [name for name in here if name not in splits]
    is_class = len(splits) == 1 and bool(others) and all(map(holds_images, (*splits, *others)))
    if not splits or is_class:
        return ("", []) if split == "train" else None
    return next(((name, splits) for name in SPLIT_NAMES[split] if name in splits), None)


def _holds_images(folder: Path) -> bool:
    return any(entry.suffix.lower() in EXTENSIONS for entry in folder.iterdir())


def _holds_images_below(folder: Path, root: Path) -> bool:
    try:
        return bool(list_files(folder, root, EXTENSIONS))
    except DatasetError:
        return False  # a link out of the root: nothing there is ever read


def _no_split(root: Path, split: str) -> NoSplit:
    expected = " or ".join(f"{root}/{name}" for name in SPLIT_NAMES[split])
    return NoSplit(
        f"no {split} split in {root}: found {contents(root)}; expected the folder {expected}. Add it, or name "
        "another root"
    )


def file_index(source: str, files: list[tuple[str, int]], classes: list[str]) -> DatasetIndex:
    """Return the index as far as the list of files tells it: without the images' sizes."""
    num_rows = len(files)
    names = Names.of(name for name, _ in files)
    num_bytes_N = np.array([size for _, size in files], dtype=np.int64)
    labels_N = _labels(files, classes)
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
    )


def _labels(files: list[tuple[str, int]], classes: list[str]) -> NDArray[np.int64] | None:
    """Return the number of each image's class folder; None where an image is in none, or there is only one."""
    number = {name: label for label, name in enumerate(classes)}
    if len(classes) < 2 or any("/" not in name for name, _ in files):
        return None
    return np.array([number[name.split("/", 1)[0]] for name, _ in files], dtype=np.int64)
