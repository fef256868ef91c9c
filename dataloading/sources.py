"""Where images come from: one function that opens packed images, folders, objects, tars, CIFAR, parquet or the demo."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from dataloading.cache import ShardCache
from dataloading.choices import REMOTE_KINDS, SOURCE_KINDS
from dataloading.cifar import KINDS, cifar_root, open_cifar
from dataloading.folder import list_folder, open_folder
from dataloading.headers import EXTENSIONS, Progress
from dataloading.index import Dataset, DatasetError, DatasetIndex, NoSplit, Reader, dataset_of_pixels, require_same
from dataloading.layout import KIND_OF_WORD, RULE, SPLITS, Part
from dataloading.listing import contents, existing_root, is_listed, list_files
from dataloading.objects import list_objects, open_objects
from dataloading.packed import is_packed, open_manifest, open_packed, require_storage, require_whole
from dataloading.parquet import list_parquet, open_parquet
from dataloading.pixel_rules import PixelRules
from dataloading.pixels import PixelsReader
from dataloading.shard_reader import ShardReader
from dataloading.shards import MANIFEST
from dataloading.storage import Storage, is_remote, local_path
from dataloading.webdataset import list_webdataset, open_webdataset


@dataclass(frozen=True)
class SourceImages:
    """Images as they lie in their source, not looked at."""

    index: DatasetIndex
    read: Reader
    digest_of: str
    """One of `shards.DIGESTS`."""


SCANNED_KINDS = ("folder", "webdataset")
"""Opened without a saved index, images of these kinds have their headers read, one after the other."""
_HUB_NAME = re.compile(rf"(?:^|[-_.])(?:{'|'.join(KIND_OF_WORD)})[-_.]\d+[^/]*\.parquet$", re.IGNORECASE)
_SPLIT_FOLDERS = (*KIND_OF_WORD, "")
"""Where packed images may lie below a root."""


def open_dataset(
    kind: str,
    root: str | None,
    split: str,
    *,
    config: str | None = None,
    layout_rule: int = RULE,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    download: bool = False,
    storage: Storage | None = None,
    rules: PixelRules | None = None,
) -> Dataset:
    """Return the images of a split with fixed row numbers.

    kind: one of `SOURCE_KINDS`; "auto" finds out what `root` is, the two CIFAR kinds are also read from the parquet
    files in which hubs hold them. root: the data root, a folder or a URI that `storage` opens; None only for the demo
    images. split: "train", "test" or another name, config: a configuration, layout_rule: as `dataloading.layout.Part`
    has them. max_rows: take only so many (`dataloading.row_choice`). index: a saved index; the images' headers are not
    read again, and DatasetChanged is raised where it does not fit. on_progress(done, total): called while images are
    looked at.
    download: fetch CIFAR where `root` is missing or empty. storage: how URIs are reached. rules: how pixels are made of
    the images' bytes; None: as a saved index or packed images state, else the present ones.

    Raises DatasetError (a ValueError) for what a person can correct, OSError where files cannot be read.
    """
    kind, root, part = *_resolve(kind, root, max_rows, storage), Part(split, config, layout_rule)
    rows: _Rows = {"max_rows": max_rows, "index": index}
    if kind == "packed":
        return open_packed(root, part, **rows, on_progress=on_progress, storage=storage, rules=rules)
    rules = rules or (PixelRules() if index is None else index.rules)
    seen: _Seen = {**rows, "on_progress": on_progress, "rules": rules}
    if kind in SCANNED_KINDS:
        dataset = _open_scanned(kind, root, part, seen, storage)
        asked = question(split, config=config, layout_rule=layout_rule, max_rows=max_rows)
        known = dataset.index.asked == asked
        return dataset if known else replace(dataset, index=replace(dataset.index, asked=asked))
    if kind == "parquet" or (kind in KINDS and _is_hub_folder(cifar_root(KINDS[kind], root, download=download))):
        return open_parquet(root, part, **seen, spread=kind not in KINDS)
    if kind == "demo":
        dataset = _open_demo(_of_two(part, "demo"), max_rows, index, None if storage is None else storage.cache)
    else:
        dataset = open_cifar(KINDS[kind], cifar_root(KINDS[kind], root, download=download), _of_two(part, kind), **rows)
    return replace(dataset, index=replace(dataset.index, rules=rules))  # pixels that are no files obey any rules


def question(split: str, *, config: str | None, layout_rule: int, max_rows: int | None) -> str:
    """Return which images are asked for, wherever they lie: a saved index answers the same question only."""
    return f"split {split!r}, configuration {config!r}, layout rule {layout_rule}, at most {max_rows} rows"


def _open_scanned(kind: str, root: str | None, part: Part, seen: _Seen, storage: Storage | None) -> Dataset:
    if kind == "webdataset":
        return open_webdataset(root, part, **seen, storage=storage)
    if root is not None and is_remote(root):
        return open_objects(root, part, **seen, storage=storage)
    return open_folder(root, part, **seen)


def list_images(
    kind: str,
    root: str | None,
    split: str,
    *,
    config: str | None = None,
    layout_rule: int = RULE,
    max_rows: int | None = None,
    download: bool = False,
    storage: Storage | None = None,
) -> SourceImages:
    """Return the images of a split with a reader of their encoded bytes, and what their digest covers.

    No image is looked at, so sizes in pixels are 0 and damage is unknown; the digest of parquet files, which covers the
    images' bytes, is empty. Images that the source holds decoded are read as PNG. Arguments and errors as
    `open_dataset`; what the digest covers is one of `shards.DIGESTS`.
    """
    kind, root, part = *_resolve(kind, root, max_rows, storage), Part(split, config, layout_rule)
    if kind == "packed":
        manifest, source = open_manifest(root, split, storage)
        manifest = manifest.chosen(max_rows, part.rule)
        places = manifest.shard_N, manifest.offset_N, manifest.length_N
        read = ShardReader(source, *places, manifest.checksum_N, compares=True)
        return SourceImages(manifest.index, read, manifest.digest_of)
    if kind == "webdataset":
        return SourceImages(*list_webdataset(root, part, max_rows=max_rows, storage=storage), "list")
    if kind == "folder" and root is not None and is_remote(root):
        return SourceImages(*list_objects(root, part, max_rows=max_rows, storage=storage), "list")
    if kind == "folder":
        return SourceImages(*list_folder(root, part, max_rows=max_rows), "list")
    if kind == "parquet" or (kind in KINDS and _is_hub_folder(cifar_root(KINDS[kind], root, download=download))):
        return SourceImages(*list_parquet(root, part, max_rows=max_rows, spread=kind not in KINDS), "checksums")
    dataset = open_dataset(kind, root, split, config=config, max_rows=max_rows, download=download)
    assert dataset.pixels_NHWC is not None
    return SourceImages(dataset.index, PixelsReader(dataset.pixels_NHWC), "pixels")


def kind_of(kind: str, root: str | None, storage: Storage | None = None) -> str:
    """Return the kind of the images: "auto" found out, any other as it is. Arguments and errors as `open_dataset`."""
    return _resolve(kind, root, None, storage)[0]


def _of_two(part: Part, kind: str) -> str:
    """Return "train" or "test", all that some kinds have. Raises NoSplit for another name."""
    if not part.kinds or part.config is not None:
        asked = f"configuration {part.config!r}" if part.kinds else f"split {part.split!r}"
        raise NoSplit(f"{kind}: found {asked}, expected the split train or test; {kind} has no others")
    return "test" if "val" in part.kinds else "train"


class _Rows(TypedDict):
    max_rows: int | None
    index: DatasetIndex | None


class _Seen(_Rows):
    on_progress: Progress | None
    rules: PixelRules


def _resolve(kind: str, root: str | None, max_rows: int | None, storage: Storage | None) -> tuple[str, str | None]:
    """Check what was asked; return the kind, "auto" found out, and the root, a path without file://."""
    if kind not in SOURCE_KINDS:
        raise DatasetError(f"kind of data: found {kind!r}, expected one of {', '.join(SOURCE_KINDS)}")
    if max_rows is not None and max_rows < 1:
        raise DatasetError(f"max_rows: found {max_rows}, expected at least 1, or None for all rows")
    if root is not None and is_remote(root):
        if kind == "auto":
            return _recognise_remote(root, storage), root
        if kind not in REMOTE_KINDS:
            raise DatasetError(
                f"data root {root}, kind {kind!r}: expected one of {', '.join(REMOTE_KINDS)} at a URI; copy the data "
                "to a folder, or pack it there"
            )
        return kind, root
    root = None if root is None else local_path(root)
    kind = recognise(root) if kind == "auto" else kind
    if kind == "demo" and root is not None:
        raise DatasetError(
            f"kind of data 'demo': found data root {root}, expected none, since code makes those images; leave it "
            "out, or name another kind ('auto' recognises what the root holds) or recipe"
        )
    return kind, root


def _recognise_remote(root: str, storage: Storage | None) -> str:
    objects = require_storage(root, storage)
    for name in (*SPLITS, "val"):
        with contextlib.suppress(FileNotFoundError):
            objects.size(f"{name}/{MANIFEST}")
            return "packed"
    keys = [key for key, _ in objects.list_sizes()]
    if any(key.count("/") == 1 and key.endswith(f"/{MANIFEST}") for key in keys):
        return "packed"
    require_whole(root, _SPLIT_FOLDERS, set(keys).__contains__)
    if not keys:
        raise DatasetError(f"data root {root}: found no objects; correct the URI, or put images there")
    for kind, extensions in (("folder", EXTENSIONS), ("webdataset", {".tar"})):  # in the order of `recognise`
        if any(is_listed(key, extensions) for key in keys):
            return kind
    raise DatasetError(
        f"no images in {root}: found {', '.join(keys[:8])}; expected packed images ({MANIFEST}), tars or image files"
    )


def require_root(kind: str, root: str, *, download: bool = False) -> None:
    """Raise DatasetError where the data root is not there or cannot be read; download as in `open_dataset`."""
    if kind in KINDS:
        cifar_root(KINDS[kind], root, download=download)
    elif not is_remote(root):
        existing_root(local_path(root), kind, Path.exists)


def recognise(root: str | None) -> str:
    """Return the kind of data that `root` holds; "demo" for None. Raises DatasetError where it is none of them."""
    if root is None:
        return "demo"
    path = existing_root(root, "auto", Path.exists)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return "parquet"
        raise DatasetError(
            f"data root {path}: found a file, expected a folder or a .parquet file. Name the folder that holds it; one "
            f"of several tars there is chosen by --data.train_split {path.name}"
        )
    if is_packed(path):
        return "packed"
    require_whole(str(path), _SPLIT_FOLDERS, lambda key: (path / key).is_file())
    for kind, cifar in KINDS.items():
        for folder in (path, path / cifar.folder):
            if any((folder / names[0]).is_file() for names in cifar.files.values()):
                return kind
    # The usual places first: a hub repository may hold pictures for its README, an image folder a saved index.
    if _is_hub_folder(path):
        return "parquet"
    if list_files(path, path, EXTENSIONS, first_only=True):
        return "folder"
    if list_files(path, path, {".tar"}, first_only=True):
        return "webdataset"
    if list_files(path, path, {".parquet"}, first_only=True):
        return "parquet"
    raise _unknown(path)


def _is_hub_folder(path: Path) -> bool:
    """Whether parquet files lie where hubs put them, with a split and a number in their names: root or root/data."""
    return any(_HUB_NAME.search(file.name) for folder in (path, path / "data") for file in folder.glob("*.parquet"))


def _unknown(path: Path) -> DatasetError:
    pickled = [cifar.pickled_folder for cifar in KINDS.values() if (path / cifar.pickled_folder).is_dir()]
    advice = "Name the folder that holds the images"
    if pickled:
        advice = f"{pickled[0]} is the pickled form of CIFAR, which is never read: it can run code. Use the binary form"
    return DatasetError(
        f"no images in {path}: found {contents(path)}; expected image files (in class folders or not), parquet files "
        f"with an image column, or {' or '.join(cifar.folder for cifar in KINDS.values())}. {advice}"
    )


def _open_demo(split: str, max_rows: int | None, index: DatasetIndex | None, cache: ShardCache | None) -> Dataset:
    from dataloading.demo import CLASS_NAMES, demo_images, kept_demo_images

    pixels_NHWC, labels_N = demo_images(split) if cache is None else kept_demo_images(split, cache)
    pixels_NHWC, labels_N = pixels_NHWC[:max_rows], labels_N[:max_rows]
    names = (f"{split}/{row}" for row in range(len(labels_N)))
    dataset = dataset_of_pixels(f"demo ({split})", pixels_NHWC, labels_N, CLASS_NAMES, names)
    require_same("the list of demo images", index, dataset.index)
    return dataset
