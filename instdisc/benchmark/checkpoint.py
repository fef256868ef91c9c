"""`bench checkpoint`: what checkpoints cost, each figure against a plain alternative in the same run.

Bytes per second of saves and restores against plain writes and reads of the same objects; what a save makes training
wait against a copy of weights and momenta in memory; training steps beside saves against steps without; bytes of a save
against the rows written since the save before; and the peak memory of saves and restores.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from cluster.coordination import CoordinatorSpec
from cluster.retention import Retention
from cluster.store import Store
from cluster.worker import run_local
from instdisc.benchmark.checkpoint_memory import Peak, peak_of_restore, peak_of_save
from instdisc.benchmark.checkpoint_state import CheckpointTask
from instdisc.benchmark.checkpoint_steps import measure_steps
from instdisc.benchmark.checkpoint_throughput import measure_throughput
from instdisc.benchmark.environment import environment
from instdisc.benchmark.pairing import BenchmarkError, Say, paired_result
from instdisc.config import TrainConfig

PARTS = ("throughput", "steps", "memory")
_KEEP_ALL = 1_000_000


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark:
    """What `bench checkpoint` measures."""

    config: TrainConfig
    """Network, batch, objective and bank of the state that is saved."""
    num_rows: int = 1_281_167
    """N; the default is ImageNet's."""
    workers: int = 1
    """Processes of this machine."""
    uri: str | None = None
    """Folder or URI below which checkpoints are written and removed; None: the folder for temporary files."""
    num_threads: int = 4
    """Threads of an upload or a restore, of every rank, ours and the alternative's."""
    interval_s: float = 60.0
    """Seconds from one save to the next beside training."""
    trials: int = 5
    """Timed trials of each side."""
    threads: int | None = None
    """CPU threads of each worker; None: an equal part of the usable cores."""
    parts: tuple[str, ...] = PARTS
    """Which of `PARTS` are measured."""

    def __post_init__(self) -> None:
        for name, found, least in (
            ("trials", self.trials, 1),
            ("rows", self.num_rows, max(self.workers, self.config.optim.global_batch)),
            ("workers", self.workers, 1),
            ("upload threads", self.num_threads, 1),
        ):
            if found < least:
                raise BenchmarkError(f"{name}: found {found}, expected at least {least}")
        if self.interval_s <= 0:
            raise BenchmarkError(f"interval: found {self.interval_s} s, expected more than 0")


def bench_checkpoint(benchmark: CheckpointBenchmark, say: Say) -> dict[str, Any]:
    """Measure and return the document; `say` gets lines about what is going on. Takes minutes."""
    before = environment()
    folder = None if benchmark.uri else tempfile.mkdtemp(prefix="bench-checkpoint-")
    base = f"{benchmark.uri or folder}/bench-checkpoint-{uuid4().hex[:12]}"
    bench = _Bench(benchmark, base, say)
    results: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    try:
        for part, measure in (
            ("throughput", bench.throughput),
            ("steps", bench.steps),
            ("memory", bench.memory),
        ):
            if part in benchmark.parts:
                found, facts = measure()
                results += found
                more |= facts
    finally:
        remove_all(Store(base))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "benchmark": "checkpoint",
        "environment": {**before, "load_average_after": environment()["load_average"]},
        "config": _facts(benchmark),
        "results": results,
        **more,
    }


def remove_all(store: Store) -> None:
    """Remove everything below a URI."""
    if store.protocol == "file":
        shutil.rmtree(store.root, ignore_errors=True)
        return
    for key in store.list():
        store.delete(key)


class _Bench:
    """Runs the parts, each in processes of its own, and makes results of what they found."""

    def __init__(self, benchmark: CheckpointBenchmark, base: str, say: Say) -> None:
        self._benchmark, self._base, self._say = benchmark, base, say

    def throughput(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Compare saves and restores with plain writes and reads."""
        found = self._run(measure_throughput, self._task("throughput"))[0]
        megabytes = found["bytes"] / 1e6
        names = [name for name in found if name.startswith(("save", "restore"))]
        results = [
            paired_result(
                name,
                unit="MB/s",
                ours=[megabytes / s for s in found[name]["ours"]],
                reference=[megabytes / s for s in found[name]["reference"]],
                higher_is_better=True,
                reference_is="plain writes of the same objects"
                if name == "save"
                else f"plain reads of the same objects, {found['setting']}",
            )
            for name in names
        ]
        return results, {"bytes": found["bytes"], "sweeps": {"plain reads": found["sweep"]}}

    def steps(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Compare training with and without saves, whole ones and increments; and their bytes."""
        results, saves = [], {}
        for kind in ("whole", "incremental"):
            task = replace(self._task(kind), incremental=kind == "incremental")
            found = self._run(measure_steps, task)[0]
            saves[kind] = found["saves"]
            results += _of_steps(kind, found)
        results.append(
            paired_result(
                "bytes of an incremental save",
                unit="MB",
                ours=[save["num_bytes"] / 1e6 for save in saves["incremental"]],
                reference=[save["num_bytes"] / 1e6 for save in saves["whole"]],
                higher_is_better=False,
                reference_is="a whole save",
            )
        )
        return results, {"saves": saves}

    def memory(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Compare the peak memory of saves and restores with what it may be."""
        results = []
        self._say("peak memory of a save and of a restore, in processes of their own")
        for name, measure in (("save", peak_of_save), ("restore", peak_of_restore)):
            peaks: list[Peak] = self._run(measure, self._task("memory"))
            worst = max(peaks, key=lambda peak: peak.num_bytes / peak.limit_bytes)
            results.append(
                paired_result(
                    f"peak memory of a {name}, rows included",
                    unit="MiB",
                    ours=[worst.num_bytes / 2**20],
                    reference=[worst.limit_bytes / 2**20],
                    higher_is_better=False,
                    reference_is="the limit: 1.25 times the rank's rows and last steps, and 256 MiB",
                    shard_mib=worst.shard_bytes / 2**20,
                    process_mib=worst.process_bytes / 2**20,
                )
            )
        return results, {}

    def _run(self, function: Callable[..., Any], task: CheckpointTask) -> list[Any]:
        return run_local(
            function,
            self._benchmark.workers,
            task,
            on_event=lambda event: self._say(event["text"]),
            threads_per_worker=self._benchmark.threads,
            coordinator=CoordinatorSpec(uri=task.uri, retention=Retention(last=_KEEP_ALL)),
        )

    def _task(self, part: str) -> CheckpointTask:
        return CheckpointTask(
            config_json=self._benchmark.config.to_json(),
            num_rows=self._benchmark.num_rows,
            uri=f"{self._base}/{part}",
            num_threads=self._benchmark.num_threads,
            trials=self._benchmark.trials,
            interval_s=self._benchmark.interval_s,
        )


def _of_steps(kind: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    saves, num_steps = found["saves"], found["num_steps"]
    speed = paired_result(
        f"steps beside {kind} saves",
        unit="steps/s",
        ours=[num_steps / save["span_s"] for save in saves],
        reference=[num_steps / s for s in found["without_s"]],
        higher_is_better=True,
        reference_is="the same number of steps without a save",
        steps_of_a_span=num_steps,
        saves_ended_within_the_span=all(save["ended_within_span"] for save in saves),
    )
    stall = paired_result(
        "wait for a whole save" if kind == "whole" else "wait for an incremental save",
        unit="ms",
        ours=[1000 * save["stall_s"] for save in saves],
        reference=[1000 * save["copy_s"] for save in saves],
        higher_is_better=False,
        reference_is="a copy of weights and momenta to memory that is there",
        ms_beyond_the_copy=[1000 * (save["stall_s"] - save["copy_s"]) for save in saves],
    )
    if kind == "whole":
        return [speed, stall]
    touched = paired_result(
        "bytes of tables in an incremental save",
        unit="MB",
        ours=[save["table_bytes"] / 1e6 for save in saves],
        reference=[save["touched_bytes"] / 1e6 for save in saves],
        higher_is_better=False,
        reference_is="the rows written since the save before, and the steps of their last writes",
    )
    return [speed, stall, touched]


def _facts(benchmark: CheckpointBenchmark) -> dict[str, Any]:
    config = benchmark.config
    return {
        "num_rows": benchmark.num_rows,
        "dim": config.model.feature_dim,
        "dtype": config.bank.dtype,
        "architecture": config.model.architecture,
        "width": config.model.width,
        "objective": config.objective.name,
        "global_batch": config.optim.global_batch,
        "image_size": config.augment.size,
        "workers": benchmark.workers,
        "store": Store(benchmark.uri).protocol if benchmark.uri else "file",
        "upload_threads": benchmark.num_threads,
        "bandwidth_share_beside_training": config.checkpoint.bandwidth_share,
        "interval_s": benchmark.interval_s,
        "trials": benchmark.trials,
    }
