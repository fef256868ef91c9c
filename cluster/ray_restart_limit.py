"""How often the workers of a run may be started again without a new checkpoint, whatever ended them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.attempts import manifest_ids
from cluster.coordination import CoordinatorSpec
from cluster.store import Store, StoreError

MAILBOX_TIMEOUT_S = 30.0
MOST_RESTARTS = 3
"""In a row, without a new checkpoint, before the run ends."""
MOST_AWAY_S = 3600.0
"""For how long restarts do not count because the storage does not answer, so that nobody knows what was saved."""
_LOOK_S = 3.0


class TooManyRestartsError(RuntimeError):
    """The workers were started again and again, and nothing was saved."""


class RestartLimit:
    """Counts restarts. The mailbox keeps the number, so that all who restart workers count together.

    coordinator: of the run's checkpoints; None where there are none, so that every restart is without a new one.
    """

    def __init__(
        self, mailbox: Any, coordinator: CoordinatorSpec | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._mailbox, self._coordinator, self._clock = mailbox, coordinator, clock
        self._away_since_s: float | None = None

    def count(self, text: str) -> str:
        """Count a restart for what `text` says; return what a person should know besides, "" for the first in a row.

        TooManyRestartsError where it is one too many.
        """
        try:
            newest = self._newest_checkpoint()
        except StoreError as error:
            now_s = self._clock()
            self._away_since_s = now_s if self._away_since_s is None else self._away_since_s
            if now_s - self._away_since_s < MOST_AWAY_S:
                return f" (not counted as a restart without a new one: the storage does not answer: {error})"
            newest = None
        else:
            self._away_since_s = None
        number: Any = ray.get(self._mailbox.count_restart.remote(newest), timeout=MAILBOX_TIMEOUT_S)
        if number > MOST_RESTARTS:
            raise TooManyRestartsError(f"giving up after {MOST_RESTARTS} restarts without a new checkpoint: {text}")
        return f" (restart {number} of {MOST_RESTARTS} without a new one)" if number > 1 else ""

    def _newest_checkpoint(self) -> list[int] | None:
        if self._coordinator is None:
            return None
        store = Store(self._coordinator.uri, patience_s=_LOOK_S)
        newest = max(manifest_ids(store), default=None)
        return None if newest is None else list(newest)
