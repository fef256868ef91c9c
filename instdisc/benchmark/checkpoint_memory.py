"""`bench checkpoint`, memory: the most that a process holds while it saves or restores, its rows included.

Each part runs in processes that do nothing else; what the libraries take before the state is built does not count.
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
    """What one rank's process held at most, and the bytes of its rows and of their last steps."""

    num_bytes: int
    shard_bytes: int

    @property
    def limit_bytes(self) -> float:
        """A quarter of the shard and 256 MiB beside the shard, and the rest of the state with it."""
        return LIMIT_SHARDS * self.shard_bytes + LIMIT_BYTES


def peak_of_save(worker: Worker, task: CheckpointTask) -> Peak:
    """Return the peak of a whole save, its state included. Collective."""
    before = resident_bytes("VmRSS")
    state = state_of(task, worker)
    # With rests, as beside training: what is still held during them counts.
    checkpointer = checkpointer_of(task, worker, bandwidth_share=task.config.checkpoint.bandwidth_share)
    reset_peak()
    try:
        state.step = 1
        start_save(checkpointer, state)
        while checkpointer.is_saving:
            time.sleep(POLL_S)
        checkpointer.wait()
        return Peak(resident_bytes("VmHWM") - before, shard_bytes(state))
    finally:
        checkpointer.close()


def peak_of_restore(worker: Worker, task: CheckpointTask) -> Peak:
    """Return the peak of a restore as training does it, into the state that is there. Collective."""
    before = resident_bytes("VmRSS")
    state = state_of(task, worker)
    latest = read_latest(task.store)
    assert latest is not None, "a save came before"
    reset_peak()
    state.load(latest)
    return Peak(resident_bytes("VmHWM") - before, shard_bytes(state))


def shard_bytes(state: TrainState) -> int:
    """Return the bytes of the rows that a rank owns and of the steps of their last writes."""
    return sum(table.rows.numel() * table.rows.itemsize for table in state.tables().values())
