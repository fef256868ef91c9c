"""Which files lie under a data root: in a fixed order, without hidden ones, and never outside of the root."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from heapq import heappop, heappush
from pathlib import Path

from dataloading.index import DatasetError
from dataloading.notes import HIDDEN, HIDDEN_FOLDERS, NO_FILE, ending_of


def list_files(
    base: Path,
    root: Path,
    extensions: Collection[str],
    *,
    first_only: bool = False,
    left_out: Counter[str] | None = None,
    every_path: bool = False,
) -> list[tuple[str, int]]:
    """Return (path relative to `base`, bytes) of the files under `base`, sorted by path; parts joined by "/".

    Hidden files and folders are left out, and whatever is not a regular file. A link is followed while it stays under
    `root`. Raises DatasetError for a link that leaves the root. first_only: stop at the first file found. left_out:
    counts what is not listed, by `notes.ending_of`.

    Each folder is listed once, under its own path where that is below `base`, else under the first link to it: folders
    that link to each other have more paths than can be walked. every_path: under each of its paths, as older versions
    did.
    """
    found: list[tuple[str, int]] = []
    real_root = root.resolve()
    check_link(base, real_root)
    seen: set[Path] = set()
    waiting, links = [("", base, frozenset[Path]())], list[tuple[str, Path, frozenset[Path]]]()
    while waiting or links:
        prefix, folder, above = waiting.pop() if waiting else heappop(links)
        real = folder.resolve()
        if real in (above if every_path else seen):
            continue
        seen.add(real)
        above |= {real}
        with os.scandir(folder) as entries:
            for entry in entries:
                is_wanted, is_folder = has_ending(entry.name, extensions), _leads_to(entry.is_dir)
                if entry.name.startswith(".") or not (is_wanted or is_folder):
                    if left_out is not None and (kind := _left_out_as(entry.name, is_folder, extensions)):
                        left_out[kind] += 1
                    continue
                if entry.is_symlink():
                    check_link(Path(entry.path), real_root)
                if is_folder:
                    later = (f"{prefix}{entry.name}/", Path(entry.path), above)
                    if entry.is_symlink() and not every_path:
                        heappush(links, later)
                    else:
                        waiting.append(later)
                elif _leads_to(entry.is_file):
                    found.append((prefix + entry.name, entry.stat().st_size))
                    if first_only:
                        return found
                elif left_out is not None:
                    left_out[NO_FILE] += 1
    return sorted(found)


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False  # a loop of links, like a link to nothing
        raise


def _left_out_as(name: str, is_folder: bool, extensions: Collection[str]) -> str:
    """Return by what an entry that is not listed is counted; "" for the small files that systems leave everywhere."""
    if not name.startswith("."):
        return ending_of(name)
    return HIDDEN_FOLDERS if is_folder else HIDDEN if has_ending(name, extensions) else ""


def list_keys(
    sizes: list[tuple[str, int]], extensions: Collection[str], left_out: Counter[str]
) -> list[tuple[str, int]]:
    """Return what `list_files` would list, were objects' keys the paths of files; counts the others alike."""
    found = []
    for key, size in sizes:
        if is_listed(key, extensions):
            found.append((key, size))
        elif any(part.startswith(".") for part in key.split("/")[:-1]):
            left_out[HIDDEN] += 1
        elif not key.endswith("/") and (kind := _left_out_as(key.rpartition("/")[2], False, extensions)):
            left_out[kind] += 1
    return found


def is_listed(key: str, extensions: Collection[str]) -> bool:
    """Whether `list_files` would list an object's key, were it a file's path."""
    hidden = any(part.startswith(".") for part in key.split("/"))
    return not hidden and has_ending(key, extensions)


def has_ending(path: str, extensions: Collection[str]) -> bool:
    """Whether the last part of a path ends so (in any case), with something before it."""
    return os.path.splitext(path)[1].lower() in extensions


def check_links(folder: Path, root: Path) -> None:
    """Raise DatasetError where a folder, or anything directly in it, is a link that leaves the root."""
    real_root = root.resolve()
    check_link(folder, real_root)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                check_link(Path(entry.path), real_root)


def check_link(link: Path, real_root: Path) -> None:
    """Raise DatasetError where a path leads out of the root, whose real path `real_root` is."""
    try:
        target = link.resolve()
    except RuntimeError:
        return  # a loop of links leads nowhere, and nothing is read there
    if not target.is_relative_to(real_root):
        raise DatasetError(
            f"{link} is a link to {target}, which is outside the data root {real_root}: no path outside the data root "
            "is read. Copy the files into the root, or choose a root that holds both"
        )


def folders_in(path: Path) -> list[str]:
    """Return the names of the folders directly in `path`, sorted, without hidden ones."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def contents(path: Path, num_shown: int = 8) -> str:
    """Return a few names in `path` for an error message."""
    names = sorted(entry.name for entry in path.iterdir())
    return (", ".join(names[:num_shown]) + (", …" if len(names) > num_shown else "")) or "nothing"


def existing_root(
    root: str | None, kind: str, wanted: Callable[[Path], bool] = Path.is_dir, advice: str = "Correct the path"
) -> Path:
    """Return `root` as an absolute path; raises DatasetError, with `advice`, where it is not what is `wanted`."""
    if root is None:
        raise DatasetError(f"{kind}: found no data root, expected the path of the images; name it, or use kind 'demo'")
    path = Path(root).absolute()
    if not path.exists():
        parent = path.parent
        beside = contents(parent) if parent.is_dir() else f"no folder {parent} either"
        if "{" in path.name or "*" in path.name:
            pattern = _starred(path.name)
            advice = f"Name the folder, and files in it by a pattern with * alone: --data.train_split '{pattern}'"
        raise DatasetError(f"data root {path} does not exist; found beside it: {beside}. {advice}")
    if not wanted(path):
        raise DatasetError(f"data root {path} ({kind}): found a file, expected a folder; name the folder that holds it")
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise DatasetError(f"data root {path}: no permission to read it; check its owner and rights, or choose another")
    return path


def _starred(name: str) -> str:
    """Return a name with * for what a shell or WebDataset would expand in braces."""
    return re.sub(r"\{[^}]*\}", "*", name)
