"""A large bank saved on some workers and restored on others: time, peak memory of every rank, and every row checked.

    uv run python tests/benchmarks/measure_large_checkpoint.py --store DIR --out result.json
    uv run python tests/benchmarks/on_s3.py uv run python tests/benchmarks/measure_large_checkpoint.py --store s3://images/x

A whole save, then an increment after some rows were written, and restores of both together. After each restore every
rank makes the rows anew that it should hold, and compares. Needs room for the bank in memory and twice below the URI.

Shapes: N rows, R rows of a rank, D feature numbers, W ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from cluster.checkpoint import Checkpointer
from cluster.coordination import CoordinatorSpec
from cluster.store import Store
from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.benchmark.checkpoint import remove_all
from instdisc.benchmark.checkpoint_memory import PeakMeter
from instdisc.benchmark.checkpoint_state import CheckpointTask, checkpointer_of, start_save, state_of
from instdisc.benchmark.environment import environment
from instdisc.recipes import recipe
from instdisc.train.state import TrainState

WRITTEN_EVERY, WRITTEN_STEP = 97, 1
CHECK_ROWS = 1 << 18


def save(worker: Worker, task: CheckpointTask) -> dict[str, Any]:
    """Save whole, write every 97th row, save what was written; return figures of this rank."""
    meter = PeakMeter()
    state = state_of(task, worker)
    checkpointer = checkpointer_of(task, worker)
    try:
        whole = one_save(worker, checkpointer, state, meter)
        write_some_rows(state)
        return {"whole": whole, "increment": one_save(worker, checkpointer, state, meter)}
    finally:
        checkpointer.close()


def one_save(worker: Worker, checkpointer: Checkpointer, state: TrainState, meter: PeakMeter) -> dict[str, Any]:
    worker.all_gather_object(None)
    meter.start()
    started_s = time.perf_counter()
    start_save(checkpointer, state)
    report = checkpointer.wait()
    seconds = time.perf_counter() - started_s
    assert report is not None
    state.step += 1
    return {
        "seconds": seconds,
        "stall_s": report.stall_s,
        "write_s": report.write_s,
        "commit_s": report.commit_s,
        "num_bytes_of_all_ranks": report.num_bytes,
        "is_base": report.is_base,
        **memory_of(meter, state),
    }


def write_some_rows(state: TrainState) -> None:
    bank = state.bank
    numbers = torch.arange(-(-bank.start // WRITTEN_EVERY) * WRITTEN_EVERY, bank.stop, WRITTEN_EVERY) - bank.start
    with bank.guard.writing(numbers.numpy()):
        bank.rows[numbers] = -bank.rows[numbers]
        bank.last_step[numbers] = WRITTEN_STEP


def restore(worker: Worker, task: CheckpointTask) -> dict[str, Any]:
    """Restore as training does, into rows that hold nothing of it; return figures of this rank, and compare rows."""
    meter = PeakMeter()
    state = state_of(task, worker)
    state.bank.rows.zero_()
    checkpointer = Checkpointer(task.store, worker=worker, coordinator=worker.coordinator, num_threads=task.num_threads)
    worker.all_gather_object(None)
    meter.start()
    started_s = time.perf_counter()
    found = checkpointer.restore(state.load)
    seconds = time.perf_counter() - started_s
    memory = memory_of(meter, state)
    checkpointer.close()
    assert found is not None
    assert not checkpointer.warnings, checkpointer.warnings
    return {
        "seconds": seconds,
        **memory,
        "num_wrong_rows": num_wrong_rows(state),
    }


def num_wrong_rows(state: TrainState) -> int:
    """Return how many of this rank's rows differ in any bit from those that were saved, or have another last step."""
    bank, wrong = state.bank, 0
    for start in range(bank.start, bank.stop, CHECK_ROWS):
        stop = min(start + CHECK_ROWS, bank.stop)
        written_R = torch.arange(start, stop) % WRITTEN_EVERY == 0
        expected_RD = start_rows(bank.num_rows, bank.dim, bank.seed, start, stop).to(bank.rows.dtype)
        expected_RD[written_R] = -expected_RD[written_R]
        expected_R = torch.where(written_R, WRITTEN_STEP, -1)
        own = slice(start - bank.start, stop - bank.start)
        differs_R = (bank.rows[own] != expected_RD).any(dim=1) | (bank.last_step[own] != expected_R)
        wrong += int(differs_R.sum())
    return wrong


def memory_of(meter: PeakMeter, state: TrainState) -> dict[str, Any]:
    """Return what this rank held at most, its rows included, and whether that is below the limit."""
    peak = meter.peak(state)
    return {
        "shard_bytes": peak.shard_bytes,
        "peak_bytes": peak.num_bytes,
        "limit_bytes": peak.limit_bytes,
        "is_below_limit": peak.num_bytes <= peak.limit_bytes,
        "process_peak_bytes": peak.process_bytes,
    }


def measure(arguments: argparse.Namespace, task: CheckpointTask) -> dict[str, Any]:
    spec = CoordinatorSpec(uri=task.uri)
    print(f"saving {task.num_rows:,} rows on {arguments.workers} workers", file=sys.stderr, flush=True)
    saved = run_local(save, arguments.workers, task, coordinator=spec)
    restored: dict[str, list[Any]] = {}
    for trial in range(arguments.trials):
        for workers in arguments.restore_workers:
            print(f"restore {trial + 1} of {arguments.trials} on {workers} workers", file=sys.stderr, flush=True)
            by_rank = run_local(restore, workers, task, coordinator=spec)
            restored.setdefault(str(workers), []).append(by_rank)
    return {"save": saved, "restore": restored}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--workers", type=int, default=3, help="that save")
    parser.add_argument("--restore-workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--upload-threads", type=int, default=4)
    parser.add_argument("--trials", type=int, default=3, help="restores on each number of workers")
    parser.add_argument("--store", default=tempfile.gettempdir(), help="folder or URI to write below")
    parser.add_argument("--out", type=Path, help="file for the document; standard output by default")
    arguments = parser.parse_args()
    config = recipe(
        "cifar10-nce",
        **{
            "model.architecture": arguments.architecture,
            "model.feature_dim": arguments.dim,
            "bank.dtype": arguments.dtype,
        },
    )
    task = CheckpointTask(
        config_json=config.to_json(),
        num_rows=arguments.rows,
        uri=f"{arguments.store}/large-checkpoint-{uuid4().hex[:12]}",
        num_threads=arguments.upload_threads,
        trials=1,
        incremental=True,
    )
    before = environment()
    try:
        found = measure(arguments, task)
    finally:
        remove_all(Store(task.uri))
    shown = {**vars(arguments), "store": Store(arguments.store).protocol, "out": None}
    text = json.dumps(
        {
            "benchmark": "large checkpoint",
            "environment": {**before, "load_average_after": environment()["load_average"]},
            "config": shown,
            **found,
        },
        indent=1,
    )
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)
    wrong = sum(rank["num_wrong_rows"] for runs in found["restore"].values() for run in runs for rank in run)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
