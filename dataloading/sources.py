"""Where images come from: one function that opens a folder, CIFAR, parquet files or the demo images."""

from __future__ import annotations

from pathlib import Path

from dataloading.choices import SOURCE_KINDS
from dataloading.cifar import KINDS, cifar_root, open_cifar
from dataloading.folder import open_folder
from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, dataset_of_pixels, require_same
from dataloading.listing import SPLIT_NAMES, contents, existing_root, list_files
from dataloading.parquet import open_parquet, parquet_files


def open_dataset(
    kind: str,
    root: str | None,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    download: bool = False,
) -> Dataset:
    """Return the images of a split with fixed row numbers.

    kind: one of `SOURCE_KINDS`; "auto" finds out what `root` is, the two CIFAR kinds are also read from the parquet
    files in which hubs hold them. root: the data root, None only for the demo images.
    split: "train" or "test". max_rows: take only the first rows. index: a saved index; the images' headers are not read
    again, and DatasetChanged is raised where it does not fit. on_progress(done, total): called while images are looked
    at. download: fetch CIFAR where `root` is missing or empty.

    Raises DatasetError (a ValueError) for what a person can correct, OSError where files cannot be read.
    """
    if kind not in SOURCE_KINDS:
        raise DatasetError(f"kind of data: found {kind!r}, expected one of {', '.join(SOURCE_KINDS)}")
    if split not in SPLIT_NAMES:
        raise DatasetError(f"split: found {split!r}, expected one of {', '.join(SPLIT_NAMES)}")
    if max_rows is not None and max_rows < 1:
        raise DatasetError(f"max_rows: found {max_rows}, expected at least 1, or None for all rows")
    kind = recognise(root) if kind == "auto" else kind
    if kind == "demo" and root is not None:
        raise DatasetError(
            f"kind of data 'demo': found data root {root}, expected none, since code makes those images; leave it "
            "out, or name another kind ('auto' recognises what the root holds) or recipe"
        )
    if kind == "demo":
        return _open_demo(split, max_rows, index)
    if kind == "folder":
        return open_folder(root, split, max_rows=max_rows, index=index, on_progress=on_progress)
    if kind == "parquet":
        return open_parquet(root, split, max_rows=max_rows, index=index, on_progress=on_progress)
    path = cifar_root(KINDS[kind], root, download=download)
    if _is_hub_folder(path):
        return open_parquet(root, split, max_rows=max_rows, index=index, on_progress=on_progress)
    return open_cifar(KINDS[kind], path, split, max_rows=max_rows, index=index)


def require_root(kind: str, root: str, *, download: bool = False) -> None:
    """Raise DatasetError where the data root is not there or cannot be read; download as in `open_dataset`."""
    if kind in KINDS:
        cifar_root(KINDS[kind], root, download=download)
    else:
        existing_root(root, kind, Path.exists)


def recognise(root: str | None) -> str:
    """Return the kind of data that `root` holds; "demo" for None. Raises DatasetError where it is none of them."""
    if root is None:
        return "demo"
    path = existing_root(root, "auto", Path.exists)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return "parquet"
        raise DatasetError(f"data root {path}: found a file, expected a folder or a .parquet file")
    for kind, cifar in KINDS.items():
        for folder in (path, path / cifar.folder):
            if any((folder / names[0]).is_file() for names in cifar.files.values()):
                return kind
    # The usual places first: a hub repository may hold pictures for its README, an image folder a saved index.
    if _is_hub_folder(path):
        return "parquet"
    if list_files(path, path, EXTENSIONS, first_only=True):
        return "folder"
    if any(parquet_files(path, split) for split in SPLIT_NAMES):
        return "parquet"
    raise _unknown(path)


def _is_hub_folder(path: Path) -> bool:
    """Whether parquet files lie where hubs put them: named by split, in the root or its folder `data`."""
    split_names = [name for names in SPLIT_NAMES.values() for name in names]
    return any(
        found for folder in (path, path / "data") for name in split_names for found in folder.glob(f"{name}-*.parquet")
    )


def _unknown(path: Path) -> DatasetError:
    pickled = [cifar.pickled_folder for cifar in KINDS.values() if (path / cifar.pickled_folder).is_dir()]
    advice = "Name the folder that holds the images"
    if pickled:
        advice = f"{pickled[0]} is the pickled form of CIFAR, which is never read: it can run code. Use the binary form"
    return DatasetError(
        f"no images in {path}: found {contents(path)}; expected image files (in class folders or not), parquet files "
        f"with an image column, or {' or '.join(cifar.folder for cifar in KINDS.values())}. {advice}"
    )


def _open_demo(split: str, max_rows: int | None, index: DatasetIndex | None) -> Dataset:
    from dataloading.demo import CLASS_NAMES, demo_images

    pixels_NHWC, labels_N = demo_images(split)
    pixels_NHWC, labels_N = pixels_NHWC[:max_rows], labels_N[:max_rows]
    names = (f"{split}/{row}" for row in range(len(labels_N)))
    dataset = dataset_of_pixels(f"demo ({split})", pixels_NHWC, labels_N, CLASS_NAMES, names)
    require_same("the list of demo images", index, dataset.index)
    return dataset
