"""When a checkpoint is due by the clock: at fixed times, or as often as its measured cost allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from instdisc.config_sections import CheckpointConfig

FIRST_SAVE_S = 30.0
"""Where nothing is measured yet."""
SHORTEST_S, LONGEST_S = 5.0, 3600.0
_WEIGHT = 0.3
"""Of a new measurement in a running mean."""


class Cadence:
    """Decides on rank 0 when to save by the clock, and measures what saves cost.

    The cost of a save is the time for which training waits for it, and the time that the steps made beside its upload
    take longer than others. With `max_cost` the interval is the cost over that share.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._saved_s = self._looked_s = clock()
        self._looked_step = 0
        self._was_saving = False
        self._free_s: float | None = None
        self._beside_s: float | None = None
        self._cost_s: float | None = None

    @property
    def interval_s(self) -> float:
        """Seconds from one save to the next, infinite where the clock decides nothing."""
        if self._config.max_cost is None:
            return math.inf if self._config.every_minutes is None else 60 * self._config.every_minutes
        if self._cost_s is None:
            return FIRST_SAVE_S
        return min(LONGEST_S, max(SHORTEST_S, self._cost_s / self._config.max_cost))

    def start(self, step: int) -> None:
        """Start the clock: training begins after `step` steps."""
        self._saved_s = self._looked_s = self._clock()
        self._looked_step = step

    def is_due(self) -> bool:
        """Whether so much time has passed since the last save was taken."""
        return self._clock() - self._saved_s >= self.interval_s

    def saved(self) -> None:
        """Take note that a save was taken."""
        self._saved_s = self._clock()

    def look(self, step: int, is_saving: bool) -> None:
        """Measure the steps since the last look. is_saving: whether a save is being written now."""
        now_s = self._clock()
        if step > self._looked_step and is_saving == self._was_saving:
            step_s = (now_s - self._looked_s) / (step - self._looked_step)
            if is_saving:
                self._beside_s = _mean(self._beside_s, step_s)
            else:
                self._free_s = _mean(self._free_s, step_s)
        self._looked_s, self._looked_step, self._was_saving = now_s, step, is_saving

    def pause(self) -> None:
        """Leave out the time since the last look: what went on was not training."""
        self._looked_s = self._clock()

    def committed(self, stall_s: float, write_s: float) -> None:
        """Take in what a save took: the wait of training, and the time in which it was written beside training."""
        slower = 0.0
        if self._free_s is not None and self._beside_s is not None:
            slower = max(0.0, 1 - self._free_s / self._beside_s)
        self._cost_s = _mean(self._cost_s, stall_s + slower * write_s)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - _WEIGHT) * before + _WEIGHT * new
