"""`bench bank`: what the memory bank costs a training step, against what one would use instead, in the same run.

Sampled negatives against a dense bank with per-sample gather and batched product; the exact softmax against the two
matrix products that it cannot avoid; peak memory of both; and, for one bank after the other, whether the cost depends
on N. With several workers: their steps against a bank that every worker has as a whole, and the bytes that they send.

Shapes: N rows, B samples, K negatives, D feature numbers, W workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.benchmark.bank_steps import (
    PHASES,
    Batches,
    OurBankSteps,
    PlainBankSteps,
    SoftmaxAlone,
    Trials,
    TwoProducts,
)
from instdisc.benchmark.bank_workers import measure_workers
from instdisc.benchmark.environment import environment
from instdisc.benchmark.pairing import BenchmarkError, Contestant, Say, alternate, paired_result, sweep, timed_trial
from instdisc.benchmark.peak_memory import HOW, peak_bytes
from instdisc.benchmark.plain_bank import PlainBank
from instdisc.config_method import ObjectiveConfig
from instdisc.memory_bank import DTYPES, ShardedMemoryBank

SWEEP_ROUNDS = 3
BLOCK_ROWS = (1024, 4096, 16384, 65536, 262144)
AS_RELEASED, KEPT = "memory taken anew in each step, as in the released code", "memory kept from step to step"


@dataclass(frozen=True, kw_only=True)
class BankBenchmark:
    """What `bench bank` measures."""

    objective: ObjectiveConfig
    """Name, temperature, K and form of the negatives."""
    num_rows: int = 1_281_167
    """N; the default is ImageNet's."""
    dim: int = 128
    """D."""
    batch: int = 256
    """B, of all workers together."""
    dtype: str = "float32"
    """Storage of our rows; the alternative's are float32."""
    workers: int = 1
    """With 2 and more, the steps of several workers of this machine are measured, and the bytes that they send."""
    table: tuple[int, ...] = ()
    """N of the table, float16; none: no table."""
    trials: int = 7
    """Timed trials of each side."""
    steps: int = 10
    """Steps of a trial of ours; the alternative makes one."""
    threads: int | None = None
    """CPU threads of both sides; None: all usable cores."""

    def __post_init__(self) -> None:
        for name, found, least in (
            ("trials", self.trials, 1),
            ("steps", self.steps, 1),
            ("rows", self.num_rows, self.batch),
            ("dim", self.dim, 1),
            ("batch", self.batch, 1),
            ("workers", self.workers, 1),
            ("banks of the table, or none", len(self.table) or 2, 2),
            ("least N of the table", min(self.table, default=self.batch), self.batch),
        ):
            if found < least:
                raise BenchmarkError(f"{name}: found {found}, expected at least {least}")
        if self.dtype not in DTYPES:
            raise BenchmarkError(f"dtype: found {self.dtype}, expected one of {', '.join(DTYPES)}")


def bench_bank(benchmark: BankBenchmark, say: Say) -> dict[str, Any]:
    """Measure and return the document; `say` gets lines about what is going on. Takes minutes."""
    before = environment()
    if benchmark.workers > 1:
        results, sweeps = measure_workers(benchmark, say), {}
    else:
        results, sweeps = run_local(_measure, 0, benchmark, say, threads_per_worker=benchmark.threads)[0]
    return {
        "benchmark": "bank",
        "environment": {**before, "load_average_after": environment()["load_average"]},
        "config": _facts(benchmark),
        "results": results,
        "sweeps": sweeps,
    }


def _facts(benchmark: BankBenchmark) -> dict[str, Any]:
    objective = benchmark.objective
    return {
        "objective": objective.name,
        "temperature": objective.temperature,
        "num_negatives": None if objective.name == "softmax" else objective.num_negatives,
        "per_sample": objective.per_sample,
        "num_rows": benchmark.num_rows,
        "dim": benchmark.dim,
        "batch": benchmark.batch,
        "dtype": benchmark.dtype,
        "workers": benchmark.workers,
        "score_mib": objective.score_mib,
        "trials": benchmark.trials,
        "steps_per_trial": benchmark.steps,
    }


def _measure(worker: Worker, benchmark: BankBenchmark, say: Say) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    say(f"starting two banks of {benchmark.num_rows:,} rows")
    bench = _Bench(benchmark, say)
    results, sweeps = bench.against_plain_bank()
    results.append(bench.peak_memory())
    if benchmark.objective.name == "softmax":
        against, sweeps["two matrix products"] = bench.against_two_products()
        results.append(against)
    del bench
    return results + _table(benchmark, say), sweeps


class _Bench:
    """Builds both sides on banks of the same size and compares them."""

    def __init__(self, benchmark: BankBenchmark, say: Say) -> None:
        self.benchmark, self.say = benchmark, say
        self.batches = Batches(benchmark.num_rows, benchmark.dim, benchmark.batch)
        self.our_bank = ShardedMemoryBank(benchmark.num_rows, benchmark.dim, dtype=DTYPES[benchmark.dtype])
        self.plain_rows_ND = start_rows(benchmark.num_rows, benchmark.dim, 0, 0, benchmark.num_rows)

    def ours(self) -> Trials:
        side = OurBankSteps(self.our_bank, self.benchmark.objective, self.batches)
        return Trials(side, self.benchmark.steps)

    def plain(self, setting: str) -> Trials:
        objective = replace(self.benchmark.objective, per_sample=False)
        bank = PlainBank(
            self.plain_rows_ND, objective, momentum=0.5, negatives="per-sample", kept_memory=setting == KEPT
        )
        return Trials(PlainBankSteps(bank, objective, self.batches), 1)

    def against_plain_bank(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Compare whole steps with the alternative as it was released and at its best, and the phases at its best."""
        self.say("sweep of the alternative's settings:")
        settings = (AS_RELEASED,) if self.benchmark.objective.name == "softmax" else (AS_RELEASED, KEPT)
        swept = sweep({name: _builder(self.plain, name) for name in settings}, rounds=SWEEP_ROUNDS, say=self.say)
        results = []
        for setting in dict.fromkeys([swept[0].setting, AS_RELEASED]):
            ours, plain = self.ours(), self.plain(setting)
            results += self._compare(setting, ours, plain, with_phases=setting == swept[0].setting)
        rows = [{"setting": s.setting, "trials": s.seconds, "error": s.error} for s in swept]
        return results, {"plain bank": rows}

    def against_two_products(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Compare the exact softmax, loss and gradient, with the two products at their best block size."""
        rows_ND = self.our_bank.rows.float()
        limit = self.benchmark.objective.score_mib * 2**20 // (4 * self.benchmark.batch)
        sizes = [size for size in BLOCK_ROWS if size <= min(limit, len(rows_ND))] or [max(1, min(limit, len(rows_ND)))]
        self.say("sweep of the two matrix products' block sizes:")
        swept = sweep(
            {f"blocks of {size} rows": _builder(self._two_products, size) for size in sizes},
            rounds=SWEEP_ROUNDS,
            say=self.say,
        )
        best = next(size for size in sizes if swept[0].setting == f"blocks of {size} rows")
        ours = SoftmaxAlone(self.our_bank, self.benchmark.objective, self.batches)
        seconds = alternate(ours, self._two_products(best), trials=self.benchmark.trials)
        result = paired_result(
            "exact softmax against its two products",
            unit="ms",
            ours=[1000 * s for s in seconds.ours],
            reference=[1000 * s for s in seconds.reference],
            higher_is_better=False,
            reference_is=f"two matrix products and nothing else, {swept[0].setting}",
        )
        return result, [{"setting": s.setting, "trials": s.seconds, "error": s.error} for s in swept]

    def peak_memory(self) -> dict[str, Any]:
        """Compare the peak memory of a step beyond the rows themselves, each side in a process of its own."""
        self.say("peak memory, a process for each side")
        rows_bytes = self.benchmark.num_rows * self.benchmark.dim
        peaks = [
            run_local(_peak_of_side, 1, self.benchmark, side, threads_per_worker=self.benchmark.threads)[0]
            - rows_bytes * (DTYPES[self.benchmark.dtype].itemsize if side is None else 4)
            for side in (None, AS_RELEASED)
        ]
        return paired_result(
            "peak memory beside the rows",
            unit="MiB",
            ours=[max(0.01, peaks[0] / 2**20)],
            reference=[peaks[1] / 2**20],
            higher_is_better=False,
            reference_is=AS_RELEASED,
            how=HOW,
        )

    def _two_products(self, block_rows: int) -> TwoProducts:
        return TwoProducts(self.our_bank.rows.float(), self.batches.features_BD, block_rows)

    def _compare(self, setting: str, ours: Trials, plain: Trials, *, with_phases: bool) -> list[dict[str, Any]]:
        steps = self.benchmark.steps
        self.say(f"{self.benchmark.trials} trials of {steps} steps of ours and one of the alternative ({setting})")
        per_step: list[tuple[dict[str, float], dict[str, float]]] = []
        for trial in range(self.benchmark.trials + 1):
            timed_trial(ours, _no_clock)
            timed_trial(plain, _no_clock)
            if trial:  # the first is a warm-up
                mine = {name: s / steps for name, s in ours.phases.seconds.items()}
                per_step.append((mine, dict(plain.phases.seconds)))
        names = ["step", *(PHASES if with_phases else ())]
        return [self._phase(name, setting, per_step) for name in names if name == "step" or name in per_step[0][1]]

    def _phase(
        self, name: str, setting: str, per_step: list[tuple[dict[str, float], dict[str, float]]]
    ) -> dict[str, Any]:
        def milliseconds(phases: dict[str, float]) -> float:
            return 1000 * (sum(phases.values()) if name == "step" else phases[name])

        form = "exact softmax" if self.benchmark.objective.name == "softmax" else "per-sample gather"
        return paired_result(
            f"{name} against {form}" + (", as released" if setting == AS_RELEASED and name == "step" else ""),
            unit="ms",
            ours=[milliseconds(mine) for mine, _ in per_step],
            reference=[milliseconds(theirs) for _, theirs in per_step],
            higher_is_better=False,
            reference_is=f"dense bank, {setting}",
        )


def _peak_of_side(worker: Worker, benchmark: BankBenchmark, setting: str | None) -> int:
    """Return the peak bytes of a side, ours where there is no setting; the process ends afterwards."""

    def set_up() -> Callable[[], None]:
        batches = Batches(benchmark.num_rows, benchmark.dim, benchmark.batch)
        if setting is None:
            bank = ShardedMemoryBank(benchmark.num_rows, benchmark.dim, dtype=DTYPES[benchmark.dtype])
            return OurBankSteps(bank, benchmark.objective, batches).one_step
        objective = replace(benchmark.objective, per_sample=False)
        rows_ND = start_rows(benchmark.num_rows, benchmark.dim, 0, 0, benchmark.num_rows)
        plain = PlainBank(rows_ND, objective, momentum=0.5, negatives="per-sample")
        return PlainBankSteps(plain, objective, batches).one_step

    return peak_bytes(set_up, worker.device)


def _table(benchmark: BankBenchmark, say: Say) -> list[dict[str, Any]]:
    """Compare banks of float16 rows of several N, a trial of each in turn: the fetch, and all of a step but it."""
    if not benchmark.table:
        return []
    wanted, free = sum(benchmark.table) * benchmark.dim * 2, _available_bytes()
    if wanted > 0.9 * free:
        raise BenchmarkError(
            f"table: found banks of {wanted / 1e9:.1f} GB in all, expected less than 90 % of the {free / 1e9:.1f} GB "
            "of memory that are free; give --table fewer or smaller ones"
        )
    steps: dict[int, Trials] = {}
    for num_rows in sorted(benchmark.table):
        say(f"a bank of {num_rows:,} rows in float16")
        bank = ShardedMemoryBank(num_rows, benchmark.dim, dtype=torch.float16)
        batches = Batches(num_rows, benchmark.dim, benchmark.batch)
        steps[num_rows] = Trials(OurBankSteps(bank, benchmark.objective, batches), benchmark.steps)
    taken: dict[int, list[dict[str, float]]] = {num_rows: [] for num_rows in steps}
    for trial in range(benchmark.trials + 1):
        for num_rows, side in steps.items():
            timed_trial(side, _no_clock)
            if trial:
                taken[num_rows].append({k: 1000 * s / benchmark.steps for k, s in side.phases.seconds.items()})
    least = min(steps)
    rest = {n: [sum(p.values()) - p["fetch"] for p in phases] for n, phases in taken.items()}
    fetch = {n: [p["fetch"] for p in phases] for n, phases in taken.items()}
    return [
        paired_result(
            f"{name}, N = {num_rows:,}",
            unit="ms",
            ours=found[num_rows],
            reference=found[least],
            higher_is_better=False,
            reference_is=f"the same with N = {least:,}",
        )
        for name, found in (("step without its fetch", rest), ("fetch alone", fetch))
        for num_rows in steps
        if num_rows != least
    ]


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63


def _builder(build: Callable[[Any], Contestant], setting: Any) -> Callable[[], Contestant]:
    return lambda: build(setting)


def _no_clock() -> float:
    return 0.0
