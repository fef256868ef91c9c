"""What a run shows of itself while it goes on: the progress line's events, TensorBoard, and times.

Shapes: S rows of a sample of this rank's.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cluster.checkpoint import SaveReport
from cluster.worker import Worker
from dataloading.index import Dataset
from dataloading.loader import Batch
from instdisc.bad_images import BAD_IMAGES
from instdisc.config import TrainConfig
from instdisc.memory_bank import NEVER
from instdisc.pictures import image_grid
from instdisc.progress import counted, in_bytes
from instdisc.runs import Run
from instdisc.train.bank_health import BankHealth, DeadBankError, problems, sample_places
from instdisc.train.cluster_events import ClusterEvents
from instdisc.train.evaluation import Evaluation
from instdisc.train.metrics import NAMES
from instdisc.train.plan import BatchPlan
from instdisc.train.state import MIN_CHANNELS_LAST_ON_CPU, TrainState, has_bfloat16, use_channels_last
from instdisc.train.tensorboard import EventWriter, log_z_advice

_BATCH_IMAGES = 64
_SHOWN_SIDE = 96  # pixels; smaller images are enlarged


class Monitor:
    """Times a rank's steps and tells, on rank 0, what the ranks read together."""

    def __init__(self, worker: Worker, config: TrainConfig, run: Run, num_steps: int, num_rows: int) -> None:
        self._worker, self._config, self._run = worker, config, run
        self._num_steps, self._num_rows = num_steps, num_rows
        self._events: EventWriter | None = None
        self._cluster = ClusterEvents(worker, run.checkpoints())
        self._started_s = self._look_s = time.monotonic()
        self._waited_s = 0.0
        self._first_step = self.last_look = 0
        self._advised = self._batch_shown = self._told_bad = False
        self._told_kinds: set[str] = set()

    def open_events(self, attempt: int, step: int) -> None:
        """Start event files; TensorBoard forgets what an earlier attempt wrote beyond `step` steps."""
        if self._worker.rank == 0 and self._config.system.tensorboard:
            uri = f"{self._run.uri.rstrip('/')}/tensorboard"
            self._events = EventWriter(uri, attempt=attempt, purge_step=step + 1, on_failure=self.warn)
            self._events.text(0, "config", f"```\n{self._config.to_json()}\n```")
            self._cluster.start_reading()

    def announce(self, state: TrainState, plan: BatchPlan) -> None:
        """Tell what follows from the configuration, before the first step."""
        worker, bank, system = self._worker, state.bank, self._config.system
        bank_bytes = bank.rows.numel() * bank.rows.element_size()
        parameters = sum(p.numel() for p in state.encoder.parameters())
        # Weights and their momenta, and the whole bank with the step of each row's last write.
        checkpoint_bytes = 8 * parameters + self._num_rows * (bank.dim * bank.rows.element_size() + 4)
        lines = [
            f"{self._num_rows:,} images, {self._num_steps:,} steps of {plan.global_batch} images "
            f"({self._num_rows / plan.global_batch:.1f} an epoch)",
            f"BatchNorm over groups of {plan.norm_group} images: the same result, up to rounding, on 1 to "
            f"{plan.num_groups} workers"
            if plan.num_groups > 1
            else f"BatchNorm over the whole batch of {plan.global_batch} images, so on one worker",
            f"{counted(max(1, worker.world_size), 'worker')} on {worker.device.type} in {system.precision}, "
            f"{counted(worker.num_threads, 'thread')} a worker for torch and data together",
            f"encoder {parameters / 1e6:.2f} M parameters, memory bank {in_bytes(bank_bytes)} a worker, "
            f"checkpoint about {in_bytes(checkpoint_bytes)}",
        ]
        for line in lines:
            worker.emit({"kind": "message", "text": line, "keep": True})
        self._warn_of_the_device()

    def _warn_of_the_device(self) -> None:
        """Tell where this device does not do what the configuration says, or does it slowly."""
        system, device = self._config.system, self._worker.device
        if system.precision == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
            self.warn("this GPU has no units for bfloat16 and emulates it, slower than float32 (system.precision)")
        if system.precision == "float32" and has_bfloat16(device):
            self._worker.emit(
                {
                    "kind": "message",
                    "text": "this GPU has bfloat16, and the run computes in float32 to its end (system.precision)",
                    "keep": True,
                }
            )
        if system.channels_last == "on" and not use_channels_last(self._config, device):
            self.warn(
                f"system.channels_last=on has no effect on a processor for a net of fewer than "
                f"{MIN_CHANNELS_LAST_ON_CPU} channels (model.width): torch's backward pass corrupts memory there"
            )

    def start(self, step: int) -> None:
        """Start the clocks: the first step is about to begin."""
        self._started_s = self._look_s = time.monotonic()
        self._first_step = self.last_look = step

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - before_s

    def data_wait_share(self) -> float:
        """Return the share of the time since the last look that this rank waited for data, 0 to 1."""
        return self._waited_s / max(1e-9, time.monotonic() - self._look_s)

    def steps_in(self, seconds: float, step: int) -> int:
        """Return how many steps fit into a time at the speed since the last look; `step` were made in all."""
        return int(seconds * (step - self.last_look) / max(1e-9, time.monotonic() - self._look_s))

    def show_batch(self, batch: Batch) -> None:
        """Write the first batch's images, as the encoder sees them, to TensorBoard."""
        if self._events is not None and not self._batch_shown and len(batch.images_BCHW):
            augment = self._config.augment
            pixels_HWC = image_grid(
                batch.images_BCHW[:_BATCH_IMAGES],
                augment.mean,
                augment.std,
                columns=8,
                enlarge=max(1, _SHOWN_SIDE // augment.size),
            )
            self._events.image(self._first_step, "data/augmented_batch", pixels_HWC)
            self._batch_shown = True

    def show(self, state: TrainState, by_rank: Sequence[dict[str, Any]], lr: float, num_bad: int) -> None:
        """Tell what all ranks read: their shares of the means add up to the means. num_bad: damaged images known."""
        now_s = time.monotonic()
        steps = state.step - self.last_look
        batch = self._config.optim.global_batch
        speed = steps * batch / max(1e-9, now_s - self._look_s)
        self._look_s, self._waited_s, self.last_look = now_s, 0.0, state.step
        means = {name: sum(read[name] or 0.0 for read in by_rank) for name in NAMES}
        data_wait = max(read["data_wait"] for read in by_rank)
        if self._worker.rank != 0:
            return
        done = state.step - self._first_step
        eta_s = (self._num_steps - state.step) * (now_s - self._started_s) / done if done else None
        self._worker.emit(
            {
                "kind": "progress",
                "step": state.step,
                "num_steps": self._num_steps,
                "epoch": state.step * batch / self._num_rows,
                "loss": means["loss"],
                "images_per_s": speed,
                "data_wait": data_wait,
                "lr": lr,
                "eta_s": eta_s,
            }
        )
        self._advise_on_z(state)
        self._write_events(state, means, lr, speed, data_wait, num_bad)
        age = {f"checkpoint/{name}": by_rank[0]["saves"][name] for name in ("age_s", "age_steps")}
        self._show_cluster(state.step, age)

    def check_bank(self, state: TrainState, by_rank: Sequence[BankHealth], num_bad: int) -> None:
        """Show the bank's health, and end the run, or warn, where training is pointless.

        Raises DeadBankError on every rank. num_bad: damaged images known.
        """
        drift = None
        if state.config.objective.name == "nce":
            drift = float(state.normalizer.running_log_z) - float(state.normalizer.log_z)
        epoch = state.step * self._config.optim.global_batch / self._num_rows
        pointless, doubtful = problems(by_rank, step=state.step, epoch=epoch, num_bad=num_bad, log_z_drift=drift)
        if self._events is not None:
            self._events.scalars(state.step, {**_bank_values(by_rank), "nce/log_z_drift": drift})
        if pointless and self._config.system.bank_checks == "error":
            raise DeadBankError(
                f"{'; '.join(pointless)}. Nothing was saved since the last checkpoint; system.bank_checks=warn goes on"
            )
        self._warn_once(pointless + doubtful)

    def _warn_once(self, texts: Sequence[str]) -> None:
        """Tell what was not told yet, whatever the rank, the step and the figures."""
        for text in texts:
            kind = re.sub(r"[\d.,+-]+", "", text)
            if kind not in self._told_kinds:
                self._told_kinds.add(kind)
                self.warn(text)

    def show_evaluation(
        self, state: TrainState, evaluation: Evaluation, train_set: Dataset, test_set: Dataset | None
    ) -> None:
        """Tell the kNN accuracies, and draw the neighbours into TensorBoard."""
        # Evaluating is not training: it counts neither for the speed nor for the time to go.
        pause_s = time.monotonic() - self._look_s
        self._look_s += pause_s
        self._started_s += pause_s
        if self._worker.rank != 0 or test_set is None:
            return
        if evaluation.scores:
            epoch = state.step * self._config.optim.global_batch / self._num_rows
            queries = {"num_queries": evaluation.num_queries, "num_test_images": evaluation.num_test_images}
            self._worker.emit(
                {"kind": "knn", "keep": True, "step": state.step, "epoch": epoch, **queries, **evaluation.scores}
            )
        self._warn_once(evaluation.left_out())
        if self._events is not None:
            self._events.knn(state.step, evaluation.scores)
            self._events.neighbours(state.step, train_set, test_set, evaluation.neighbours)

    def saved(self, report: SaveReport | None) -> None:
        """Show what a committed save took, if one was committed."""
        if self._events is not None and report is not None:
            values = {
                "checkpoint/stall_s": report.snapshot_s,
                "checkpoint/write_s": report.write_s,
                "checkpoint/megabytes": report.num_bytes / 1e6,
            }
            self._events.scalars(report.step, values)
            # A run that is killed now goes on from this checkpoint: its curves should not lack points before.
            self._events.flush()

    def summary(self) -> dict[str, Any]:
        """Return what a finished run keeps about how it ran."""
        return {
            "workers": self._worker.world_size,
            "device": str(self._worker.device),
            "torch": torch.__version__,
            "threads_per_worker": self._worker.num_threads,
            "seconds_of_last_attempt": round(time.monotonic() - self._started_s, 1),
            "num_rows": self._num_rows,
        }

    def close(self) -> None:
        """Close the event files."""
        self._cluster.close()
        if self._events is not None:
            self._write_table(self.last_look)  # where the run ended before it was read
            self._events.close()

    def _advise_on_z(self, state: TrainState) -> None:
        if state.config.objective.name != "nce" or self._advised:
            return
        advice = log_z_advice(float(state.normalizer.log_z), float(state.normalizer.running_log_z))
        if advice:
            self._advised = True
            self.warn(advice)

    def tell_bad_images(self, num_bad: int) -> None:
        """Tell of damaged images, once; the report has the rest."""
        if not self._told_bad:
            self._told_bad = True
            self.warn(f"{counted(num_bad, 'damaged image')} so far, replaced in training; listed in {BAD_IMAGES}")

    def warn(self, text: str) -> None:
        """Tell something that a person should know, beside the progress line."""
        self._worker.emit({"kind": "message", "text": f"warning: {text}", "keep": True})

    def _show_cluster(self, step: int, age: dict[str, float]) -> None:
        """Tell how long it took to go on, after the first step, and show what became of the workers so far."""
        recovery_s = self._cluster.take_recovery()
        if recovery_s is not None:
            text = f"went on after {recovery_s:.1f} s ({self._worker.cause.text})"
            self._worker.emit({"kind": "message", "text": text, "keep": True})
        if self._events is not None:
            self._events.scalars(step, {**age, **self._cluster.values(), "cluster/recovery_s": recovery_s})
            self._write_table(step)

    def _write_table(self, step: int) -> None:
        table = self._cluster.take_table()
        if self._events is not None and table is not None:
            self._events.text(step, "cluster/events", table)

    def _write_events(
        self, state: TrainState, means: dict[str, float], lr: float, speed: float, data_wait: float, num_bad: int
    ) -> None:
        if self._events is None:
            return
        values = {
            "train/loss": means["loss"],
            "train/lr": lr,
            "train/images_per_s": speed,
            "train/data_wait": data_wait,
            "train/positive_score": means["positive_score"],
            "train/negative_score": means["negative_score"],
            "data/bad_rows": float(num_bad),
        }
        if state.config.objective.name == "nce":
            values["nce/log_z"] = float(state.normalizer.log_z)
            values["nce/log_z_running"] = float(state.normalizer.running_log_z)
        self._events.scalars(state.step, values)
        last_S = state.bank.last_step[sample_places(len(state.bank.last_step), state.bank.device)]
        written_S = last_S[last_S != NEVER]
        if len(written_S):
            self._events.histogram(state.step, "bank/staleness_steps", (state.step - 1 - written_S).cpu())


def _bank_values(by_rank: Sequence[BankHealth]) -> dict[str, float | None]:
    """Return the shards' health as that of the whole bank."""
    lengths = [h.norm_mean for h in by_rank if h.norm_mean is not None]
    return {
        "bank/row_norm_min": min((h.norm_min for h in by_rank if h.norm_min is not None), default=None),
        "bank/row_norm_mean": statistics.fmean(lengths) if lengths else None,
        "bank/row_norm_max": max((h.norm_max for h in by_rank if h.norm_max is not None), default=None),
        "bank/written_share": sum(h.num_written for h in by_rank) / max(1, sum(h.num_rows for h in by_rank)),
        "bank/staleness_mean": statistics.fmean(
            [h.staleness_mean for h in by_rank if h.staleness_mean is not None] or [0.0]
        ),
        "bank/effective_rank": min((h.effective_rank for h in by_rank if h.effective_rank is not None), default=None),
    }
