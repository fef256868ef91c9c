"""`bench checkpoint`, training beside saves: what a save makes training wait, and how much slower its steps are.

Real steps: encoder, loss, backward pass, optimizer and updates of the bank, on images made beforehand. Spans of the
same number of steps, as long as the time between two saves, alternate: one with a save at its start, one without.

Shapes: N rows of the bank, B samples of this rank, G of all ranks.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.manifest import ITEM_BYTES
from cluster.worker import Worker
from dataloading.loader import Batch
from dataloading.order import Permutation, StepRows
from instdisc.benchmark.checkpoint_state import CheckpointTask, checkpointer_of, start_save, state_of, tell
from instdisc.benchmark.pairing import BenchmarkError
from instdisc.train.plan import BatchPlan
from instdisc.train.step import Stepper

NUM_PREPARED, WARMUP_STEPS, TRIED_S = 4, 3, 3.0


def measure_steps(worker: Worker, task: CheckpointTask) -> dict[str, Any]:
    """Return the figures of all spans, as lists in the order of the trials, and what was set. Collective."""
    training = _Training(worker, task)
    try:
        return training.spans_in_turn()
    finally:
        training.close()


class _Training:
    """A run of `num_steps` steps a span, on this rank."""

    def __init__(self, worker: Worker, task: CheckpointTask) -> None:
        config = task.config
        self._worker, self._task = worker, task
        self._state = state_of(task, worker)
        batch = config.optim.global_batch
        share = -(-batch // worker.world_size)  # so that every worker has a group
        plan = BatchPlan(batch, min(config.optim.norm_group or share, share), worker.world_size)
        order = Permutation(task.num_rows, config.seed)
        self._stepper = Stepper(self._state, plan, worker, order)
        self._rows = StepRows(order, plan.global_batch, plan.offsets(worker.rank))
        shape = (plan.counts_W[worker.rank], 3, config.augment.size, config.augment.size)
        self._images = [torch.randn(shape) for _ in range(NUM_PREPARED)]
        self._valid_B = torch.ones(shape[0], dtype=torch.bool)
        self._checkpointer = checkpointer_of(task, worker, bandwidth_share=config.checkpoint.bandwidth_share)
        self._copies: dict[str, Tensor] = {}
        self._saved_step = -1
        self._advance(WARMUP_STEPS)

    def spans_in_turn(self) -> dict[str, Any]:
        """Make a first save, find out how many steps a span has, and alternate spans with and without a save."""
        num_steps = self._steps_of_a_span()
        self._start_save()
        first = self._checkpointer.wait()
        assert first is not None
        self._advance(num_steps)
        kind = "incremental" if self._task.incremental else "whole"
        trials = self._task.trials
        tell(self._worker, f"steps beside {kind} saves: 2 x {trials} spans of {num_steps} steps")
        found: dict[str, Any] = {"num_steps": num_steps, "first_bytes": first.num_bytes, "saves": [], "without_s": []}
        begun_s = time.monotonic()
        for trial in range(trials):
            found["saves"].append(self._span_with_a_save(num_steps))
            found["without_s"].append(self._span(num_steps))
            rest_s = (time.monotonic() - begun_s) / (trial + 1) * (trials - trial - 1)
            tell(self._worker, f"steps beside {kind} saves: {trial + 1} of {trials}, about {rest_s:.0f} s left")
        return found

    def close(self) -> None:
        """End the attempt."""
        self._checkpointer.close()

    def _span_with_a_save(self, num_steps: int) -> dict[str, Any]:
        self._stepper.settle()
        touched = sum(self._worker.all_gather_object(int((self._state.bank.last_step >= self._saved_step).sum())))
        copy_s = self._copy_as_one_would()
        started_s = self._begin()
        stall_s = self._start_save()
        self._advance(num_steps)
        span_s = self._end(started_s)
        has_ended = not any(self._worker.all_gather_object(self._checkpointer.is_saving))
        report = self._checkpointer.wait()
        assert report is not None
        if report.is_base == self._task.incremental:
            raise BenchmarkError(
                f"saves: found a {'whole' if report.is_base else 'incremental'} one where the other was expected; "
                "between two saves most rows are written: give more --rows or a shorter --interval"
            )
        return {
            "span_s": span_s,
            "stall_s": max(self._worker.all_gather_object(stall_s)),
            "copy_s": self._worker.all_gather_object(copy_s)[0],
            "write_s": report.write_s,
            "ended_within_span": has_ended,
            "num_bytes": report.num_bytes,
            "table_bytes": report.table_bytes,
            "touched_bytes": touched * self._row_bytes(),
        }

    def _span(self, num_steps: int) -> float:
        started_s = self._begin()
        self._advance(num_steps)
        return self._end(started_s)

    def _begin(self) -> float:
        self._stepper.settle()
        self._worker.all_gather_object(None)
        return time.perf_counter()

    def _end(self, started_s: float) -> float:
        self._stepper.settle()
        self._worker.all_gather_object(None)
        return time.perf_counter() - started_s

    def _start_save(self) -> float:
        """Start a save between two steps; return how long training waits for it."""
        self._stepper.settle()
        self._saved_step = self._state.step
        started_s = time.perf_counter()
        start_save(self._checkpointer, self._state)
        return time.perf_counter() - started_s

    def _copy_as_one_would(self) -> float:
        """Copy weights and momenta to memory that is there; return the seconds."""
        tensors = self._state.tensors()
        if not self._copies:
            self._copies = {name: tensor.clone() for name, tensor in tensors.items()}
        started_s = time.perf_counter()
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor)
        return time.perf_counter() - started_s

    def _row_bytes(self) -> int:
        """Return the bytes of a row and of the step of its last write."""
        return self._state.bank.rows.itemsize * self._state.bank.dim + ITEM_BYTES["int32"]

    def _steps_of_a_span(self) -> int:
        started_s, tried = self._begin(), 0
        while tried < WARMUP_STEPS or self._so_far(started_s) < min(TRIED_S, self._task.interval_s):
            self._advance(1)
            tried += 1
        step_s = self._so_far(started_s) / tried
        return max(1, math.ceil(self._task.interval_s / step_s))

    def _so_far(self, started_s: float) -> float:
        return self._worker.all_gather_object(time.perf_counter() - started_s)[0]

    def _advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            step = self._state.step
            rows_B = torch.from_numpy(np.array(self._rows.rows(step)))
            self._stepper.step(Batch(self._images[step % NUM_PREPARED], rows_B, self._valid_B))
