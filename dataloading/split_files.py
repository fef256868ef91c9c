"""Which tars or parquet files belong to a split and a configuration, by their names alone (README.md has the rule)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dataloading import layout_before
from dataloading.index import NoSplit
from dataloading.layout import (
    CONFIG_OPTION,
    AmbiguousLayout,
    Part,
    kinds_in,
    pieces,
    place_among,
    set_words,
    split_kind,
    without_place,
    years_in,
)
from dataloading.notes import LEFT_OUT, TAKEN, Note, some, unused

_ENDINGS = re.compile(r"(\.(snappy|gz|gzip|zstd|zst|lz4|brotli|br))?\.(tar|parquet)$", re.IGNORECASE)
_HASH = re.compile(r"(?=[a-f]*\d)[0-9a-f]{8,}", re.IGNORECASE)


@dataclass(frozen=True)
class FilesChoice:
    """Files that answer to a split."""

    names: tuple[str, ...]
    notes: tuple[Note, ...]


def choose_files(names: Sequence[str], part: Part, *, where: str, what: str) -> list[FilesChoice]:
    """Return the files that answer to a split, the likeliest first; those of "val" follow those of "test".

    names: paths below the data root. what: "tars" or "parquet files". Raises NoSplit where none does, and
    AmbiguousLayout where the names can be read in two ways.
    """
    names = sorted(names)
    if part.rule == 1:
        found = layout_before.files_of_split(names, part.split, only_one_unnamed=what != "tars")
        candidates = [found] if found else []
    elif part.kinds:
        candidates = _by_kind(names, part, where, what)
    else:
        candidates = [found] if (found := [name for name in names if _answers(name, part)]) else []
    if not candidates:
        raise NoSplit(
            f"no {part.split} split in {where}: found {some(names)}; expected {what} with the word {part.split!r} in "
            f"their names or folders{', or with one that means the same' * bool(part.kinds)}. Name the split: "
            f"{part.option}"
        )
    return [_choice(names, found, part, where, what) for found in candidates]


def _by_kind(names: list[str], part: Part, where: str, what: str) -> list[list[str]]:
    kinds_of = {name: _kinds(name) for name in names}
    candidates = [
        found for kind in part.kinds if (found := [name for name in names if kinds_of[name] == frozenset((kind,))])
    ]
    double = [name for name in names if len(kinds_of[name]) > 1 and kinds_of[name] & set(part.kinds)]
    if double:
        raise AmbiguousLayout(
            f"{where}: found {what} whose names say two splits: {some(double)}; expected one in each name. Rename "
            f"them, or name the split: {part.option}"
        )
    if not candidates and part.kinds == ("train",) and not any(kinds_of.values()):
        return [names] if names else []
    # Of two spellings, such as valid-0 and validation-0, the one that was asked for counts.
    for place, found in enumerate(candidates):
        spelt = [name for name in found if part.split.lower() in map(str.lower, _all_pieces(name))]
        words = {frozenset(filter(split_kind, map(str.lower, _all_pieces(name)))) for name in found}
        if spelt and len(words) > 1:
            candidates[place] = spelt
    return candidates


def _kinds(name: str) -> frozenset[str]:
    """Return the splits that a file's name says, else those of the nearest folder that says one."""
    *folders, stem = _parts(name)
    nearest = next((kinds for part in (stem, *reversed(folders)) if (kinds := kinds_in(part))), frozenset())
    return nearest | {kind for folder in folders if (kind := split_kind(folder))}


def _parts(name: str) -> list[str]:
    """Return the folders of a path and the file's name without its endings (`.tar`, `.snappy.parquet`)."""
    *folders, last = name.split("/")
    return [*folders, _ENDINGS.sub("", last)]


def _all_pieces(name: str) -> list[str]:
    return [piece for part in _parts(name) for piece in pieces(part)]


def _answers(name: str, part: Part) -> bool:
    """Whether a file answers to a name of the user's own: a path, a pattern, a folder, or words in the file's name."""
    asked, lower = (part.path if part.path is not None else part.split).lower(), name.lower()
    if any(sign in asked for sign in "*?["):
        return fnmatch.fnmatchcase(lower, asked) or fnmatch.fnmatchcase(lower.rpartition("/")[2], asked)
    if part.path is not None:
        return not asked or lower == asked or lower.startswith((f"{asked}/", f"{asked}.", f"{asked}-"))
    parts = _parts(lower)
    return asked in parts or asked == lower or any(_holds_run(pieces(p), pieces(asked)) for p in parts)


def _holds_run(words: list[str], run: list[str]) -> bool:
    return bool(run) and any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def _choice(names: list[str], found: list[str], part: Part, where: str, what: str) -> FilesChoice:
    if part.rule == 1:
        return FilesChoice(tuple(found), ())
    everything = part.config == "." or part.path == ""
    kept = found if everything else _of_config(found, part, where, what)
    about = () if everything else _require_one_numbering(kept, part, where, what)
    left = sorted(set(names) - set(kept))
    shown = f"{kept[0]} to {kept[-1]}" if len(kept) > 1 else kept[0]
    singular = what if len(kept) > 1 else what.removesuffix("s")
    taken = Note(TAKEN, f"from {len(kept):,} {singular}: {shown}", len(kept))
    rest = unused(left, what if len(left) > 1 else what.removesuffix("s"))
    return FilesChoice(tuple(kept), (taken, *rest, *about))


def _of_config(found: list[str], part: Part, where: str, what: str) -> list[str]:
    with_years = all(years_in(_parts(name)[-1]) for name in found)
    configs: dict[str, list[str]] = {}
    for name in found:
        configs.setdefault(_config(name, with_years), []).append(name)
    if part.config is not None:
        asked = part.config.lower().strip("/")
        kept = [name for config, files in configs.items() if _is_config(config, asked) for name in files]
        if not kept:
            raise NoSplit(
                f"no configuration {part.config!r} in {where}: found {some([c or '(no name)' for c in configs])}; "
                f"expected one of them. Name it: {CONFIG_OPTION}"
            )
        return kept
    if len(configs) > 1:
        shown = [f"{config or '(no name)'} ({files[0]})" for config, files in configs.items()]
        raise AmbiguousLayout(
            f"{where}: found {what} of {len(configs)} configurations: {some(shown)}; expected those of one data set. "
            f'Name one, or "." for all together: {CONFIG_OPTION}'
        )
    return found


def _require_one_numbering(kept: list[str], part: Part, where: str, what: str) -> tuple[Note, ...]:
    """Return a note on files that are missing by the numbers in the names (train-00001-of-00004).

    Raises AmbiguousLayout where one set is there twice, in other numbers of files.
    """
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in kept:
        *folders, stem = _parts(name)
        words = (word for word in pieces(without_place(stem)) if not _HASH.fullmatch(word))
        sets.setdefault((*folders, *words), []).append(name)
    missing, shown = 0, ""
    for files in sets.values():
        places = [place_among(_parts(name)[-1]) for name in files]
        totals = {place and place[1] for place in places}
        if totals == {None}:
            continue
        if len(totals) > 1 or len(set(places)) < len(places):
            raise AmbiguousLayout(
                f"{where}: found {what} of one name that are numbered in more than one way: {some(files)}; they may "
                "hold the same images twice. Remove those that are old, or name one file, or several by a pattern "
                f"such as '*-of-00002*': {part.option}"
            )
        (total,) = totals
        if total is not None and (left := total - len(files)) > 0:
            missing, shown = missing + left, shown or f"{len(files):,} of {total:,} such as {files[0]}"
    if not missing:
        return ()
    singular = what if missing > 1 else what.removesuffix("s")
    return (Note(LEFT_OUT, f"{missing:,} {singular} missing by the numbers in the names: found {shown}", missing),)


def _config(name: str, with_years: bool) -> str:
    """Return the configuration of a file: the folders above that of the split, and what else its name says."""
    *folders, stem = _parts(name)
    at = next((i for i in range(len(folders)) if kinds_in(folders[i])), len(folders))
    if at < len(folders):
        folders[at:] = ["-".join(set_words(folders[at]))] if set_words(folders[at]) else []
    elif not kinds_in(stem):
        return "/".join([*folders, " ".join(set_words(stem))]).strip("/")
    words = (*set_words(stem), *(years_in(stem) if with_years else ()))
    return "/".join([*folders, " ".join(words)]).strip("/")


def _is_config(config: str, asked: str) -> bool:
    """Whether a configuration is meant: all of its name, or some of its folders or words."""
    lower = config.lower()
    return asked == lower or f"/{asked}/" in f"/{lower}/" or _holds_run(pieces(lower), pieces(asked))
