"""`bench loader`: our image path against torchvision's transforms in a DataLoader, against DALI's own random crops, and
against decoding alone.

All read the same images, at the same size, on the same number of threads, in this process (the DataLoader's workers
beside it), in turn. Two figures for each: images per second, and CPU milliseconds per image of the process with all its
threads and workers, which busy neighbours disturb less.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.worker import Worker, run_local
from dataloading.augment import AugmentConfig
from dataloading.dali_reference import CROPS, DECODE_ONLY, DaliReference
from dataloading.index import Dataset
from dataloading.loader import make_loader
from instdisc.benchmark.environment import environment
from instdisc.benchmark.pairing import BenchmarkError, Say, paired_result, sweep
from instdisc.benchmark.plain_data import PlainData, plain_data_settings
from instdisc.benchmark.timed_steps import LoaderBatches, Source
from instdisc.config_sections import DataConfig
from instdisc.images import open_images

SWEEP_ROUNDS, SWEEP_BATCHES = 2, 6
MADE_UP_IMAGES, MADE_UP_SIZE = 512, (375, 500)
_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class LoaderBenchmark:
    """What `bench loader` measures."""

    data: DataConfig
    """Images to read; without a root, photographs of 500 x 375 pixels are made up."""
    trials: int = 7
    """Timed trials of each side."""
    batches: int = 16
    """Batches of a trial."""
    batch: int = 64
    """Images of a batch."""
    size: int = 224
    """Side of a crop in pixels."""
    threads: int | None = None
    """CPU threads of every side; None: all usable cores."""
    full_sweep: bool = True
    """Whether the DataLoader is tried with 0 to 3 workers, or with as many as there are threads only."""

    def __post_init__(self) -> None:
        for name, found in (
            ("trials", self.trials),
            ("batches", self.batches),
            ("batch", self.batch),
            ("size", self.size),
        ):
            if found < 1:
                raise BenchmarkError(f"{name}: found {found}, expected at least 1")


@dataclass(frozen=True)
class Measured:
    """A trial."""

    seconds: float
    cpu_seconds: float


class Batches:
    """Takes a trial's batches from a source and does nothing with them."""

    def __init__(self, source: Source, num_batches: int) -> None:
        self._source, self._num_batches = source, num_batches
        self._batches: Iterator[Any] = iter(())
        self._next = 0

    def prepare(self) -> None:
        """Open the source and wait until it flows."""
        self._batches = iter(self._source.open(self._next))
        for _ in range(self._source.lead_in_steps):
            next(self._batches)

    def run(self) -> None:
        """Take the batches."""
        for _ in range(self._num_batches):
            next(self._batches)
        self._next += self._num_batches

    def rest(self) -> None:
        """Stop the source."""
        self._source.close()


class DaliBatches:
    """Batches of a plain DALI pipeline, whose images are read in a thread."""

    lead_in_steps = 4

    def __init__(self, dataset: Dataset, reference: DaliReference, batch: int) -> None:
        self._dataset, self._reference, self._batch = dataset, reference, batch
        self._open: Generator[Any] | None = None

    def open(self, step: int) -> Iterator[Any]:
        """Start at a step."""
        self._open = self._endless(step)
        return self._open

    def close(self) -> None:
        """Stop; what the pipeline holds is taken out."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _endless(self, step: int) -> Generator[Any]:
        with ThreadPoolExecutor(1) as pool:
            reading: list[Future[list[bytes]]] = []
            in_pipeline = 0
            try:
                while True:
                    while len(reading) < _AHEAD:
                        reading.append(pool.submit(self._read, step))
                        step += 1
                    while in_pipeline < _AHEAD and reading:
                        self._reference.submit(reading.pop(0).result())
                        in_pipeline += 1
                    in_pipeline -= 1
                    yield self._reference.collect()
            finally:
                for _ in range(in_pipeline):
                    self._reference.collect()

    def _read(self, step: int) -> list[bytes]:
        assert self._dataset.read is not None
        num_rows = self._dataset.index.num_rows
        return [self._dataset.read((step * self._batch + i) % num_rows) for i in range(self._batch)]


def bench_loader(benchmark: LoaderBenchmark, say: Say) -> dict[str, Any]:
    """Measure and return the document; `say` gets lines about what is going on. Takes minutes."""
    return run_local(_measure, 0, benchmark, say, threads_per_worker=benchmark.threads)[0]


def _measure(worker: Worker, benchmark: LoaderBenchmark, say: Say) -> dict[str, Any]:
    before = environment()
    with ExitStack() as stack:
        data = benchmark.data
        if data.root is None and data.kind in ("auto", "folder"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            say(f"making {MADE_UP_IMAGES} JPEG files of {MADE_UP_SIZE[1]} x {MADE_UP_SIZE[0]} pixels")
            make_photographs(Path(folder))
            data = replace(data, root=folder, kind="folder")
        bench = _Bench(
            worker, benchmark, open_images(data, data.train_split, max_rows=data.max_rows, as_packed=True), say, stack
        )
        results, sweeps = bench.all_results()
        facts = bench.facts()
    return {
        "benchmark": "loader",
        "environment": {**before, "load_average_after": environment()["load_average"]},
        "config": facts,
        "results": results,
        "sweeps": sweeps,
    }


class _Bench:
    """Builds the sides and compares them."""

    def __init__(
        self, worker: Worker, benchmark: LoaderBenchmark, dataset: Dataset, say: Say, stack: ExitStack
    ) -> None:
        if dataset.read is None or not dataset.index.num_rows >= benchmark.batch:
            raise BenchmarkError(
                f"{dataset.index.source}: found {dataset.index.num_rows} images"
                f"{'' if dataset.read else ' that are kept in memory decoded'}, expected at least a batch "
                f"({benchmark.batch}) of images larger than that"
            )
        self.worker, self.benchmark, self.dataset, self.say = worker, benchmark, dataset, say
        self._stack = stack
        self.crops = AugmentConfig(
            size=benchmark.size, jitter=(0.0, 0.0, 0.0, 0.0), grayscale_probability=0.0, flip_probability=0.5
        )
        self.colors = AugmentConfig(size=benchmark.size)

    def all_results(self) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Return all comparisons, and the sweeps of the DataLoader's settings."""
        results: list[dict[str, Any]] = []
        sweeps = {}
        for name, augment in (("crop and flip", self.crops), ("crop, flip and colour", self.colors)):
            plain, settings, sweeps[name] = self._best_plain(name, augment)
            results += self._compare(name, self._ours(augment), plain, f"torchvision DataLoader, {settings}")
        plain_crops = replace(self.crops, flip_probability=0.0)
        dali = "a plain DALI pipeline: image_random_crop with DALI's random numbers, resize; its crops in torch"
        results += self._compare("crop", self._ours(plain_crops), self._dali(CROPS), dali)
        bound = "a plain DALI pipeline that decodes whole images, and nothing else"
        results += self._compare("crop against decoding alone", self._ours(plain_crops), self._dali(DECODE_ONLY), bound)
        return results, sweeps

    def facts(self) -> dict[str, Any]:
        """Return what was measured, JSON-able."""
        index = self.dataset.index
        return {
            "images": index.source if self.benchmark.data.root else "made up",
            "num_images": index.num_rows,
            "mean_bytes": None if index.num_bytes_N is None else round(float(index.num_bytes_N.mean())),
            "median_pixels": [int(np.median(index.widths_N)), int(np.median(index.heights_N))],
            "batch": self.benchmark.batch,
            "size": self.benchmark.size,
            "threads": self.worker.num_threads,
            "trials": self.benchmark.trials,
            "batches_per_trial": self.benchmark.batches,
        }

    def _ours(self, augment: AugmentConfig) -> LoaderBatches:
        loader = make_loader(
            self.dataset,
            augment,
            seed=0,
            global_batch=self.benchmark.batch,
            offsets=(0, self.benchmark.batch),
            device=self.worker.device,
            num_threads=self.worker.num_threads,
            order=self.benchmark.data.order_config,
        )
        self._stack.callback(loader.close)
        return LoaderBatches(loader)

    def _dali(self, what: str) -> DaliBatches:
        reference = DaliReference(
            what,
            size=self.benchmark.size,
            scale=self.crops.scale,
            ratio=self.crops.ratio,
            max_batch=self.benchmark.batch,
            num_threads=self.worker.num_threads,
        )
        return DaliBatches(self.dataset, reference, self.benchmark.batch)

    def _best_plain(self, name: str, augment: AugmentConfig) -> tuple[PlainData, str, list[dict[str, Any]]]:
        """Return the DataLoader with its fastest settings, their name, and the whole sweep."""
        workers = range(4) if self.benchmark.full_sweep else (self.worker.num_threads,)
        tried = {s.name: s for s in plain_data_settings(workers, with_batch_normalize=True)}
        self.say(f"sweep of the DataLoader's settings ({name}):")
        num_batches = min(SWEEP_BATCHES, self.benchmark.batches)

        def side(setting: str) -> Callable[[], Batches]:
            return lambda: Batches(self._plain(augment, setting, tried), num_batches)

        swept = sweep({setting: side(setting) for setting in tried}, rounds=SWEEP_ROUNDS, say=self.say)
        images = num_batches * self.benchmark.batch
        rows = [{"setting": s.setting, "trials": [images / t for t in s.seconds], "error": s.error} for s in swept]
        return self._plain(augment, swept[0].setting, tried), swept[0].setting, rows

    def _plain(self, augment: AugmentConfig, setting: str, tried: dict[str, Any]) -> PlainData:
        return PlainData(self.dataset, augment, self.benchmark.batch, tried[setting], self.worker.device)

    def _compare(self, name: str, ours: Source, reference: Source, reference_is: str) -> list[dict[str, Any]]:
        """Measure both in turn; return one result for the speed and one for the CPU time."""
        self.say(f"{name}: {self.benchmark.trials} trials of each side in turn")
        sides = [Batches(source, self.benchmark.batches) for source in (ours, reference)]
        trials: list[list[Measured]] = [[], []]
        for number in range(self.benchmark.trials + 1):
            for side, measured in zip(sides, trials, strict=True):
                trial = _timed(side)
                if number:  # the first is a warm-up
                    measured.append(trial)
        images = self.benchmark.batches * self.benchmark.batch
        speeds, costs = (
            [[images / t.seconds for t in side] for side in trials],
            [[1e3 * t.cpu_seconds / images for t in side] for side in trials],
        )
        return [
            paired_result(
                name,
                unit="images/s",
                ours=speeds[0],
                reference=speeds[1],
                higher_is_better=True,
                reference_is=reference_is,
            ),
            paired_result(
                f"{name}, CPU time",
                unit="CPU-ms/image",
                ours=costs[0],
                reference=costs[1],
                higher_is_better=False,
                reference_is=reference_is,
            ),
        ]


def _timed(side: Batches) -> Measured:
    side.prepare()
    try:
        started_s, started_cpu_s = time.perf_counter(), cpu_seconds()
        side.run()
        return Measured(time.perf_counter() - started_s, cpu_seconds() - started_cpu_s)
    finally:
        side.rest()


def cpu_seconds() -> float:
    """Return the CPU time so far of this process, all its threads, and its living child processes."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def make_photographs(folder: Path, num: int = MADE_UP_IMAGES, size: tuple[int, int] = MADE_UP_SIZE) -> None:
    """Write JPEG files of some 100 kB with the spectrum of photographs: amplitudes fall with the frequency."""
    height, width = size
    generator = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    amplitudes = 1.0 / np.maximum(frequencies, 1.0 / max(size))
    for number in range(num):
        noise = np.fft.rfft2(generator.standard_normal((3, height, width)))
        planes = np.fft.irfft2(noise * amplitudes, s=size)
        planes[1:] = 0.8 * planes[0] + 0.2 * planes[1:]  # the colours of a photograph go together
        planes = 128 + 55 * (planes - planes.mean()) / planes.std()
        pixels_HWC = np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG", quality=90)
        (folder / f"{number:04d}.jpg").write_bytes(file.getvalue())
