"""Alternating trials of two contestants, the sweep of the alternative's settings, and what is said of the numbers.

On a machine that others use, speed drifts by the minute. Trials alternate (ours, theirs, ours, theirs, …), so that
both see the same drift, and the ratio is the median over the pairs: each pair ran side by side.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Clock = Callable[[], float]
Say = Callable[[str], None]


class BenchmarkError(ValueError):
    """Something asked of a benchmark that cannot be measured."""


class Contestant(Protocol):
    """One side of a comparison."""

    def prepare(self) -> None:
        """Get ready for a trial; not timed."""
        ...

    def run(self) -> None:
        """Do the work of one trial, the device's included; timed."""
        ...

    def rest(self) -> None:
        """Stop everything that would run on beside the other side's trial; not timed."""
        ...


@dataclass(frozen=True)
class PairedSeconds:
    """Seconds of the trials of both sides; trial i of the one ran directly before trial i of the other."""

    ours: list[float]
    reference: list[float]


@dataclass(frozen=True)
class Spread:
    """Least, quartiles and greatest of the trials, in their unit."""

    min: float
    q1: float
    median: float
    q3: float
    max: float


@dataclass(frozen=True)
class Swept:
    """What one setting of the alternative came to: seconds of its trials, or why it does not work here."""

    setting: str
    seconds: list[float]
    error: str | None = None

    @property
    def best_s(self) -> float:
        """The fastest trial; infinite where it does not work."""
        return min(self.seconds, default=math.inf)


def alternate(
    ours: Contestant, reference: Contestant, *, trials: int, warmup: int = 1, clock: Clock = time.perf_counter
) -> PairedSeconds:
    """Run `warmup` untimed and then `trials` timed trials of each side, in turn, ours first; return the seconds.

    Raises BenchmarkError where trials < 1.
    """
    if trials < 1:
        raise BenchmarkError(f"trials: found {trials}, expected at least 1")
    for _ in range(warmup):
        for side in (ours, reference):
            timed_trial(side, clock)
    seconds = PairedSeconds([], [])
    for _ in range(trials):
        for side, side_seconds in ((ours, seconds.ours), (reference, seconds.reference)):
            side_seconds.append(timed_trial(side, clock))
    return seconds


def timed_trial(side: Contestant, clock: Clock) -> float:
    """Prepare, run and rest; return the seconds of the run alone."""
    side.prepare()
    try:
        started_s = clock()
        side.run()
        return clock() - started_s
    finally:
        side.rest()


def sweep(
    candidates: Mapping[str, Callable[[], Contestant]], *, rounds: int, say: Say, clock: Clock = time.perf_counter
) -> list[Swept]:
    """Run each setting of the alternative `rounds` times in turn, after a warm-up of each; return them, fastest first.

    They are ranked by their fastest trial, which noise of other processes lengthens least. A setting that raises is
    kept with its error. Raises BenchmarkError where none works.
    """
    sides: dict[str, Contestant] = {}
    failed: list[Swept] = []
    for setting, build in candidates.items():
        try:
            side = build()
            timed_trial(side, clock)
        except Exception as error:  # any failure of a rival's setting is a finding, and the other settings go on
            text = str(error).partition("\n")[0]
            failed.append(Swept(setting, [], f"{type(error).__name__}: {text}"))
            say(f"  {setting}: does not work here ({failed[-1].error})")
        else:
            sides[setting] = side
    seconds: dict[str, list[float]] = {setting: [] for setting in sides}
    for _ in range(rounds):
        for setting, side in sides.items():
            seconds[setting].append(timed_trial(side, clock))
    ranked = sorted((Swept(setting, found) for setting, found in seconds.items()), key=lambda swept: swept.best_s)
    if not ranked:
        raise BenchmarkError("the alternative runs with none of its settings: " + "; ".join(map(str, failed)))
    for swept in ranked:
        say(f"  {swept.setting}: fastest {swept.best_s:.3f} s, median {statistics.median(swept.seconds):.3f} s")
    return ranked + failed


def spread(values: Sequence[float]) -> Spread:
    """Return least, quartiles (linear between the ordered values) and greatest of at least one value."""
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(min(values), q1, median, q3, max(values))


def paired_result(
    name: str, *, unit: str, ours: Sequence[float], reference: Sequence[float], higher_is_better: bool, **more: Any
) -> dict[str, Any]:
    """Return one entry of a benchmark's document.

    value and reference: the medians. ratio: how many times better ours is, the median over the pairs;
    ratio_of_medians is the same of the two medians. `more` is added as it is.
    """

    def better(mine: float, theirs: float) -> float:
        return mine / theirs if higher_is_better else theirs / mine

    pair_ratios = [better(mine, theirs) for mine, theirs in zip(ours, reference, strict=True)]
    ours_spread, reference_spread = spread(ours), spread(reference)
    return {
        "name": name,
        "value": ours_spread.median,
        "unit": unit,
        "reference": reference_spread.median,
        "ratio": statistics.median(pair_ratios),
        "ratio_of_medians": better(ours_spread.median, reference_spread.median),
        "trials": list(ours),
        "reference_trials": list(reference),
        "pair_ratios": pair_ratios,
        "spread": asdict(ours_spread),
        "reference_spread": asdict(reference_spread),
        **more,
    }
