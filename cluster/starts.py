"""How often, why and on what the workers of a run were started: counted from the records of its attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.attempts import Attempt

if TYPE_CHECKING:
    from cluster.worker import Cause

PRUNE = "prune"
"""The kind of cause of an attempt without workers: somebody removed old checkpoints by hand."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run's workers.

    created: ISO 8601, by the clock of the coordinator's machine. from_step: of the checkpoint that they went on from, 0
    for none. workers, host: their number and where rank 0 was; None and "" where an older version wrote the record.
    kind, text: as in `cluster.worker.Cause`, "" where they are not known.
    """

    attempt: int
    created: str
    from_step: int
    workers: int | None
    host: str
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """restarts: starts after the first, whatever the cause; preemptions, resizes, failures: those of them by cause."""

    restarts: int
    preemptions: int
    resizes: int
    failures: int


def about_workers(*, workers: int, host: str, cause: Cause) -> dict[str, Any]:
    """Return what the record of an attempt says of its workers. host: rank 0's."""
    return {"workers": workers, "host": host, "cause": asdict(cause)}


def about_pruning() -> dict[str, Any]:
    """Return what the record of an attempt says that only removes checkpoints."""
    return {"cause": {"kind": PRUNE, "text": "old checkpoints were removed by hand", "since": None}}


def starts_of(attempts: Mapping[int, Attempt]) -> list[Start]:
    """Return the starts of workers among all attempts of a run, in order."""
    starts = [_start(attempt) for _, attempt in sorted(attempts.items())]
    return [start for start in starts if start.kind != PRUNE]


def count(starts: Sequence[Start]) -> Counts:
    """Count the causes of all starts of a run but the first."""
    kinds = [start.kind for start in starts[1:]]
    return Counts(
        restarts=len(kinds),
        preemptions=kinds.count("drain"),
        resizes=kinds.count("resize"),
        failures=kinds.count("failure"),
    )


def _start(attempt: Attempt) -> Start:
    # The record's checksum holds, but another version may have written other things into it.
    about = attempt.about if isinstance(attempt.about, Mapping) else {}
    cause = about.get("cause")
    cause = cause if isinstance(cause, Mapping) else {}
    workers = about.get("workers")
    return Start(
        attempt=attempt.number,
        created=_text(attempt.created),
        from_step=attempt.parent.step if attempt.parent else 0,
        workers=workers if type(workers) is int else None,
        host=_text(about.get("host")),
        kind=_text(cause.get("kind")),
        text=_text(cause.get("text")),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
