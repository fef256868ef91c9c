"""What became of a run's workers, for TensorBoard: how many there are, how often and why they were started again."""

from __future__ import annotations

import threading
import time

from cluster.attempts import read_attempts
from cluster.starts import Start, count, starts_of
from cluster.store import Store
from cluster.worker import Worker

CLOSE_S = 5.0
_NUM_SHOWN = 100


class ClusterEvents:
    """What rank 0 shows of the starts of a run's workers. The records are read beside training, which never waits."""

    def __init__(self, worker: Worker, store: Store) -> None:
        """store: of the run's checkpoints."""
        self._worker, self._store = worker, store
        self._starts: list[Start] = []
        self._reading: threading.Thread | None = None
        self._has_told_table = self._has_told_recovery = False

    def start_reading(self) -> None:
        """Read the records of all attempts in a thread. This attempt has started."""
        self._reading = threading.Thread(target=self._read, name="cluster-events", daemon=True)
        self._reading.start()

    def close(self) -> None:
        """Wait for what is still being read, at most `CLOSE_S` seconds."""
        if self._reading is not None:
            self._reading.join(CLOSE_S)

    def take_recovery(self) -> float | None:
        """Return the seconds since the group before was seen to end, once; call it after the first step.

        None where there was none, or where the clocks of the driver's machine and this one disagree visibly.
        """
        since_s = self._worker.cause.since
        if since_s is None or self._has_told_recovery:
            return None
        self._has_told_recovery = True
        seconds = time.time() - since_s
        return seconds if seconds >= 0 else None

    def values(self) -> dict[str, float | None]:
        """Return a point for each tag, as far as it is known by now."""
        starts = self._starts
        counts = count(starts) if starts else None
        return {
            "cluster/workers": self._worker.world_size,
            "cluster/restarts": counts and counts.restarts,
            "cluster/preemptions": counts and counts.preemptions,
            "cluster/resizes": counts and counts.resizes,
        }

    def take_table(self) -> str | None:
        """Return all starts as a table in Markdown, once, when they have been read."""
        if not self._starts or self._has_told_table:
            return None
        self._has_told_table = True
        rows = [
            f"| {start.attempt} | {start.created} | {'?' if start.workers is None else start.workers} | "
            f"{_cell(start.host)} | {start.from_step} | {_cell(start.kind)} | {_cell(start.text)} |"
            for start in self._starts[-_NUM_SHOWN:]
        ]
        head = ["| attempt | time | workers | rank 0 on | from step | kind | cause |", "|---|---|---|---|---|---|---|"]
        return "\n".join(head + rows)

    def _read(self) -> None:
        try:
            self._starts = starts_of(read_attempts(self._store))
        except OSError:
            return  # the store does not answer: saves say so


def _cell(text: str) -> str:
    """Return a text that stays in its cell."""
    return " ".join(text.replace("|", "/").split())
