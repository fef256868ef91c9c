"""How many workers a run may have, and when their number changes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")


@dataclass(frozen=True, kw_only=True)
class WorkerRange:
    """From `least` to `most` workers; the same for a number that does not change."""

    least: int
    most: int
    start_settle_s: float = 10.0
    """At the first start: for how long no machine has come before fewer than `most` workers begin."""
    grow_settle_s: float = 60.0
    """For how long there has been room for more, and no more than that, before a running group makes place."""
    resize_interval_s: float = 600.0
    """From the start of a group until it may be asked to make place for a larger one, at least."""
    silence_s: float = 10.0
    """After which a machine of a running group that does not answer is taken for dead; Ray takes up to a minute."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"workers: found {self.least}..{self.most}, expected MIN..MAX with 1 <= MIN <= MAX")
        for name in ("start_settle_s", "grow_settle_s", "resize_interval_s", "silence_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 0 or more seconds")


def parse_workers(text: str) -> tuple[int, int]:
    """Return the least and the most number of workers that "3" or "2..16" means. ValueError if it means nothing."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"workers: found {text!r}, expected a number such as 3, or MIN..MAX such as 2..16")
    least = int(match[1])
    most = least if match[2] is None else int(match[2])
    if least > most or (match[2] is not None and least == 0):
        raise ValueError(f"workers: found {text!r}, expected MIN..MAX with 1 <= MIN <= MAX")
    return least, most
