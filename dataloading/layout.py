"""Splits and configurations by their names: the words, and what a person may name. README.md states the rule.

Pure functions of names, the same for folders, objects, tars, parquet files and packed images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dataloading.index import DatasetError

RULE = 2
"""The rule of README.md. 1 is what versions without `data.layout_rule` did (`dataloading.layout_before`)."""
SPLITS = ("train", "test")
"""The splits that are looked for where nobody names one."""
WORDS = {
    "train": ("train", "training", "trainval"),
    "test": ("test", "testing", "eval", "evaluate", "evaluation"),
    "val": ("val", "valid", "validate", "validation", "dev"),
}
KIND_OF_WORD = {word: kind for kind, words in WORDS.items() for word in words}
_ASKED = {"train": ("train",), "test": ("test", "val"), "val": ("val",)}
_DATE = re.compile(r"(19|20)\d\d([-_. ]?(0[1-9]|1[0-2])([-_. ]?([0-2]\d|3[01]))?)?")
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_OF = re.compile(r"(?<!\d)(\d+)[-_. ]?of[-_. ]?(\d+)(?!\d)", re.IGNORECASE)
_COMPOUND = re.compile(rf"({'|'.join(KIND_OF_WORD)})(?:sets?|data|images?|imgs?|splits?)", re.IGNORECASE)
"""trainset, testdata: a word grown together with what says that it is a set."""
_NUMBERING = re.compile(r"(of|part|shard|chunk|file|[a-uw-z])?\d*|(?=[a-f]*\d)[0-9a-f]{8,}")
"""Parts of a file's name that count the files of one set or tell them apart, without naming another set."""


class AmbiguousLayout(DatasetError):
    """The names can be read in two ways; the message says which option decides."""


@dataclass(frozen=True)
class Part:
    """Which part of the images of a data root is meant."""

    split: str = "train"
    """A split's word, a name of the user's own, or a path: "." for all that is there, "./train" for what lies there."""
    config: str | None = None
    """Name of a configuration, "." for all of them together, None where there is only one."""
    rule: int = RULE

    def __post_init__(self) -> None:
        if not self.split.strip() or ".." in self.split.split("/") or self.split.startswith("/"):
            raise DatasetError(
                f"split: found {self.split!r}, expected a name such as train, test or val, or a path below the data "
                "root such as ./train"
            )
        if self.rule not in (1, RULE):
            raise DatasetError(f"layout rule: found {self.rule!r}, expected 1 or {RULE}; use the version that wrote it")

    @property
    def path(self) -> str | None:
        """The path that is meant, "" for the root itself; None for a name."""
        if self.split == ".":
            return ""
        return self.split.removeprefix("./").strip("/") if "/" in self.split else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of splits that answer to the name, the likeliest first; none for a name of the user's own."""
        kind = None if self.path is not None else KIND_OF_WORD.get(self.split.lower())
        return _ASKED[kind] if kind else ()

    @property
    def folder(self) -> str:
        """Name of the folder into which it is packed."""
        if re.search(r"[*?\[]|\.(tar|parquet)$", self.split, re.IGNORECASE):  # a pattern, or a file's name
            kinds = kinds_in(self.split)
            return next(iter(kinds)) if len(kinds) == 1 else "train"
        return ("train" if self.path == "" else (self.path or self.split)).rpartition("/")[2]

    @property
    def option(self) -> str:
        """The options that name the split."""
        options = {"train": "--data.train_split NAME", "test": "--data.test_split NAME"}
        sides = [options["train" if kind == "train" else "test"] for kind in self.kinds[:1]] or options.values()
        return f"{' or '.join(sides)} (index, pack and embed: --split NAME)"


CONFIG_OPTION = "--data.config NAME (index and pack: --config NAME)"


def split_kind(name: str) -> str | None:
    """Return the kind of split that a whole name says: "train", "test" or "val", in any case; None for other names."""
    return KIND_OF_WORD.get(name.lower())


def numbered_kind(name: str) -> str | None:
    """Return the kind of split that a name says with nothing but numbers beside: test1, val_256; None for others."""
    words = [word for piece in pieces(name) for word in _words(piece)]
    return KIND_OF_WORD.get(words[0].lower()) if len(words) == 1 else None


def place_among(stem: str) -> tuple[int, int] | None:
    """Return the number of a file and how many there are, where its name says both: train-00001-of-00004."""
    found = _OF.findall(stem)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def kinds_in(name: str) -> frozenset[str]:
    """Return the kinds of splits of which a word stands in a name: imagenet-val-000000, train2017, TrainImages."""
    kinds = (KIND_OF_WORD.get(word.lower()) for piece in pieces(name) for word in _words(piece))
    return frozenset(kind for kind in kinds if kind)


def without_place(stem: str) -> str:
    """Return a file's name without what `place_among` finds in it."""
    return _OF.sub("-", stem)


def pieces(name: str) -> list[str]:
    """Return the parts of a name between everything that is neither letter nor digit."""
    return [piece for piece in re.split(r"[\W_]+", name) if piece]


def _words(piece: str) -> list[str]:
    """Return the words of a piece: digits end a word, and so does a capital after a small letter."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+", piece)
    return [compound[1] if (compound := _COMPOUND.fullmatch(word)) else word for word in found]


def begins_like(name: str) -> str | None:
    """Return the kind of split with whose word a name begins, whatever follows: Trainingsdaten, traindir, valley."""
    lower = name.lower()
    return next((kind for word, kind in KIND_OF_WORD.items() if lower.startswith(word)), None)


def set_words(stem: str) -> tuple[str, ...]:
    """Return what a file's name says of the set that it belongs to: without splits and the numbers of files."""
    found = pieces(without_place(_UUID.sub("-", stem)))
    return tuple(p.lower() for p in found if not _NUMBERING.fullmatch(p.lower()) and not kinds_in(p))


def years_in(stem: str) -> tuple[str, ...]:
    """Return the numbers in a name that look like years: editions of a set, where every file of it has one."""
    return tuple(_YEAR.findall(stem))


def is_date(name: str) -> bool:
    """Whether a folder's name is a year, a month or a day, which is when images were made and not what they show."""
    return bool(_DATE.fullmatch(name))
