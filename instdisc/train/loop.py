"""The training loop of one rank: what `fit` starts on every worker, under Ray, in local processes, or right here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.phase import Phase, enter
from cluster.worker import Preempted, Worker
from dataloading.index import Dataset, DatasetError
from dataloading.loader import Loader, make_loader
from dataloading.order import make_order
from instdisc.bad_images import BAD_IMAGES, BAD_TEST_IMAGES, BadImage, BadImages, read_bad_images, to_jsonl
from instdisc.config import TrainConfig
from instdisc.runs import NEIGHBOURS, Run, RunResult
from instdisc.schedule import learning_rate, multiples_passed, num_steps
from instdisc.train.bank_health import BankHealth, measure
from instdisc.train.evaluation import Evaluation, EvaluationInterrupted, KnnEvaluator
from instdisc.train.image_sets import (
    open_train_set,
    require_same_images,
    share_test_set,
    tell_notes,
    with_rules_of,
)
from instdisc.train.metrics import check_collapse, check_finite, finite_or_none
from instdisc.train.monitor import Monitor
from instdisc.train.neighbours import draw_neighbours
from instdisc.train.plan import BatchPlan
from instdisc.train.saves import Saves
from instdisc.train.state import TrainState, build_state, decide_precision
from instdisc.train.step import Stepper

LOOK_S = 5.0
"""Seconds after which the metrics are read again, and a wish to stop is seen, at the latest (at least one step)."""


def train(worker: Worker, config_json: str, uri: str) -> dict[str, Any]:
    """Train this rank's part of the run at `uri` until its end or until it is asked to stop; continue where it stood.

    Returns {"finished", "step", "num_steps", "metrics"}, the same on every rank; raises Preempted on every rank where
    other workers are to go on. Collective.
    """
    config = decide_precision(worker, TrainConfig.from_json(config_json))
    run = Run(uri)
    train_set = open_train_set(worker, config, run)
    config = with_rules_of(config, train_set)
    test_set = share_test_set(
        worker,
        config,
        run,
        lambda why: worker.emit({"kind": "message", "text": f"no kNN evaluation: {why}", "keep": True}),
    )
    require_same_images(worker, train_set, test_set)
    tell_notes(worker, train_set, test_set)
    training = Training(worker, config, run, train_set, test_set)
    try:
        return training.run_to_end()
    finally:
        training.close()


class Training:
    """One rank of a run: its state, and when to look, to evaluate and to save."""

    def __init__(
        self, worker: Worker, config: TrainConfig, run: Run, train_set: Dataset, test_set: Dataset | None
    ) -> None:
        assert config.optim.norm_group is not None, "fit decides the normalisation group at the first start"
        self.worker, self.config, self.run = worker, config, run
        self.train_set, self.test_set = train_set, test_set
        self.num_rows = train_set.index.num_rows
        self.num_steps = num_steps(config.optim, self.num_rows)
        self.plan = BatchPlan(config.optim.global_batch, config.optim.norm_group, worker.world_size)
        self.state: TrainState = build_state(config, self.num_rows, worker)
        order = config.data.order_config
        self.stepper = Stepper(
            self.state,
            self.plan,
            worker,
            make_order(train_set, order, seed=config.seed, global_batch=config.optim.global_batch),
        )
        self.saves = Saves(worker, config, run, train_set.index.digest)
        self.evaluator = KnnEvaluator(train_set, test_set, config, worker) if test_set is not None else None
        self.loader: Loader = make_loader(
            train_set,
            config.augment,
            seed=config.seed,
            global_batch=config.optim.global_batch,
            offsets=self.plan.offsets(worker.rank),
            device=worker.device,
            num_threads=worker.num_threads,
            backend=config.data.backend,
            order=order,
        )
        self.monitor = Monitor(worker, config, run, self.num_steps, self.num_rows)
        self._next_look = 0
        known = [asdict(bad) for bad in read_bad_images(run.store)] if worker.rank == 0 else []
        earlier = (BadImage(**bad) for bad in worker.all_gather_object(known)[0])
        self.bad_images = BadImages(train_set.index, config.data.max_bad_share, earlier)
        self._told_bad = 0

    def run_to_end(self) -> dict[str, Any]:
        """Restore, train, evaluate and save until the last step or until the driver asks to stop."""
        self._restore()
        self.monitor.announce(self.state, self.plan)
        self._tell_of_knn()
        self._report_bad_images([])  # those that the index knows
        if self.worker.all_gather_object(self.worker.stop_requested())[0]:
            return self._result(finished=False)
        try:
            if self.state.step == 0 and self.config.eval.baselines:
                self._baselines()
            elif self._evaluation_due() and not self._is_evaluated():
                self._evaluate()  # the workers before this group left in the middle of it
                self.saves.save_if_best(self.state)
        except EvaluationInterrupted:
            self._leave_unless_stopped(self._wishes())
            return self._result(finished=False)
        self.worker.begin()
        self.monitor.start(self.state.step)
        self.saves.start(self.state.step)
        self._next_look = self.state.step + 1
        batches = self.loader.batches(self.state.step)
        while self.state.step < self.num_steps:
            with self.monitor.data_wait():
                batch = next(batches)
            self.monitor.show_batch(batch)
            self.stepper.step(batch)
            enter(Phase.STEP, self.state.step)
            if self._has_appointment() and self._look():
                return self._result(finished=False)
        try:
            evaluation = self._evaluate()
        except EvaluationInterrupted:
            self._end_early(self._wishes())
            return self._result(finished=False)
        self._save_now()
        self._finish(evaluation)
        return self._result(finished=True)

    def close(self) -> None:
        """Free the data pipeline and close the event files."""
        self.loader.close()
        self.saves.close()
        self.monitor.close()

    def _restore(self) -> None:
        if self.saves.restore(self.state):
            text = f"continuing from the checkpoint of step {self.state.step:,} of {self.num_steps:,}"
            self.worker.emit({"kind": "message", "text": text, "keep": True})
        if self.worker.rank == 0:
            # Only now: a process that was refused, because this one trains the run, must not leave its own there.
            self.run.keep_config(self.config)
        self.monitor.open_events(self.saves.attempt, self.state.step)

    def _has_appointment(self) -> bool:
        """Whether all ranks meet after this step: to read the metrics, to evaluate, to save."""
        step = self.state.step
        return step >= self._next_look or step == self.num_steps or self._evaluation_due() or self.saves.is_due_at(step)

    def _evaluation_due(self) -> bool:
        """Whether a multiple of `eval.every_epochs` was passed in this step; the last step has its own evaluation."""
        every, step = self.config.eval.every_epochs, self.state.step
        if every == 0 or self.evaluator is None or not 0 < step < self.num_steps:
            return False
        batch = self.config.optim.global_batch
        before, now = (multiples_passed(every, s, batch, self.num_rows) for s in (step - 1, step))
        return now > before

    def _is_evaluated(self) -> bool:
        """Whether this step has its evaluation."""
        return any(at == self.state.step for at, _ in self.state.curves.get("knn_top1", []))

    def _wishes(self) -> dict[str, bool]:
        """Return what the workers are asked for. Collective."""
        own = {"stop": self.worker.stop_requested(), "leave": self.worker.leave_requested()}
        return self.worker.all_gather_object(own)[0]  # signals reach ranks at different times: rank 0's count

    def _end_early(self, wishes: dict[str, bool]) -> None:
        """Save, and raise Preempted unless the workers are to return."""
        if wishes["stop"]:  # whoever asks workers to leave says why
            self.worker.emit({"kind": "message", "text": "asked to stop: saving a checkpoint", "keep": True})
        self._save_now()
        self._leave_unless_stopped(wishes)

    def _leave_unless_stopped(self, wishes: dict[str, bool]) -> None:
        if wishes["leave"] and not wishes["stop"]:
            raise Preempted(self.state.step)

    def _look(self) -> bool:
        """Read the metrics, evaluate and save what is due; return whether to stop. Collective."""
        step = self.state.step
        self.stepper.settle()
        shares = self.stepper.sums.read()
        read = {
            **{name: finite_or_none(value) for name, value in shares.items()},
            "non_finite_step": int(self.state.bank.non_finite_step),
            "all_same_step": int(self.state.bank.all_same_step),
            "health": asdict(measure(self.state.bank, step)),
            "data_wait": self.monitor.data_wait_share(),
            "bad_rows": [(bad.row, bad.name, bad.reason) for bad in self.loader.failed_rows(self._told_bad)],
            # Clocks and signals differ between ranks: those of rank 0 count.
            "steps_to_next_look": self.monitor.steps_in(LOOK_S, step),
            "stop": self.worker.stop_requested(),
            "leave": self.worker.leave_requested(),
            "saves": self.saves.look(step),
        }
        self._told_bad += len(read["bad_rows"])
        by_rank = self.worker.all_gather_object(read)
        self._next_look = step + max(1, min(self.config.system.log_every, by_rank[0]["steps_to_next_look"]))
        check_finite(by_rank, (self.monitor.last_look, step))
        check_collapse(by_rank)
        self._report_bad_images(by_rank)
        self.monitor.check_bank(self.state, [BankHealth(**read["health"]) for read in by_rank], len(self.bad_images))
        self.monitor.show(
            self.state, by_rank, learning_rate(self.config.optim, step - 1, self.num_rows), len(self.bad_images)
        )
        self.monitor.saved(self.saves.ended([read["saves"] for read in by_rank]))
        wishes = {wish: by_rank[0][wish] for wish in ("stop", "leave")}
        if self._evaluation_due() and not any(wishes.values()):
            with contextlib.suppress(EvaluationInterrupted):
                self._evaluate()
            self.saves.pause()
            wishes = self._wishes()
        if step == self.num_steps:
            return False
        if not any(wishes.values()):
            self.monitor.saved(self.saves.save_if_due(self.state, [read["saves"] for read in by_rank]))
            return False
        self._end_early(wishes)
        return True

    def _report_bad_images(self, by_rank: Sequence[dict[str, Any]]) -> None:
        """Take note of the images that failed since the last look, and end the run where they are too many."""
        step = self.state.step
        found = [BadImage(row, name, why, step) for read in by_rank for row, name, why in read["bad_rows"]]
        if self.bad_images.add(found) or not by_rank:
            if self.worker.rank == 0 and len(self.bad_images):
                self.run.store.put(BAD_IMAGES, self.bad_images.to_jsonl())
                self.monitor.tell_bad_images(len(self.bad_images))
            try:
                self.bad_images.check()
            except DatasetError:
                if by_rank:
                    self._save_now()  # whoever allows a larger share goes on from here
                raise

    def _tell_of_knn(self) -> None:
        """Tell what a person should know of the evaluations to come."""
        for text in [] if self.evaluator is None else self.evaluator.about():
            self.worker.emit({"kind": "message", "text": text, "keep": True})
        best = self.config.checkpoint.keep_best
        if best is not None and (self.evaluator is None or self.evaluator.no_accuracy):
            self.monitor.warn(f"checkpoint.keep_best={best}: this run measures no kNN accuracy, so none is the best")

    def _baselines(self) -> None:
        if self.evaluator is None:
            return
        raw = self.evaluator.raw_pixels()
        if raw is not None:
            self.state.curves["knn_raw_pixels_top1"] = [(0, raw)]
            self.worker.emit({"kind": "message", "text": f"kNN on raw pixels: {raw:.1f} %", "keep": True})
        self._evaluate()

    def _evaluate(self) -> Evaluation | None:
        if self.evaluator is None:
            return None
        evaluation = self.evaluator.evaluate(self.state)
        for name, value in evaluation.scores.items():
            if not math.isfinite(value):
                self.monitor.warn(f"{name} of step {self.state.step:,} is {value}, expected a finite number: left out")
                continue
            # A run that was killed before it said that it was finished evaluates its last step again.
            earlier = [point for point in self.state.curves.get(name, []) if point[0] != self.state.step]
            self.state.curves[name] = [*earlier, (self.state.step, value)]
        self.monitor.show_evaluation(self.state, evaluation, self.train_set, self.test_set)
        if evaluation.bad_test and self.worker.rank == 0:
            bad = [BadImage(bad.row, bad.name, bad.reason, None) for bad in evaluation.bad_test]
            self.run.store.put(BAD_TEST_IMAGES, to_jsonl(bad))
        return evaluation

    def _save_now(self) -> None:
        self.monitor.saved(self.saves.save_now(self.state))

    def _finish(self, evaluation: Evaluation | None) -> None:
        if self.worker.rank != 0:
            return
        summary = {**self.monitor.summary(), "num_bad": len(self.bad_images)}
        if evaluation is not None and self.test_set is not None:
            summary |= evaluation.summary()
            title = f"{self.config.recipe}: test images and their nearest training images"
            picture = draw_neighbours(self.train_set, self.test_set, evaluation.neighbours, title)
            if picture is not None:
                self.run.store.put(NEIGHBOURS, picture)
        self.run.finish(RunResult(**{**self._result(finished=True), "uri": self.run.uri}, summary=summary))

    def _result(self, *, finished: bool) -> dict[str, Any]:
        return {
            "finished": finished,
            "step": self.state.step,
            "num_steps": self.num_steps,
            "metrics": self.state.curves,
        }
