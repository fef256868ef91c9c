"""Whole numbers in text that others wrote."""

from __future__ import annotations

import re

_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")


def whole_number(text: str | bytes) -> int:
    """Return the number that a text is, blanks around it left out. Raises ValueError for any other text.

    Digits alone count: Python's own `int` takes "1_0" for 10, and digits of every script.
    """
    shown = text.decode("ascii") if isinstance(text, bytes) else text
    digits = shown.strip(" \t\r\n\0")
    if not _WHOLE.fullmatch(digits):
        raise ValueError(f"found {shown[:40]!r}, expected a whole number")
    return int(digits)
