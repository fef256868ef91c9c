"""Small runs' checkpoints for tests, made by the real Checkpointer, and a second process that holds a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint import Checkpointer, Retention, RowTable, SaveReport
from cluster.manifest import Manifest, ManifestId, read_manifest
from cluster.store import Store

NUM_ROWS, DIM = 60, 4
ROWS_PER_STEP = 3
KEEP_ALL = Retention(last=1000)


class Alone:
    """The only worker of a group."""

    rank, world_size = 0, 1

    def all_gather_object(self, obj: Any) -> list[Any]:
        return [obj]


def bank_of(step: int) -> tuple[Tensor, Tensor]:
    """Return rows and last steps after so many steps, each of which writes three rows; a pure function."""
    rows_ND = torch.arange(NUM_ROWS * DIM, dtype=torch.float32).reshape(NUM_ROWS, DIM)
    last_N = torch.full((NUM_ROWS,), -1, dtype=torch.int32)
    # Any 60 steps in a row write every row: 7 and 60 have no common divisor.
    for done in range(max(0, step - NUM_ROWS), step):
        which = [(7 * done + place) % NUM_ROWS for place in range(ROWS_PER_STEP)]
        rows_ND[which] = float(done) + torch.arange(ROWS_PER_STEP * DIM).reshape(ROWS_PER_STEP, DIM) / 64
        last_N[which] = done
    return rows_ND, last_N


def metrics_of(step: int) -> dict[str, float]:
    """Return metrics whose order is not that of the steps."""
    return {"knn_top1": float(step * 7 % 11)}


def begin(store: Store, **options: Any) -> Checkpointer:
    """Return a checkpointer in an attempt of its own that goes on from the newest checkpoint."""
    options = {"retention": KEEP_ALL, "block_rows": 16, "rows_per_step": ROWS_PER_STEP, **options}
    checkpointer = Checkpointer(store, worker=Alone(), **options)
    checkpointer.restore()
    checkpointer.begin_attempt()
    return checkpointer


def save(checkpointer: Checkpointer, step: int) -> SaveReport:
    """Save what is there after so many steps."""
    rows_ND, last_N = bank_of(step)
    tables = {
        "bank": RowTable(NUM_ROWS, 0, rows_ND, last_N),
        "bank_last_step": RowTable(NUM_ROWS, 0, last_N.clone(), last_N),
    }
    state = {"step": step, "normalizer": {"z": 1.5}}
    return checkpointer.save(step, tables, {"w": torch.full((5,), float(step))}, state, metrics_of(step))


def run_attempt(store: Store, steps: Sequence[int], **options: Any) -> list[SaveReport]:
    """Save these steps in an attempt that ends in order."""
    checkpointer = begin(store, **options)
    try:
        return [save(checkpointer, step) for step in steps]
    finally:
        checkpointer.close()


def leave_orphan(store: Store, attempt: int, step: int) -> Manifest:
    """Write what an attempt that was left behind commits too late: a checkpoint of a later step than its newest."""
    newest = max(int(key[-17:-5]) for key in store.list(f"manifests/{attempt:06d}-"))
    manifest = read_manifest(store, ManifestId(attempt, newest))
    own = f"{ManifestId(attempt, step).objects_prefix}0099/tensors.safetensors"
    store.put(own, store.get(manifest.tensors.key))
    orphan = replace(manifest, step=step, save=99, tensors=replace(manifest.tensors, key=own))
    store.put(orphan.id.key, orphan.to_bytes())
    return orphan


def damage(store: Store, key: str) -> None:
    """Change one bit in the middle of an object."""
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, data)


_HOLD = """
import sys, threading
from cluster.lease import Holder, Lease
from cluster.store import Store
lease = Lease(Store(sys.argv[1]), Holder.of_this_process())
lease.take()
print("held", flush=True)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait(0.1):
    lease.beat()
lease.release()
"""


@contextmanager
def held_by_another_process(uri: str) -> Iterator[subprocess.Popen[str]]:
    """Let a second process hold a run, and release it at the end unless it was killed."""
    command = [sys.executable, "-c", _HOLD, uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
