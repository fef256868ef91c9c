"""What `bench checkpoint` saves: the state of a real training run, on every rank, and where ranks meet.

Shapes: N rows of the bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.checkpoint import Checkpointer
from cluster.store import Store
from cluster.worker import Worker
from instdisc.config import TrainConfig
from instdisc.train.state import TrainState, build_state


@dataclass(frozen=True, kw_only=True)
class CheckpointTask:
    """What the ranks of one part of the benchmark are told."""

    config_json: str
    """The recipe: network, batch, objective, dtype and length of rows."""
    num_rows: int
    """N."""
    uri: str
    """Where this part saves."""
    num_threads: int
    """Threads of an upload or a restore, of every rank, ours and the alternative's."""
    trials: int
    """Timed trials of each side."""
    incremental: bool = False
    """Whether saves after the first store only the rows written since the one before."""
    interval_s: float = 60.0
    """From one save to the next."""

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.from_json(self.config_json)

    @property
    def store(self) -> Store:
        return Store(self.uri)


def state_of(task: CheckpointTask, worker: Worker) -> TrainState:
    """Return this rank's state, momenta of the optimizer included. Collective."""
    state = build_state(task.config, task.num_rows, worker)
    for parameter in state.encoder.parameters():
        state.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return state


def checkpointer_of(task: CheckpointTask, worker: Worker, *, bandwidth_share: float = 1.0) -> Checkpointer:
    """Return a checkpointer of an attempt that has begun. Collective."""
    checkpointer = Checkpointer(
        task.store,
        worker=worker,
        coordinator=worker.coordinator,
        num_threads=task.num_threads,
        bandwidth_share=bandwidth_share,
        incremental=task.incremental,
        rows_per_step=task.config.optim.global_batch,
    )
    checkpointer.restore(lambda checkpoint: None)
    checkpointer.begin_attempt()
    return checkpointer


def start_save(checkpointer: Checkpointer, state: TrainState) -> None:
    """Start a save as training does."""
    checkpointer.start_save(state.step, state.tables(), state.tensors(), state.numbers(), state.metrics())


def tell(worker: Worker, text: str) -> None:
    """Send a line about what is going on to the driver."""
    worker.emit({"kind": "message", "text": text, "keep": True})


class Together:
    """Contestant whose trial begins when all ranks are there, and ends when the last of them has done its work.

    before: not timed. What has still to come is told as time: `num_trials` of this side and of the other.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        work: Callable[[], None],
        *,
        num_trials: int = 0,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker, self._name, self._work, self._before = worker, name, work, before
        self._num_trials, self._done, self._begun_s = num_trials, 0, time.monotonic()

    def prepare(self) -> None:
        """Meet, after what comes before."""
        self._before()
        self._worker.all_gather_object(None)

    def run(self) -> None:
        """Work, and meet."""
        self._work()
        self._worker.all_gather_object(None)

    def rest(self) -> None:
        """Say how long the trials that are left will take, where their number is known."""
        self._done += 1
        left = self._num_trials - self._done
        if left > 0:
            rest_s = (time.monotonic() - self._begun_s) / self._done * left
            tell(self._worker, f"{self._name}: {self._done} of {self._num_trials}, about {rest_s:.0f} s left")
