"""Which kinds of values our JSON documents hold.

A checksum says that a document is what was written, not that it was written in good faith: whatever is read is looked
at before anything is done with it, however odd or deep it is.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LARGEST = 2**62
_MOST_DIMENSIONS = 16
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Kind:
    """A kind of values: what it is called, and whether a value is of it."""

    name: str
    fits: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)  # pyright: ignore


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


WHOLE = Kind("a whole number from 0 to 2^62", _is_whole)
NUMBER = Kind("a finite number", _is_number)
TEXT = Kind("a text", _is_text)
FLAG = Kind("true or false", lambda value: type(value) is bool)
MAPPING = Kind("names and values", lambda value: isinstance(value, dict))
MAPPINGS = Kind(
    "a list of names and values", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value)
)
TEXTS = Kind("texts by name", lambda value: isinstance(value, dict) and all(map(_is_text, value.values())))
NUMBERS = Kind("finite numbers by name", lambda value: isinstance(value, dict) and all(map(_is_number, value.values())))
SHAPE = Kind(
    "a list of whole numbers",
    lambda value: isinstance(value, list) and len(value) <= _MOST_DIMENSIONS and all(map(_is_whole, value)),
)
PAIR = Kind("two whole numbers", _is_pair)
ID_OR_NONE = Kind("an attempt and a step, or none", lambda value: value is None or _is_pair(value))
IDS = Kind(
    "a list of pairs of an attempt and a step", lambda value: isinstance(value, list) and all(map(_is_pair, value))
)


def require_kinds(document: object, kinds: Mapping[str, Kind], where: str) -> None:
    """Raise ValueError, naming `where`, unless a document is an object whose fields, those that it has, are of these
    kinds. Fields without a kind are left to who reads them.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{where}: found {_SHORT.repr(document)}, expected {MAPPING.name}")
    for name, kind in kinds.items():
        if name in document and not kind.fits(document[name]):
            raise ValueError(f"{where}: {name}: found {_SHORT.repr(document[name])}, expected {kind.name}")


def check_json(value: object, where: str) -> None:
    """Raise ValueError, naming the place, unless `value` reads back from JSON as it is.

    Refused are infinities and NaN, which JSON lacks, and tuples and keys that are not strings, which it changes.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: found the key {key!r}, expected a string")
            check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            check_json(item, f"{where}[{place}]")
    elif not isinstance(value, bool | int | float | str | None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(f"{where}: found {value!r}, expected JSON: a finite number, a string, a list, a dict or None")
