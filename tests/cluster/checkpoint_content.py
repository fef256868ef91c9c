"""What the tests of checkpoints save: content that follows from the step alone, and short ways to save and check it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from checkpoint_fakes import InlineCoordination, ThreadWorker, run_group

from cluster.checkpoint import Checkpoint, Checkpointer, Retention, RowTable, SaveReport
from cluster.store import Store

NUM_ROWS = 37


def whole_tables(step: int, num_rows: int = NUM_ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "bank": torch.randn(num_rows, 6, generator=generator).to(torch.bfloat16),
        "last_step": torch.randint(-1, step + 1, (num_rows,), generator=generator, dtype=torch.int32),
        "weights": torch.randn(num_rows, 2, 3, generator=generator),
    }


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), float(step)), "momentum": torch.arange(step)}


def bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def share(tables: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, RowTable]:
    parts = {}
    for name, rows in tables.items():
        start, stop = bounds(len(rows), rank, world_size)
        parts[name] = RowTable(len(rows), start, rows[start:stop])
    return parts


def save(checkpointer: Checkpointer, worker: ThreadWorker, step: int) -> SaveReport:
    tables = share(whole_tables(step), worker.rank, worker.world_size)
    return checkpointer.save(step, tables, tensors_of(step) if worker.rank == 0 else {}, {"step": step, "z": 0.1})


def start(
    store: Store, worker: ThreadWorker | None = None, *, keep_last: int = 3, load: Any = None, **options: Any
) -> tuple[Checkpointer, Checkpoint | None]:
    """Begin an attempt; with several workers they share `coordinator=`."""
    worker = worker or ThreadWorker()
    if "coordinator" not in options:
        assert worker.world_size == 1
        options["coordinator"] = InlineCoordination(store, Retention(last=keep_last))
    checkpointer = Checkpointer(store, worker=worker, **{"block_rows": 5, **options})
    checkpoint = checkpointer.restore(load)
    checkpointer.begin_attempt()
    return checkpointer, checkpoint


def run_saves(store: Store, steps: Iterable[int], world_size: int = 1, *, keep_last: int = 3, **options: Any) -> list:
    """Save these steps on a group of ranks; return every rank's reports or its error."""
    coordinator = InlineCoordination(store, Retention(last=keep_last))

    def work(worker: ThreadWorker) -> list[SaveReport]:
        checkpointer, _ = start(store, worker, coordinator=coordinator, **options)
        return [save(checkpointer, worker, step) for step in steps]

    return run_group(world_size, work)


def assert_holds(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step, "z": 0.1}
    for name, rows in whole_tables(step).items():
        assert checkpoint.rows(name).dtype == rows.dtype
        assert torch.equal(checkpoint.rows(name), rows)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(checkpoint.tensors()[name], tensor)
