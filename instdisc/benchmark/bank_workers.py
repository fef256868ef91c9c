"""`bench bank` with several workers: the time of their steps, and what they send, by the formula and by the interface.

Shapes: G samples of all ranks, K negatives, D feature numbers, W ranks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.benchmark.bank_steps import PHASES, Batches, OurBankSteps, PlainBankSteps, Trials
from instdisc.benchmark.pairing import Say, paired_result
from instdisc.benchmark.plain_bank import PlainBank
from instdisc.memory_bank import DTYPES, ShardedMemoryBank

if TYPE_CHECKING:
    from instdisc.benchmark.bank import BankBenchmark


def expected_bytes(
    *, global_batch: int, num_negatives: int, dim: int, world_size: int, number_bytes: int, sums: int = 0
) -> dict[str, float]:
    """Return the bytes that a rank sends in a step: O(G*D + K*D), whatever N.

    In a ring, each of the W ranks sends (W-1)/W of what is gathered in all: the rows of samples and K shared negatives
    in the bank's own numbers of `number_bytes` bytes, features in float32, and a byte of validity for each sample.
    sums: numbers beside the D of the weighted rows that owners send for each sample (exact softmax 1, negatives of each
    sample 2); the features then travel once more, before the loss.
    """
    share = (world_size - 1) / world_size
    parts = {
        "rows": share * (global_batch + num_negatives) * dim * number_bytes,
        "features": share * global_batch * dim * 4,
        "validity": share * global_batch,
    }
    if sums:
        parts["features before the loss"] = share * global_batch * dim * 4
        parts["sums of the owners"] = share * global_batch * (dim + sums) * 4
    return parts


def measure_workers(benchmark: BankBenchmark, say: Say) -> list[dict[str, Any]]:
    """Return what the steps of several workers of this machine take and send.

    Times are those of rank 0, against a bank that every worker has as a whole. Bytes are all that the loopback
    interface carries during our trials, against the formula.
    """
    say(f"{benchmark.workers} workers on this machine, {benchmark.trials} trials of {benchmark.steps} steps")
    ours, theirs, sent = run_local(_trials, benchmark.workers, benchmark, threads_per_worker=benchmark.threads)[0]
    parts = expected_bytes(
        global_batch=benchmark.batch,
        num_negatives=benchmark.objective.num_shared_negatives,
        dim=benchmark.dim,
        world_size=benchmark.workers,
        number_bytes=DTYPES[benchmark.dtype].itemsize,
        sums=1 if benchmark.objective.name == "softmax" else 2 * benchmark.objective.per_sample,
    )
    form = "one product" if benchmark.objective.name == "softmax" else "per-sample gather in memory that is kept"
    results = [
        paired_result(
            f"{name} of {benchmark.workers} workers",
            unit="ms",
            ours=[1000 * (sum(phases.values()) if name == "step" else phases[name]) for phases in ours],
            reference=[1000 * (sum(phases.values()) if name == "step" else phases[name]) for phases in theirs],
            higher_is_better=False,
            reference_is=f"a whole dense bank on every worker, {form}",
        )
        for name in ("step", *PHASES)
        if name == "step" or name in theirs[0]
    ]
    traffic = paired_result(
        "bytes sent by a rank in a step",
        unit="bytes",
        ours=sent,
        reference=[sum(parts.values())] * len(sent),
        higher_is_better=False,
        reference_is="the formula, without headers and padding",
        formula=parts,
    )
    return [*results, traffic]


def _trials(
    worker: Worker, benchmark: BankBenchmark
) -> tuple[list[dict[str, float]], list[dict[str, float]], list[float]]:
    group = dist.new_group()
    batches = Batches(benchmark.num_rows, benchmark.dim, benchmark.batch)
    bank = ShardedMemoryBank(benchmark.num_rows, benchmark.dim, dtype=DTYPES[benchmark.dtype], group=group)
    ours = Trials(OurBankSteps(bank, benchmark.objective, batches), benchmark.steps)
    plain = PlainBank(
        start_rows(benchmark.num_rows, benchmark.dim, 0, 0, benchmark.num_rows),
        replace(benchmark.objective, per_sample=False),
        momentum=0.5,
        negatives="per-sample",
        kept_memory=True,
    )
    theirs = Trials(PlainBankSteps(plain, benchmark.objective, batches, group), 1)
    our_phases, their_phases, sent = [], [], []
    for trial in range(benchmark.trials + 1):
        ours.prepare()
        before = _loopback_bytes(worker)
        ours.run()
        sent_bytes = (_loopback_bytes(worker) - before) / benchmark.steps / worker.world_size
        theirs.prepare()
        dist.barrier(worker.control_group)
        theirs.run()
        if trial:  # the first is a warm-up
            our_phases.append({name: s / benchmark.steps for name, s in ours.phases.seconds.items()})
            their_phases.append(dict(theirs.phases.seconds))
            sent.append(sent_bytes)
    return our_phases, their_phases, sent


def _loopback_bytes(worker: Worker) -> int:
    """Return what the loopback interface has sent, once all ranks are here."""
    dist.barrier(worker.control_group)
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise OSError("/proc/net/dev: found no interface lo, expected one")
