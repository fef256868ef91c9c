"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, "Learning multiple layers of features from tiny images"), binary form.

A record is one label byte (CIFAR-100: coarse, then fine), then 3 x 32 x 32 bytes, colour plane by colour plane. The
Python form of the archives is pickled and never read: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataloading.cifar_download import fetch
from dataloading.index import Dataset, DatasetError, DatasetIndex, dataset_of_pixels, require_same
from dataloading.listing import check_link, contents, existing_root
from dataloading.read_errors import advised

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True, kw_only=True)
class CifarKind:
    """Where the parts of one of the two data sets are."""

    url: str
    md5: str
    """Of the archive, as its authors publish it."""
    folder: str
    pickled_folder: str
    files: dict[str, tuple[str, ...]]
    label_bytes: int
    """Label bytes per record; the last one is the label used."""
    class_names: tuple[str, ...]


CIFAR10 = CifarKind(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    pickled_folder="cifar-10-batches-py",
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    label_bytes=1,
    class_names=tuple(_CIFAR10_CLASSES.split()),
)
CIFAR100 = CifarKind(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    pickled_folder="cifar-100-python",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    label_bytes=2,
    class_names=tuple(_CIFAR100_CLASSES.split()),
)
KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_cifar(
    kind: CifarKind,
    path: Path,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
) -> Dataset:
    """Return the images in `path`, which `cifar_root` found. The rest as `dataloading.sources.open_dataset`."""
    folder = _folder(path, kind, split)
    if folder is None:
        raise _missing(kind, path, split)
    for name in kind.files[split]:
        check_link(folder / name, path.resolve())
    records = list(_records(kind, folder, split, max_rows))
    labels_N = np.concatenate([record[:, kind.label_bytes - 1] for _, record in records]).astype(np.int64)
    num_classes = len(kind.class_names)
    if labels_N.max() >= num_classes:
        row = int(np.argmax(labels_N >= num_classes))
        raise DatasetError(
            f"{folder}, row {row}: found label {labels_N[row]}, expected below {num_classes}; {_again(kind)}"
        )
    planes_NCHW = np.concatenate([record[:, kind.label_bytes :] for _, record in records])
    pixels_NHWC = np.ascontiguousarray(planes_NCHW.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
    names = (f"{name}/{number}" for name, record in records for number in range(len(record)))
    dataset = dataset_of_pixels(f"{kind.folder} {path} ({split})", pixels_NHWC, labels_N, kind.class_names, names)
    require_same(folder, index, dataset.index)
    return dataset


def _folder(root: Path, kind: CifarKind, split: str) -> Path | None:
    """Return the folder that holds the files of a split: the root, or the archive's folder in it."""
    for folder in (root / kind.folder, root):
        if all((folder / name).is_file() for name in kind.files[split]):
            return folder
    return None


def _records(
    kind: CifarKind, folder: Path, split: str, max_rows: int | None
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield each file's name and its records, uint8 (records, bytes), until `max_rows` of them."""
    record_bytes = kind.label_bytes + _PIXEL_BYTES
    left = max_rows
    for name in kind.files[split]:
        size = (folder / name).stat().st_size
        if size == 0 or size % record_bytes:
            raise DatasetError(
                f"{folder / name}: found {size:,} bytes, expected a multiple of {record_bytes:,} bytes per image; "
                f"{_again(kind)}"
            )
        if left == 0:
            return
        num_records = size // record_bytes if left is None else min(left, size // record_bytes)
        left = None if left is None else left - num_records
        with advised(folder / name):
            raw = np.fromfile(folder / name, dtype=np.uint8, count=num_records * record_bytes)
        if len(raw) < num_records * record_bytes:
            raise OSError(f"{folder / name}: found {len(raw):,} bytes of {size:,}: it was cut short meanwhile")
        yield name, raw.reshape(num_records, record_bytes)


def cifar_root(kind: CifarKind, root: str | None, *, download: bool = False) -> Path:
    """Return the data root as an absolute path. download: fetch the images first where it is missing or empty.

    Several processes may ask at once. Raises DatasetError, with what to do by hand.
    """
    if root is None:
        return existing_root(root, kind.folder)
    path = Path(root).absolute()
    if download:
        fetch(kind, path, _by_hand(kind, path))
    advice = f"Correct the path, allow the download (data.download), or {_by_hand(kind, path)}"
    return existing_root(root, kind.folder, advice=advice)


def _missing(kind: CifarKind, root: Path, split: str) -> DatasetError:
    pickled = ""
    if (root / kind.pickled_folder).is_dir() or root.name == kind.pickled_folder:
        pickled = f" {kind.pickled_folder} is the pickled form, which is never read: it can run code."
    return DatasetError(
        f"{kind.folder} ({split}): found {contents(root)} in {root}, expected {', '.join(kind.files[split])} there or "
        f"in {kind.folder}/.{pickled} Allow the download (data.download) to an empty folder, or "
        f"{_by_hand(kind, root)}. Other images: name their kind (data.kind), or 'auto'"
    )


def _by_hand(kind: CifarKind, root: Path) -> str:
    return f"fetch {kind.url} (md5 {kind.md5}) and unpack it in {root}, which gives {root / kind.folder}"


def _again(kind: CifarKind) -> str:
    return f"unpack the archive {kind.url} again"
