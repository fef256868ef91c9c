"""The checkpoints of a run as its loop sees them: when one is due, what became of it, what a failure means.

Ranks decide alike because they decide from what all of them said at a look; of clocks and of the coordinator's wishes,
rank 0's count.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from cluster.checkpoint import Checkpointer, SaveFailedError, SaveReport, SupersededError
from cluster.phase import Phase, enter
from cluster.starts import about_workers
from cluster.worker import Worker
from instdisc import __version__
from instdisc.config import TrainConfig, lasting_digest, undecided_digest
from instdisc.config_sections import METRICS
from instdisc.runs import Run
from instdisc.train.cadence import Cadence
from instdisc.train.state import TrainState


class Saves:
    """Restores the state, and saves it when it is due."""

    def __init__(self, worker: Worker, config: TrainConfig, run: Run, dataset_digest: str) -> None:
        self._worker, self._config = worker, config.checkpoint
        self._checkpointer = Checkpointer(
            run.checkpoints(),
            worker=worker,
            coordinator=worker.coordinator,
            retention=run.coordinator(config).retention,
            bandwidth_share=config.checkpoint.bandwidth_share,
            incremental=config.checkpoint.incremental,
            rows_per_step=config.optim.global_batch,
            digests={"configuration": lasting_digest(config), "images": dataset_digest},
            older_digests={"configuration": undecided_digest(config)},
            versions={"instdisc": __version__},
        )
        self._cadence = Cadence(config.checkpoint)
        self._told: set[str] = set()
        self._wish_served = self._wish_committed = 0
        self._is_started = False
        self.attempt = 0
        """The number of this attempt, from `restore` on."""
        self._taken = self._safe = (0, time.monotonic())
        """Step and time of the last snapshot, and of the last one that is committed or was restored."""

    def restore(self, state: TrainState) -> bool:
        """Load the newest intact checkpoint into the state and begin an attempt; whether there was one. Collective."""
        checkpoint = self._checkpointer.restore(state.load)
        self._tell_warnings()
        worker = self._worker
        self.attempt = self._checkpointer.begin_attempt(
            about_workers(workers=worker.world_size, host=socket.gethostname(), cause=worker.cause)
        )
        return checkpoint is not None

    def start(self, step: int) -> None:
        """Start the clock: the first step is about to begin."""
        self._cadence.start(step)
        self._safe = step, time.monotonic()
        enter(Phase.STEP, step)

    def pause(self) -> None:
        """Leave out the time since the last look: something else than training went on."""
        self._cadence.pause()

    def is_due_at(self, step: int) -> bool:
        """Whether the configuration asks for a save after this step."""
        every = self._config.every_steps
        return every is not None and step % every == 0

    def look(self, step: int) -> dict[str, Any]:
        """Return what this rank knows of saves, JSON-able, for all ranks to see."""
        is_saving = self._checkpointer.is_saving
        self._cadence.look(step, is_saving)
        return {
            "age_s": time.monotonic() - self._safe[1],
            "age_steps": step - self._safe[0],
            "is_saving": is_saving,
            "due": self._cadence.is_due(),
            "wishes": self._checkpointer.wishes["saves"],
            "superseded": self._checkpointer.wishes["superseded"],
        }

    def ended(self, by_rank: Sequence[dict[str, Any]]) -> SaveReport | None:
        """Return the report of the save that has ended on all ranks since it was started, None if none has.

        A failure that may pass is told, and the next save is made as usual; one that does not pass is raised, as is a
        newer attempt. The same on every rank.
        """
        if by_rank[0]["superseded"]:
            raise SupersededError(
                "another process goes on with this run: this one ends, and nothing of its checkpoints is lost"
            )
        if not self._is_started or any(rank["is_saving"] for rank in by_rank):
            return None
        return self._outcome(must_succeed=False)

    def save_if_due(self, state: TrainState, by_rank: Sequence[dict[str, Any]]) -> SaveReport | None:
        """Start a save if one is due. Returns the report of the save before where that was waited for. Collective."""
        must = by_rank[0]["wishes"] > self._wish_served or self._is_best(state)
        if not (by_rank[0]["due"] or self.is_due_at(state.step) or must):
            return None
        report = None
        if self._is_started:
            if self._config.overlap == "skip" and not must:
                return None
            report = self._outcome(must_succeed=False)
        self._wish_served = by_rank[0]["wishes"]
        self._start(state)
        return report

    def save_if_best(self, state: TrainState) -> None:
        """Start a save if the state is the best so far. Before the first step: no save is on its way. Collective."""
        if self._is_best(state):
            self._start(state)

    def save_now(self, state: TrainState) -> SaveReport | None:
        """Save and wait until it is committed: the run ends, or pauses. Every failure is raised. Collective."""
        if self._is_started:
            self._outcome(must_succeed=False)
        self._start(state)
        return self._outcome(must_succeed=True)

    def close(self) -> None:
        """End; a save that is still being written is not waited for."""
        self._checkpointer.close()

    def _is_best(self, state: TrainState) -> bool:
        """Whether the state was just measured, and nothing that was trained before it is better by `keep_best`."""
        name = self._config.keep_best
        if name is None or state.step == 0 or name not in state.metrics():
            return False
        values = [value for step, value in state.curves[name] if step > 0]
        return values[-1] == (min(values) if METRICS[name] == "lower" else max(values))

    def _start(self, state: TrainState) -> None:
        self._checkpointer.start_save(
            state.step,
            state.tables(),
            state.tensors(),
            state.numbers(),
            state.metrics(),
            wish=self._wish_served,
        )
        self._is_started = True
        self._taken = state.step, time.monotonic()
        self._cadence.saved()

    def _outcome(self, *, must_succeed: bool) -> SaveReport | None:
        self._is_started = False
        try:
            report = self._checkpointer.wait()
        except SaveFailedError as error:
            if must_succeed or error.is_permanent:
                raise
            self._tell(f"{error}; training goes on, the next checkpoint is saved as usual")
            self._wish_served = self._wish_committed  # whoever wished for it still waits
            return None
        self._wish_committed = self._wish_served
        self._safe = self._taken
        self._tell_warnings()
        if report is not None:
            self._cadence.committed(report.snapshot_s, report.write_s)
        return report

    def _tell_warnings(self) -> None:
        # Once each: what cannot be removed after one save cannot be removed after the next, either.
        warnings = self._checkpointer.warnings
        for warning in warnings:
            if warning not in self._told:
                self._tell(warning)
        self._told.update(warnings)
        warnings.clear()

    def _tell(self, text: str) -> None:
        self._worker.emit({"kind": "message", "text": f"warning: {text}", "keep": True})
