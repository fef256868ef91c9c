"""`bench checkpoint`, bytes per second: saves and restores against plain writes and reads of the same objects.

The alternative puts and gets what our objects hold, in objects of the same sizes, in as many threads, and does nothing
else: no snapshot, no checksums, no manifest, nothing kept of what is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoint, read_latest
from cluster.manifest import ManifestId
from cluster.row_table import RowTable, tensor_bytes
from cluster.store import Buffer, Store
from cluster.stored_object import RANGE_BYTES
from cluster.tensor_file import serialize
from cluster.threads import in_threads
from cluster.worker import Worker
from instdisc.benchmark.checkpoint_state import CheckpointTask, Together, checkpointer_of, start_save, state_of, tell
from instdisc.benchmark.pairing import PairedSeconds, alternate, sweep
from instdisc.train.state import TrainState

SWEEP_ROUNDS = 2
WHOLE, RANGES = "whole objects", "ranges of 16 MiB"


def measure_throughput(worker: Worker, task: CheckpointTask) -> dict[str, Any]:
    """Return bytes of all ranks and the seconds of both sides, of saves and of restores; rank 0's count. Collective."""
    state = state_of(task, worker)
    saves = _Saves(worker, task, state)
    try:
        found: dict[str, Any] = {"save": asdict(saves.against_puts())}
    finally:
        saves.close()
    restores = _Restores(worker, task, state)
    found["bytes"] = sum(worker.all_gather_object(restores.num_bytes))
    found["setting"], found["sweep"] = restores.best_reads()
    if task.store.protocol == "file":
        found["restore from disk"] = asdict(restores.against_gets(found["setting"], is_cached=False))
        found["restore from memory"] = asdict(restores.against_gets(found["setting"], is_cached=True))
    else:
        found["restore"] = asdict(restores.against_gets(found["setting"], is_cached=True))
    return found


class _Saves:
    """Whole saves, each committed before the clock stops, and plain writes. Older objects go outside the clock."""

    def __init__(self, worker: Worker, task: CheckpointTask, state: TrainState) -> None:
        self._worker, self._task, self._state, self._store = worker, task, state, task.store
        self._checkpointer = checkpointer_of(task, worker)
        self._last: ManifestId | None = None
        self._plain = list(_plain_objects(state, worker.rank))

    def against_puts(self) -> PairedSeconds:
        """Alternate saves and plain writes."""
        tell(self._worker, f"save: {self._task.trials} trials of each side in turn")
        ours = Together(
            self._worker, "save", self._save, num_trials=self._task.trials + 1, before=self._remove_what_was_written
        )
        plain = Together(self._worker, "plain writes", self._put, before=self._remove_plain)
        seconds = alternate(ours, plain, trials=self._task.trials)
        self._remove_plain()
        return seconds

    def close(self) -> None:
        """End the attempt."""
        self._checkpointer.close()

    def _save(self) -> None:
        self._state.step += 1
        start_save(self._checkpointer, self._state)
        report = self._checkpointer.wait()
        assert report is not None
        self._last = ManifestId(report.attempt, report.step)

    def _put(self) -> None:
        in_threads(lambda one: self._store.put(one[0], *one[1]), self._plain, self._task.num_threads)

    def _remove_what_was_written(self) -> None:
        self._worker.all_gather_object(None)
        if self._last is not None and self._worker.rank == 0:
            self._store.delete(self._last.key)
            _remove(self._store, self._last.objects_prefix)

    def _remove_plain(self) -> None:
        _remove(self._store, f"plain/{self._worker.rank}/")


class _Restores:
    """Restores of each rank's own rows and of all tensors into memory that is there, and plain reads."""

    def __init__(self, worker: Worker, task: CheckpointTask, state: TrainState) -> None:
        self._worker, self._task, self._state, self._store = worker, task, state, task.store
        latest = read_latest(self._store)
        assert latest is not None, "a save came before"
        self._manifest = latest.manifest
        bank = state.bank
        self._objects = [
            self._manifest.tensors,
            *(s for table in self._manifest.tables.values() for s in table.overlapping(bank.start, bank.stop)),
        ]
        self.num_bytes = sum(stored.num_bytes for stored in self._objects)

    def best_reads(self) -> tuple[str, list[dict[str, Any]]]:
        """Return how plain reads are fastest, the same on every rank, and the whole sweep."""
        tell(self._worker, "sweep of how plain reads read")
        builders = {way: partial(self._plain, way) for way in (WHOLE, RANGES)}
        swept = sweep(builders, rounds=SWEEP_ROUNDS, say=partial(tell, self._worker))
        rows = [{"setting": s.setting, "trials": s.seconds, "error": s.error} for s in swept]
        return self._worker.all_gather_object(swept[0].setting)[0], rows

    def against_gets(self, way: str, *, is_cached: bool) -> PairedSeconds:
        """Alternate restores and plain reads; without the cache, files come from the disk."""
        before = (lambda: None) if is_cached else self._drop_caches
        name = "restore" if is_cached else "restore from disk"
        ours = Together(self._worker, name, self._restore, num_trials=self._task.trials + 1, before=before)
        return alternate(ours, self._plain(way, before), trials=self._task.trials)

    def _restore(self) -> None:
        self._state.load(Checkpoint(self._store, self._manifest, num_threads=self._task.num_threads))

    def _plain(self, way: str, before: Any = lambda: None) -> Together:
        return Together(self._worker, "plain reads", partial(self._get, way), before=before)

    def _get(self, way: str) -> None:
        def read(stored: Any) -> None:
            step = stored.num_bytes if way == WHOLE else RANGE_BYTES
            for start in range(0, stored.num_bytes, step):
                self._store.get(stored.key, start, min(start + step, stored.num_bytes))

        in_threads(read, self._objects, self._task.num_threads)

    def _drop_caches(self) -> None:
        """Let the kernel forget the files' pages: they were synced, so all of them may go."""
        for stored in self._objects:
            descriptor = os.open(Path(self._store.root) / stored.key, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _plain_objects(state: TrainState, rank: int) -> Iterator[tuple[str, Sequence[Buffer]]]:
    """Yield key and content of the objects that a whole save of this rank writes, from the memory where it lies."""
    if rank == 0:
        yield "plain/0/tensors", serialize(state.tensors())
    for name, table in state.tables().items():
        for start, stop in table.segments():
            yield f"plain/{rank}/{name}-{start}", [_rows_of(table, start, stop)]


def _rows_of(table: RowTable, start: int, stop: int) -> memoryview:
    return tensor_bytes(table.rows[start - table.start : stop - table.start])


def _remove(store: Store, prefix: str) -> None:
    for key in store.list(prefix):
        with suppress(FileNotFoundError):
            store.delete(key)
