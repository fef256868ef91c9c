"""Which folder is a split, where images lie in folders or under keys: the rule of README.md, on names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from dataloading import layout_before
from dataloading.index import NoSplit
from dataloading.layout import CONFIG_OPTION, AmbiguousLayout, Part, begins_like, kinds_in, numbered_kind, split_kind
from dataloading.notes import TAKEN, Note, some, unused

_MAX_DEPTH = 6


class Tree(Protocol):
    """The folders of a data root, by their paths below it; "" is the root."""

    def folders(self, at: str) -> list[str]:
        """Return the names of the folders directly in `at`, sorted."""
        ...

    def holds_images(self, at: str) -> bool:
        """Whether images lie directly in `at`."""
        ...

    def holds_images_below(self, at: str) -> bool:
        """Whether images lie in `at` or anywhere below it."""
        ...

    def image_folders(self) -> Iterable[str]:
        """Return the paths of all folders in which images lie directly."""
        ...


class NamedTree:
    """A tree of which all folders with images are known by their paths."""

    def __init__(self, image_folders: Iterable[str]) -> None:
        self._images = frozenset(image_folders)

    @cached_property
    def _below(self) -> dict[str, set[str]]:
        below: dict[str, set[str]] = {"": set()}
        for path in self._images:
            at = ""
            for name in path.split("/") if path else ():
                below.setdefault(at, set()).add(name)
                at = join(at, name)
                below.setdefault(at, set())
        return below

    def folders(self, at: str) -> list[str]:
        return sorted(self._below.get(at, ()))

    def holds_images(self, at: str) -> bool:
        return at in self._images

    def holds_images_below(self, at: str) -> bool:
        return at in self._below

    def image_folders(self) -> Iterable[str]:
        return self._images


@dataclass(frozen=True)
class FolderChoice:
    """A folder that answers to a split."""

    base: str
    """Its path below the root, "" for the root itself."""
    others: tuple[str, ...] = ()
    """Those of the other splits, in which classes are looked for too, so that a class has one number in all."""
    notes: tuple[Note, ...] = ()
    is_literal: bool = False
    """Whether a person named the place: what lies there is taken as it lies, folders of years as classes."""


@dataclass(frozen=True)
class _Level:
    """What the folders at one place say of splits."""

    at: str
    kind_of: dict[str, str]
    """Kind of each folder that is a split, by its name."""
    beside: list[str]
    """The other folders."""
    doubt: str = ""
    """Why it is not clear that they are splits."""


def choose_folder(tree: Tree, part: Part, *, where: str) -> list[FolderChoice]:
    """Return the folders that answer to a split, the likeliest first; that of "val" follows that of "test".

    Raises NoSplit where none does, and AmbiguousLayout where the names can be read in two ways.
    """
    if part.rule == 1:
        return [_choice_before(tree, part, where)]
    if part.path is not None:
        return [_literal(tree, part, where)]
    level, named = _level(tree, part, where)
    if level is None:
        if part.kinds != ("train",):
            raise _no_split(tree, part, where)
        _require_no_likeness(tree, where)
        return [FolderChoice("", notes=(Note(TAKEN, "all that is there: no folder is a split"),))]
    found = [named] if named else _of_kinds(tree, level, part, where)
    if not found:
        raise _no_split(tree, part, where)
    return [_choice(tree, level, name, part) for name in found]


def _of_kinds(tree: Tree, level: _Level, part: Part, where: str) -> list[str]:
    found = []
    for kind in part.kinds:
        names = [name for name in level.kind_of if level.kind_of[name] == kind]
        names = [name for name in names if tree.holds_images_below(join(level.at, name))] or names
        spelt = [name for name in names if name == part.split] or [n for n in names if n.lower() == part.split.lower()]
        if len(spelt or names) > 1:
            raise AmbiguousLayout(
                f"{join(where, level.at)}: found {len(names)} folders for the {part.split} split: {some(names)}; "
                f"expected one. Name it: {part.option}"
            )
        found += spelt or names
    return [name for name in found if tree.holds_images_below(join(level.at, name))] or found


def _choice(tree: Tree, level: _Level, name: str, part: Part) -> FolderChoice:
    base = _unwrapped(tree, join(level.at, name))
    others = tuple(_unwrapped(tree, join(level.at, other)) for other in level.kind_of if other != name)
    beside = [join(level.at, other) for other in level.beside if other not in (name, *level.kind_of)]
    beside = [path for path in (*_beside_path(tree, level.at), *beside) if tree.holds_images_below(path)]
    taken = Note(TAKEN, f"from the folder {base}" + (f"; other splits: {some(others)}" if others else ""))
    return FolderChoice(base, others, (taken, *unused(beside, "folders" if len(beside) > 1 else "folder")))


def _unwrapped(tree: Tree, base: str) -> str:
    """Return a split's folder, or the one of the same split that holds all that is in it, as archives unpack."""
    while not tree.holds_images(base):
        inner = [name for name in tree.folders(base) if tree.holds_images_below(join(base, name))]
        kinds = kinds_in(base.rpartition("/")[2])
        if len(inner) != 1 or not kinds or kinds_in(inner[0]) != kinds:
            break
        base = join(base, inner[0])
    return base


def _beside_path(tree: Tree, at: str) -> list[str]:
    """Return the folders that lie beside those on the way from the root to a place."""
    found, above = [], ""
    for name in at.split("/") if at else ():
        found += [join(above, other) for other in tree.folders(above) if other != name]
        above = join(above, name)
    return found


def _require_no_likeness(tree: Tree, where: str) -> None:
    """Raise AmbiguousLayout where all folders begin with words of splits and none is one: Testdaten, traindir."""
    at, names = "", tree.folders("")
    while len(names) == 1 and not tree.holds_images(at):
        at, names = join(at, names[0]), tree.folders(join(at, names[0]))
    names = [name for name in names if tree.holds_images_below(join(at, name))]
    kinds = [begins_like(name) for name in names]
    if None not in kinds and len(set(kinds)) > 1:
        raise AmbiguousLayout(
            f"{join(where, at)}: found the folders {some(names)}, whose names begin like those of splits: splits, or "
            f"classes? {_either(names[_first_train(kinds)])}"
        )


def _literal(tree: Tree, part: Part, where: str) -> FolderChoice:
    assert part.path is not None
    if not tree.holds_images_below(part.path):
        raise NoSplit(f"no images in {join(where, part.path)}: expected them there, as the split {part.split!r} says")
    note = Note(TAKEN, f"all below {part.path or 'the data root'}, as it was named")
    return FolderChoice(part.path, notes=(note,), is_literal=True)


def _level(tree: Tree, part: Part, where: str) -> tuple[_Level | None, str]:
    """Return the place where the splits lie, and the folder there of a name of the user's own ("" for a word)."""
    if part.config in (None, "."):
        named = _own_name(tree.folders(""), part)
        top = _splits_at(tree, "")
        if top is not None and top.doubt and not named:
            raise AmbiguousLayout(f"{where}: {top.doubt}")
        if named:
            return top or _Level("", {}, tree.folders("")), named
        if top is not None and (part.kinds or not _below(tree, part)):
            return top, ""
    found = _below(tree, part)
    if part.config not in (None, "."):
        asked = part.config.lower().strip("/")
        found = [item for item in found if f"/{asked}/" in f"/{item[0].at.lower()}/"]
        if not found:
            raise NoSplit(
                f"no configuration {part.config!r} in {where}: found {some(tree.folders(''))}; expected a folder of "
                f"that name with the splits in it. Name it: {CONFIG_OPTION}"
            )
    if len(found) > 1:
        raise AmbiguousLayout(
            f"{where}: found splits in {len(found)} folders: {some([level.at for level, _ in found])}; expected those "
            f'of one data set. Name one: {CONFIG_OPTION}. For all images, splits or not: --data.train_split "."'
        )
    if found and found[0][0].doubt:
        raise AmbiguousLayout(f"{where}: {found[0][0].doubt}")
    return found[0] if found else (None, "")


def _own_name(names: Sequence[str], part: Part) -> str:
    """Return the folder of a name that is no split's word, "" where there is none; its own spelling comes first."""
    if part.kinds:
        return ""
    lower = [name for name in names if name.lower() == part.split.lower()]
    return part.split if part.split in names else lower[0] if len(lower) == 1 else ""


def _below(tree: Tree, part: Part) -> list[tuple[_Level, str]]:
    """Return the places below the root where splits lie, none below another: each is a data set of its own."""
    known = NamedTree(tree.image_folders())
    found: list[tuple[_Level, str]] = []
    waiting = known.folders("")
    while waiting:
        at = waiting.pop(0)
        level, named = _splits_at(known, at), _own_name(known.folders(at), part)
        if named:
            found.append((level or _Level(at, {}, known.folders(at)), named))
        elif level is not None and part.kinds:
            found.append((level, ""))
        elif at.count("/") + 1 < _MAX_DEPTH:
            waiting += [join(at, name) for name in known.folders(at)]
    if not part.kinds:
        return found
    # A class may hold a folder called train; two splits side by side, or nothing but splits, are no chance.
    several = [item for item in found if len(set(item[0].kind_of.values())) > 1]
    if several:
        return [item for item in found if item in several or any(map(split_kind, item[0].kind_of))]
    splits = tuple(f"{join(level.at, name)}/" for level, _ in found for name in level.kind_of)
    return found if all(f"{path}/".startswith(splits) for path in known.image_folders()) else []


def _splits_at(tree: Tree, at: str) -> _Level | None:
    """Return what the folders in `at` say of splits; None where they say nothing."""
    here = tree.folders(at)
    whole = {name: kind for name in here if (kind := numbered_kind(name))}
    kinds = {name: kinds_in(name) for name in here}
    plain = [name for name in here if not kinds[name] and tree.holds_images_below(join(at, name))]
    if plain:  # then a folder called eval that holds no images is no sign of splits
        whole = {name: whole[name] for name in whole if tree.holds_images_below(join(at, name))}
    if whole:
        beside = [name for name in here if name not in whole]
        doubt = ""
        if len(whole) == 1 and plain and all(tree.holds_images(join(at, name)) for name in (*whole, *plain)):
            (name,) = whole
            doubt = (
                f"found the folder {name} beside {some(plain)}, all with images directly in them: a split, or one of "
                f'the classes? Classes: --data.train_split "." ; the split alone: --data.train_split ./{join(at, name)}'
            )
        return _Level(at, whole, beside, doubt)
    said = {name: next(iter(found)) for name, found in kinds.items() if len(found) == 1}
    said = {name: said[name] for name in said if tree.holds_images_below(join(at, name))}
    if not said or (plain and len(set(said.values())) == 1):
        return None
    doubt = ""
    if plain:
        doubt = (
            f"found the folders {some(list(said))}, named like splits, beside {some(plain)}: splits, or classes? "
            + _either(list(said)[_first_train(list(said.values()))])
        )
    return _Level(at, said, [name for name in here if name not in said], doubt)


def _first_train(kinds: Sequence[str | None]) -> int:
    return kinds.index("train") if "train" in kinds else 0


def _either(split: str) -> str:
    """Return the options that decide whether folders are splits or classes."""
    name = split if re.fullmatch(r"[\w.-]+", split) else f'"{split}"'
    return f'Classes: --data.train_split "." ; splits: --data.train_split {name}, and --data.test_split for the other'


def _choice_before(tree: Tree, part: Part, where: str) -> FolderChoice:
    found = layout_before.choose_split(tree.folders(""), part.split, tree.holds_images)
    if found is None:
        raise _no_split(tree, part, where)
    base, splits = found
    return FolderChoice(base, tuple(name for name in splits if name != base), is_literal=True)


def _no_split(tree: Tree, part: Part, where: str) -> NoSplit:
    synonyms = ", or a word that means the same" if part.kinds else ""
    everything = (
        '. For all images, with the folders as classes: --data.train_split "."' if part.kinds == ("train",) else ""
    )
    return NoSplit(
        f"no {part.split} split in {where}: found {some(tree.folders(''))}; expected a folder called {part.split}"
        f"{synonyms}. Add it, or name the split: {part.option}{everything}"
    )


def join(at: str, name: str) -> str:
    """Return the path of what lies in a folder; "" is the root."""
    return f"{at.rstrip('/')}/{name}" if at and name else at or name
