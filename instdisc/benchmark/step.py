"""`bench step`: our training step against a plain PyTorch loop over a dense bank.

Two comparisons for each form of the alternative: the step on images made beforehand, and the step with data loading.
Both sides have the same network with the same start, the same bank, batch and threads, in the same process, and make
steps that change their state; the alternative has the fastest of its settings.

Shapes: N rows of the data set, B samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cluster.worker import Worker, run_local
from dataloading.index import Dataset, dataset_of_pixels
from dataloading.loader import Batch, make_loader
from dataloading.order import make_order
from instdisc.benchmark.environment import environment
from instdisc.benchmark.pairing import BenchmarkError, Say, alternate, paired_result, sweep
from instdisc.benchmark.peak_memory import HOW, peak_bytes
from instdisc.benchmark.plain_data import PlainData, PlainDataSettings, plain_data_settings
from instdisc.benchmark.plain_loop import NEGATIVES, PlainLoop, PlainSettings, plain_settings
from instdisc.benchmark.timed_steps import LoaderBatches, PreparedBatches, Source, TimedSteps
from instdisc.config import TrainConfig
from instdisc.images import open_images
from instdisc.train.plan import BatchPlan
from instdisc.train.state import MIN_CHANNELS_LAST_ON_CPU, build_state
from instdisc.train.step import Stepper

NUM_PREPARED, SWEEP_ROUNDS, MOST_SWEEP_STEPS = 4, 3, 5
MADE_UP_ROWS, MADE_UP_BYTES = 50_000, 2**30


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """What `bench step` measures."""

    config: TrainConfig
    """The recipe; its bank, network, batch and objective are those of both sides."""
    use_own_images: bool = False
    """Whether to read the images that the configuration names; else images are made up."""
    trials: int = 7
    """Timed trials of each side."""
    steps: int = 10
    """Steps of a trial."""
    threads: int | None = None
    """CPU threads of both sides; None: all usable cores."""
    full_sweep: bool = True
    """Whether the sweep includes torch.compile and worker processes of the DataLoader, which take minutes."""

    def __post_init__(self) -> None:
        for name, found in (("trials", self.trials), ("steps", self.steps)):
            if found < 1:
                raise BenchmarkError(f"{name}: found {found}, expected at least 1")


def bench_step(benchmark: StepBenchmark, say: Say) -> dict[str, Any]:
    """Measure and return the document; `say` gets lines about what is going on. Takes minutes."""
    return run_local(_measure, 0, benchmark, say, threads_per_worker=benchmark.threads)[0]


def _measure(worker: Worker, benchmark: StepBenchmark, say: Say) -> dict[str, Any]:
    before = environment()
    bench = _Bench(worker, benchmark, say)
    forms = ("shared",) if benchmark.config.objective.name == "softmax" else NEGATIVES
    results, sweeps = [], {}
    for form in forms:
        settings, sweeps[f"plain loop, {form}"] = bench.best_plain(form)
        results += [bench.compare_steps(settings), bench.compare_memory(settings)]
        if form == "shared":
            data_settings, sweeps["plain loader"] = bench.best_plain_data(settings)
            results.append(bench.compare_with_data(settings, data_settings))
    return {
        "benchmark": "step",
        "environment": {**before, "load_average_after": environment()["load_average"]},
        "config": bench.facts(),
        "results": results,
        "sweeps": sweeps,
    }


class _Bench:
    """Builds both sides and compares them."""

    def __init__(self, worker: Worker, benchmark: StepBenchmark, say: Say) -> None:
        self.worker, self.benchmark, self.say = worker, benchmark, say
        # The plain loop has no schedule; with one, the two sides would soon train different weights.
        self.config = benchmark.config.with_overrides({"optim.schedule": "constant", "optim.warmup_epochs": 0})
        self.dataset = _open_images(benchmark)
        self.num_rows = self.dataset.index.num_rows
        self.batch_size = self.config.optim.global_batch
        self.sweep_steps = min(benchmark.steps, MOST_SWEEP_STEPS)
        self.prepared = _prepare_batches(self.config, self.dataset, worker)

    def best_plain(self, form: str) -> tuple[PlainSettings, list[dict[str, Any]]]:
        """Return the alternative's fastest settings for a form of negatives, and the whole sweep."""
        tried = {s.name: s for s in plain_settings(form, with_compile=self.benchmark.full_sweep)}
        self.say(f"sweep of the plain loop's settings ({self._form(form)}):")
        if self.worker.device.type == "cpu" and self.config.model.min_channels < MIN_CHANNELS_LAST_ON_CPU:
            tried = {name: s for name, s in tried.items() if not s.channels_last}
            fewer = f"fewer than {MIN_CHANNELS_LAST_ON_CPU} channels"
            self.say(f"  channels_last: left out, torch crashes on CPUs with {fewer}")
        best, swept = self._sweep({name: self._plain_builder(settings) for name, settings in tried.items()})
        return tried[best], swept

    def best_plain_data(self, settings: PlainSettings) -> tuple[PlainDataSettings, list[dict[str, Any]]]:
        """Return the alternative's fastest data loading for its fastest step, and the whole sweep."""
        most_workers = self.worker.num_threads if self.benchmark.full_sweep else 0
        tried = {s.name: s for s in plain_data_settings(range(most_workers + 1))}
        self.say("sweep of the plain loader's settings:")
        builders = {name: self._plain_data_builder(settings, data) for name, data in tried.items()}
        best, swept = self._sweep(builders)
        return tried[best], swept

    def compare_steps(self, settings: PlainSettings) -> dict[str, Any]:
        """Compare steps on images made beforehand."""
        training, ours = self._ours(self._prepared_source())
        plain, reference = self._plain(settings, self._prepared_source())
        result = self._alternate(f"step{self._suffix(settings)}", ours, reference, settings.name)
        losses = {"loss": training.sums.read()["loss"], "reference_loss": plain.mean_loss()}
        if not all(map(math.isfinite, losses.values())):
            raise BenchmarkError(f"mean loss of the two sides: found {losses}, expected finite numbers; lower optim.lr")
        return {**result, **losses}

    def compare_with_data(self, settings: PlainSettings, data: PlainDataSettings) -> dict[str, Any]:
        """Compare steps with the loading and augmentation of their batches."""
        loader = _make_loader(self.config, self.dataset, self.worker)
        try:
            _, ours = self._ours(LoaderBatches(loader))
            _, reference = self._plain(settings, self._plain_source(data))
            return self._alternate("step with data loading", ours, reference, f"{settings.name}; {data.name}")
        finally:
            loader.close()

    def compare_memory(self, settings: PlainSettings) -> dict[str, Any]:
        """Compare the peak memory of steps on images made beforehand, each side in a process of its own."""
        self.say("peak memory, a process for each side")
        peaks = [
            run_local(_peak_of_side, 1, self.benchmark, side, threads_per_worker=self.worker.num_threads)[0] / 2**20
            for side in (None, settings)
        ]
        return paired_result(
            f"peak memory{self._suffix(settings)}",
            unit="MiB",
            ours=peaks[:1],
            reference=peaks[1:],
            higher_is_better=False,
            reference_is=settings.name,
            how=HOW,
        )

    def peak_side(self, settings: PlainSettings | None) -> Callable[[], None]:
        """Return the work whose peak memory counts: our steps, or the alternative's with its settings."""
        source = self._prepared_source()
        side = self._ours(source)[1] if settings is None else self._plain(settings, source)[1]

        def work() -> None:
            side.prepare()
            side.run()
            side.rest()

        return work

    def facts(self) -> dict[str, Any]:
        """Return what was measured, JSON-able."""
        config = self.config
        return {
            "recipe": config.recipe,
            "objective": config.objective.name,
            "num_negatives": None if config.objective.name == "softmax" else config.objective.num_negatives,
            "architecture": config.model.architecture,
            "width": config.model.width,
            "feature_dim": config.model.feature_dim,
            "num_rows": self.num_rows,
            "images": self.dataset.index.source,
            "global_batch": self.batch_size,
            "image_size": config.augment.size,
            "precision": config.system.precision,
            "channels_last": config.system.channels_last,
            "trials": self.benchmark.trials,
            "steps_per_trial": self.benchmark.steps,
        }

    def _alternate(self, name: str, ours: TimedSteps, reference: TimedSteps, reference_is: str) -> dict[str, Any]:
        self.say(f"{name}: {self.benchmark.trials} trials of each side in turn")
        seconds = alternate(ours, reference, trials=self.benchmark.trials)
        images = self.benchmark.steps * self.batch_size
        return paired_result(
            name,
            unit="images/s",
            ours=[images / s for s in seconds.ours],
            reference=[images / s for s in seconds.reference],
            higher_is_better=True,
            reference_is=reference_is,
        )

    def _sweep(self, builders: dict[str, Callable[[], TimedSteps]]) -> tuple[str, list[dict[str, Any]]]:
        swept = sweep(builders, rounds=SWEEP_ROUNDS, say=self.say)
        images = self.sweep_steps * self.batch_size
        rows = [{"setting": s.setting, "trials": [images / t for t in s.seconds], "error": s.error} for s in swept]
        return swept[0].setting, rows

    def _ours(self, source: Source) -> tuple[Stepper, TimedSteps]:
        plan = BatchPlan(self.batch_size, self.batch_size, 1)
        order = make_order(
            self.dataset, self.config.data.order_config, seed=self.config.seed, global_batch=self.batch_size
        )
        stepper = Stepper(build_state(self.config, self.num_rows, self.worker), plan, self.worker, order)
        return stepper, TimedSteps(stepper, source, self.benchmark.steps, self.worker.device)

    def _plain(
        self, settings: PlainSettings, source: Source, num_steps: int | None = None
    ) -> tuple[PlainLoop, TimedSteps]:
        loop = PlainLoop(self.config, self.num_rows, settings, self.worker.device)
        return loop, TimedSteps(loop, source, num_steps or self.benchmark.steps, self.worker.device)

    def _plain_builder(self, settings: PlainSettings) -> Callable[[], TimedSteps]:
        return lambda: self._plain(settings, self._prepared_source(), self.sweep_steps)[1]

    def _plain_data_builder(self, settings: PlainSettings, data: PlainDataSettings) -> Callable[[], TimedSteps]:
        return lambda: self._plain(settings, self._plain_source(data), self.sweep_steps)[1]

    def _plain_source(self, data: PlainDataSettings) -> PlainData:
        return PlainData(self.dataset, self.config.augment, self.batch_size, data, self.worker.device)

    def _prepared_source(self) -> PreparedBatches:
        return PreparedBatches(
            self.prepared,
            num_rows=self.num_rows,
            global_batch=self.batch_size,
            seed=self.config.seed,
            num_steps=self.benchmark.steps,
        )

    def _form(self, form: str) -> str:
        return "dense softmax" if self.config.objective.name == "softmax" else f"{form} negatives"

    def _suffix(self, settings: PlainSettings) -> str:
        return "" if self.config.objective.name == "softmax" else f" against {settings.negatives} negatives"


def _peak_of_side(worker: Worker, benchmark: StepBenchmark, settings: PlainSettings | None) -> int:
    """Return the peak bytes of a side; the process ends afterwards."""
    bench = _Bench(worker, benchmark, lambda _: None)
    return peak_bytes(lambda: bench.peak_side(settings), worker.device)


def _open_images(benchmark: StepBenchmark) -> Dataset:
    data, size = benchmark.config.data, benchmark.config.augment.size
    if benchmark.use_own_images:
        return open_images(data, data.train_split, max_rows=data.max_rows, as_packed=True)
    num_rows = data.max_rows or MADE_UP_ROWS
    if num_rows * size * size * 3 > MADE_UP_BYTES:
        raise BenchmarkError(
            f"made-up images: found {num_rows:,} of {size} x {size} pixels, expected at most "
            f"{MADE_UP_BYTES / 2**30:g} GiB; give a smaller --data.max_rows, or images with --data.root"
        )
    generator = np.random.default_rng(0)
    # Coarse noise enlarged by 4: what photographs share with it, unlike fine noise, is that neighbours are alike.
    coarse = generator.integers(0, 256, (num_rows, -(-size // 4), -(-size // 4), 3), dtype=np.uint8)
    pixels_NHWC = np.ascontiguousarray(coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :size, :size])
    return dataset_of_pixels("made-up images", pixels_NHWC, None, (), (f"made-up/{row}" for row in range(num_rows)))


def _make_loader(config: TrainConfig, dataset: Dataset, worker: Worker):
    return make_loader(
        dataset,
        config.augment,
        seed=config.seed,
        global_batch=config.optim.global_batch,
        offsets=(0, config.optim.global_batch),
        device=worker.device,
        num_threads=worker.num_threads,
        backend=config.data.backend,
        order=config.data.order_config,
    )


def _prepare_batches(config: TrainConfig, dataset: Dataset, worker: Worker) -> list[Batch]:
    loader = _make_loader(config, dataset, worker)
    try:
        return list(islice(loader.batches(0), NUM_PREPARED))
    finally:
        loader.close()
