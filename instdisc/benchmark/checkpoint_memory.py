"""`bench checkpoint`, memory: the most that a process holds while it saves or restores, its rows included.

Each part runs in processes that do nothing else. What was there before the work, but for the rows, does not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.checkpoint import read_latest
from cluster.worker import Worker
from instdisc.benchmark.checkpoint_state import CheckpointTask, checkpointer_of, start_save, state_of
from instdisc.benchmark.peak_memory import reset_peak, resident_bytes
from instdisc.train.state import TrainState

POLL_S = 0.01
LIMIT_SHARDS, LIMIT_BYTES = 1.25, 256 * 2**20


@dataclass(frozen=True)
class Peak:
    """What one rank's process held at most: its rows with their last steps, and what the work took beside them.

    process_bytes: with weights, gradients, momenta and what else was there before, the libraries excepted.
    """

    num_bytes: int
    shard_bytes: int
    process_bytes: int

    @property
    def limit_bytes(self) -> float:
        """A quarter of the shard and 256 MiB beside the shard."""
        return LIMIT_SHARDS * self.shard_bytes + LIMIT_BYTES


class PeakMeter:
    """Begins before the state is built; `start` directly before the work whose peak counts, `peak` after it."""

    def __init__(self) -> None:
        self._of_libraries = resident_bytes("VmRSS")
        self._before_work = 0

    def start(self) -> None:
        """Forget earlier peaks."""
        self._before_work = resident_bytes("VmRSS")
        reset_peak()

    def peak(self, state: TrainState) -> Peak:
        """Return the peak since `start`."""
        highest, shard = resident_bytes("VmHWM"), shard_bytes(state)
        return Peak(shard + highest - self._before_work, shard, highest - self._of_libraries)


def peak_of_save(worker: Worker, task: CheckpointTask) -> Peak:
    """Return the peak of a whole save. Collective."""
    meter = PeakMeter()
    state = state_of(task, worker)
    # With rests, as beside training: what is still held during them counts.
    checkpointer = checkpointer_of(task, worker, bandwidth_share=task.config.checkpoint.bandwidth_share)
    meter.start()
    try:
        state.step = 1
        start_save(checkpointer, state)
        while checkpointer.is_saving:
            time.sleep(POLL_S)
        checkpointer.wait()
        return meter.peak(state)
    finally:
        checkpointer.close()


def peak_of_restore(worker: Worker, task: CheckpointTask) -> Peak:
    """Return the peak of a restore as training does it, into the state that is there. Collective."""
    meter = PeakMeter()
    state = state_of(task, worker)
    latest = read_latest(task.store)
    assert latest is not None, "a save came before"
    meter.start()
    state.load(latest)
    return meter.peak(state)


def shard_bytes(state: TrainState) -> int:
    """Return the bytes of the rows that a rank owns and of the steps of their last writes."""
    return sum(table.rows.numel() * table.rows.itemsize for table in state.tables().values())
