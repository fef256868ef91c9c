"""One of many workers of a bank of a billion rows: its start, its memory, and what its steps cost it.

    uv run python tests/benchmarks/measure_billion_rows.py --rows 1000000000 --workers 256

The worker is real: it allocates its shard, draws its starting rows, and makes steps as rank W/2 of W. The other ranks
are not there: torch's fake process group answers its collectives at once, so what is measured is the worker's own work,
and what travels is computed.

Shapes: N rows, G samples of all ranks, B of this one, K negatives, D feature numbers, W ranks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.collectives import start_all_gather_rows
from dataloading.order import Permutation, StepRows
from instdisc.benchmark.bank_workers import expected_bytes
from instdisc.benchmark.environment import environment
from instdisc.memory_bank import DTYPES, ShardedMemoryBank
from instdisc.objectives import nce_loss
from instdisc.rows_ahead import RowsAhead
from instdisc.train.plan import BatchPlan

WARMUP_STEPS = 3


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="samples of a worker")
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    rank, world_size = arguments.workers // 2, arguments.workers
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    before, started_s = resident_bytes(), time.monotonic()
    bank = ShardedMemoryBank(arguments.rows, arguments.dim, dtype=DTYPES[arguments.dtype])
    start_s, peak = time.monotonic() - started_s, resident_bytes() - before
    plan = BatchPlan(arguments.batch * world_size, arguments.batch, world_size)
    order = StepRows(Permutation(arguments.rows, 0), plan.global_batch, (0, plan.global_batch))
    rows_ahead = RowsAhead(
        bank, order.rows, global_batch=plan.global_batch, num_negatives=arguments.negatives, negatives_seed=0, ahead=1
    )
    own = slice(*plan.offsets(rank))
    milliseconds = []
    for step in range(WARMUP_STEPS + arguments.steps):
        features_BD = F.normalize(torch.randn(arguments.batch, arguments.dim), dim=1).requires_grad_()
        begun_s = time.monotonic()
        validity = start_all_gather_rows(torch.ones(arguments.batch, dtype=torch.bool), plan.counts_W)
        validity._gathered_WMX.fill_(True)
        rows_ahead.start(step)
        rows = rows_ahead.take(step)
        nce_loss(
            features_BD,
            rows.positives_GD[own],
            rows.negatives_KD,
            temperature=0.07,
            log_z=21.0,
            num_rows=arguments.rows,
        ).backward()
        update = bank.start_update(rows.indices_G, plan.counts_W, validity, features_BD.detach(), step)
        rows_ahead.will_write(update)
        rows_ahead.settle()
        milliseconds.append(1000 * (time.monotonic() - begun_s))
    result = {
        "rows_of_this_worker": len(bank.rows),
        "start_s": round(start_s, 2),
        "shard_bytes": bank.rows.numel() * bank.rows.element_size() + bank.last_step.numel() * 4,
        "peak_bytes_at_start": peak,
        "peak_bytes_with_steps": resident_bytes() - before,
        "step_ms": {"median": statistics.median(milliseconds[WARMUP_STEPS:]), "max": max(milliseconds[WARMUP_STEPS:])},
        "bytes_sent_per_step": expected_bytes(
            global_batch=plan.global_batch,
            num_negatives=arguments.negatives,
            dim=arguments.dim,
            world_size=world_size,
            number_bytes=DTYPES[arguments.dtype].itemsize,
        ),
    }
    print(json.dumps({"config": vars(arguments), "environment": environment(), **result}, indent=1))


if __name__ == "__main__":
    main()
