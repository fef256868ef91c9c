"""The layouts as versions without `data.layout_rule` read them: runs that were begun by those keep their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
_ALL = tuple(name for names in SPLIT_NAMES.values() for name in names)


def choose_split(here: Sequence[str], split: str, holds_images: Callable[[str], bool]) -> tuple[str, list[str]] | None:
    """Return the folder of a split ("": the root itself) and the folders of all splits; None where there is none."""
    splits = [name for name in _ALL if name in here]
    others = [name for name in here if name not in splits]
    is_class = len(splits) == 1 and bool(others) and all(map(holds_images, (*splits, *others)))
    if not splits or is_class:
        return ("", []) if split == "train" else None
    return next(((name, splits) for name in SPLIT_NAMES.get(split, ()) if name in splits), None)


def files_of_split(names: Sequence[str], split: str, *, only_one_unnamed: bool) -> list[str]:
    """Return the files of a split; those that name none are "train". only_one_unnamed: where there is just one."""
    for split_name in SPLIT_NAMES.get(split, ()):
        if mine := [name for name in names if _is_of(name, split_name)]:
            return mine
    if split != "train" or any(_is_of(name, other) for name in names for other in _ALL):
        return []
    return [] if only_one_unnamed and len(names) != 1 else list(names)


def _is_of(name: str, split_name: str) -> bool:
    path = PurePosixPath(name)
    return path.stem == split_name or path.name.startswith(f"{split_name}-") or path.parent.name == split_name
