"""What is told once about a data set: what was taken for what, what is left out or unused, why there are no labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TAKEN, UNUSED, LEFT_OUT, LABELS = "taken", "unused", "left_out", "labels"
NO_ENDING, HIDDEN, HIDDEN_FOLDERS, NO_FILE = "without an ending", "hidden", "hidden folders", "broken links or no files"
_NUM_SHOWN = 8


@dataclass(frozen=True)
class Note:
    """One thing that a person should know, in words."""

    kind: str
    """TAKEN, UNUSED, LEFT_OUT or LABELS."""
    text: str
    count: int = 0
    """How many files, members, columns or rows it is about; 0 where there is nothing to count."""

    def to_plain(self) -> dict[str, Any]:
        """Return the note as JSON takes it."""
        return {"kind": self.kind, "count": self.count, "text": self.text}


def from_plain(notes: Iterable[dict[str, Any]]) -> tuple[Note, ...]:
    """Return what `Note.to_plain` gave, kept in the metadata of an index or a manifest."""
    return tuple(Note(str(note["kind"]), str(note["text"]), int(note["count"])) for note in notes)


def ending_of(name: str) -> str:
    """Return by what a file or member that is left out is counted: the ending of its name in lower case."""
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return HIDDEN
    stem, dot, ending = last.rpartition(".")
    return f".{ending.lower()}" if dot and stem and ending else NO_ENDING


def left_out(counts: Counter[str], what: str = "files") -> tuple[Note, ...]:
    """Return the note on what is no image, counted by `ending_of`: none where there is nothing."""
    if not (total := counts.total()):
        return ()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count:,} {name}" for name, count in ordered[:_NUM_SHOWN])
    rest = sum(count for _, count in ordered[_NUM_SHOWN:])
    more = f", {rest:,} of {len(ordered) - _NUM_SHOWN} other kinds" if rest else ""
    what = what if total != 1 else re.sub(r"s\b", "", what, count=1)
    return (Note(LEFT_OUT, f"{total:,} other {what} left out: {shown}{more}", total),)


def unused(names: Sequence[str], what: str) -> tuple[Note, ...]:
    """Return the note on files or folders that belong to another split or configuration, or to none."""
    if not names:
        return ()
    return (Note(UNUSED, f"{len(names):,} {what} not used: {some(names)}", len(names)),)


def loose(names: Sequence[str]) -> tuple[Note, ...]:
    """Return the note on images in the root itself, where splits are folders."""
    return unused(names, "images directly in the root" if len(names) > 1 else "image directly in the root")


def some(names: Sequence[str]) -> str:
    """Return a few names for a message."""
    return (", ".join(names[:_NUM_SHOWN]) + (", …" if len(names) > _NUM_SHOWN else "")) or "nothing"
