"""Saving and restoring a run's checkpoints, by all ranks together and for any number of them.

A save freezes the state between two steps and writes it while training goes on: every rank its own objects, under a
prefix that no other attempt or save uses. What each wrote it tells the coordinator, which writes the manifest last. No
manifest, no checkpoint: a torn checkpoint is never visible. Background work uses no torch collectives, so that a dead
rank cannot hang it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from cluster.agreement import WorkerLike, gather
from cluster.attempts import SupersededError
from cluster.checkpoint_reader import Checkpoint, CheckpointDeletedError, read_latest
from cluster.commits import SaveId
from cluster.coordination import Coordination, CoordinatorGoneError, CoordinatorSpec
from cluster.coordinator import COMMITTED, SUPERSEDED
from cluster.lease import RunHeldError
from cluster.local_coordinator import HostedCoordination
from cluster.manifest import ManifestId
from cluster.parts import Growth
from cluster.phase import Phase, phase
from cluster.restoring import Restoring
from cluster.retention import Retention
from cluster.row_guard import RowGuard
from cluster.row_table import RowTable
from cluster.save_job import SaveJob
from cluster.snapshot import Snapshot, SnapshotTaker
from cluster.store import Store
from cluster.stored_object import CheckpointError, SaveFailedError
from cluster.uploads import Pace

__all__ = [
    "Checkpoint",
    "CheckpointDeletedError",
    "CheckpointError",
    "Checkpointer",
    "CoordinatorGoneError",
    "Retention",
    "RowGuard",
    "RowTable",
    "RunHeldError",
    "SaveFailedError",
    "SaveReport",
    "SupersededError",
    "WorkerLike",
    "read_latest",
]
WISH_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save did, the same on every rank but for stall_s.

    num_bytes: of all objects written; table_bytes: those of row tables. is_base: whether whole tables were written.
    stall_s: that training waited on this rank. snapshot_s: the longest such wait. write_s: copying, hashing and
    writing beside training, the slowest rank's. commit_s: the manifest. retention_s: removing older checkpoints after
    the save before, beside training.
    """

    attempt: int
    step: int
    num_bytes: int
    table_bytes: int
    is_base: bool
    stall_s: float
    snapshot_s: float
    write_s: float
    commit_s: float
    retention_s: float


class Checkpointer:
    """Saves and restores one run's checkpoints in a store.

    coordinator: the way to the run's coordinator, common to all ranks; None: rank 0 hosts one, for workers of its own
    machine, and making a checkpointer is collective. retention: for that one. block_rows: rows of a block, about 64 MiB
    by default. bandwidth_share: how much of the time each of `num_threads` threads sends. incremental: whether to write
    increments. rows_per_step: most rows of a table that a step writes; from it follows when they are not worth it.
    digests, versions: what the manifest says of the run's configuration and code; `restore` refuses a checkpoint with
    other digests, but for `older_digests`, which older versions gave to the same.
    warnings: sentences about what was found damaged or could not be removed, in the order in which it happened.
    """

    def __init__(
        self,
        store: Store,
        *,
        worker: WorkerLike,
        coordinator: Coordination | None = None,
        retention: Retention | None = None,
        block_rows: int | None = None,
        num_threads: int = 4,
        bandwidth_share: float = 1.0,
        incremental: bool = True,
        rows_per_step: int | None = None,
        digests: Mapping[str, str] | None = None,
        older_digests: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        if num_threads < 1 or (block_rows is not None and block_rows < 1):
            raise ValueError(f"num_threads {num_threads}, block_rows {block_rows}: expected at least 1")
        self.warnings: list[str] = []
        self._store, self._worker = store, worker
        spec = CoordinatorSpec(uri=store.uri, retention=retention or Retention())
        self._own_coordinator = HostedCoordination(spec, worker) if coordinator is None else None
        self._coordinator: Coordination = coordinator or cast(Coordination, self._own_coordinator)
        self._block_rows, self._num_threads, self._incremental = block_rows, num_threads, incremental
        self._rows_per_step = rows_per_step
        self._digests, self._versions = dict(digests or {}), dict(versions or {})
        older = older_digests or {}
        self._accepted = {name: {digest, older.get(name, digest)} for name, digest in self._digests.items()}
        self._pace = Pace(bandwidth_share)
        self._taker = SnapshotTaker()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-save")
        self._saving: tuple[SaveId, float, Future[dict[str, Any]]] | None = None
        self._attempt: int | None = None
        self._damaged: list[ManifestId] = []
        self._last: ManifestId | None = None
        self._growth: Growth | None = None
        self._num_saves = 0
        self._wishes: dict[str, Any] = {"saves": 0, "served": 0, "superseded": False}
        self._closing = threading.Event()

    def restore(self, load: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
        """Begin an attempt and return the newest checkpoint that is intact, None if the run has none yet. Collective.

        load: takes over a checkpoint; what it reads is verified. It is called again with an older one where any rank
        finds damage. Without it the ranks share the verification of every object. Damaged checkpoints are named in
        `warnings`, skipped and kept for inspection. CheckpointError if there are checkpoints but none is intact, or one
        is of a newer format or of another configuration; RunHeldError if another process trains this run.
        """
        with phase(Phase.RESTORE):
            begun = gather(self._worker, "begin an attempt", lambda: self._of_rank_0("begin_attempt"))[0]
            self._attempt = int(begun["attempt"])
            restoring = Restoring(self._store, self._worker, load, self._accepted, self._num_threads)
            restoring.damaged.extend(ManifestId(*id) for id in begun["damaged"])
            # The caller's list, so that what was found stands there even if nothing is intact.
            restoring.warnings = self.warnings
            checkpoint = restoring.newest_intact([ManifestId(*id) for id in begun["chain"]])
            self._damaged = restoring.damaged
            self._last = checkpoint.manifest.id if checkpoint else None
            return checkpoint

    def begin_attempt(self, about: Mapping[str, Any] | None = None) -> int:
        """Start the attempt from what `restore` found, and return its number; then `save` may be called. Collective.

        about: what the record of the attempt says of these workers, JSON; rank 0's counts (`cluster.starts`).
        From here on nothing that an older attempt saves is valid. CheckpointError if another process is still writing.
        """
        assert self._attempt is not None, "restore() comes before begin_attempt(): it says what the attempt starts from"
        started = gather(
            self._worker,
            "begin an attempt",
            lambda: self._of_rank_0(
                "start_attempt", attempt=self._attempt, parent=self._last, damaged=self._damaged, about=about
            ),
        )[0]
        self._growth = Growth.from_json(started["growth"]) if started["growth"] else None
        if self._worker.rank == 0:
            # In a thread: training never waits for an answer of the coordinator.
            threading.Thread(target=self._ask_for_wishes, name="checkpoint-wishes", daemon=True).start()
        return self._attempt

    def save(
        self,
        step: int,
        tables: Mapping[str, RowTable],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> SaveReport:
        """Save a checkpoint of `step` and wait until it is committed; arguments and errors as `start_save`, `wait`."""
        self.start_save(step, tables, tensors, state, metrics)
        report = self.wait()
        assert report is not None
        return report

    def start_save(
        self,
        step: int,
        tables: Mapping[str, RowTable],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wish: int = 0,
    ) -> None:
        """Take a snapshot, and write it while training goes on. Every rank calls it between the same two steps, when no
        rank `is_saving`.

        tables: on every rank its own rows, together each row once; those with a guard may be written again on return,
        under the guard. tensors, state: rank 0's count; the state is JSON, without NaN and infinities. metrics: what
        was measured of this very state, for retention's `best`; what is no finite number is left out, with a warning.
        wish: the number of the wish for a checkpoint that this save fulfils.
        """
        assert self._attempt is not None, "begin_attempt() comes before start_save()"
        assert self._saving is None, "the save before has ended, and its outcome was asked for"
        started_s = time.perf_counter()
        self._num_saves += 1
        id = SaveId(self._attempt, step, self._num_saves)
        since = self._base_for(step, tables)
        rated = self._finite(step, metrics or {})
        try:
            with phase(Phase.SNAPSHOT):
                mine = tensors if self._worker.rank == 0 else None
                snapshot: Snapshot | Exception = self._taker.take(step, tables, mine, state, rated)
        except Exception as error:
            # The other ranks wait for what this one says.
            snapshot = error
        stall_s = time.perf_counter() - started_s
        job = SaveJob(
            id=id,
            snapshot=snapshot,
            since=since,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            store=self._store,
            coordinator=self._coordinator,
            block_rows=self._block_rows,
            num_threads=self._num_threads,
            pace=self._pace,
            about={"digests": self._digests, "versions": self._versions, "wish": wish},
            closing=self._closing,
        )
        self._pace.relax()
        self._saving = id, stall_s, self._background.submit(job.run)

    @property
    def is_saving(self) -> bool:
        """Whether a save is on its way on this rank. Ranks can differ for a moment."""
        return self._saving is not None and not self._saving[2].done()

    def wait(self) -> SaveReport | None:
        """Return the report of the save that was started last, when it has ended; None if there is none, or it was
        asked for. Local; all ranks get the same answer.

        The upload no longer spares training: it is waited for. SaveFailedError if any rank failed; the checkpoint
        before then stays the newest. SupersededError if a newer attempt goes on with the run.
        """
        if self._saving is None:
            return None
        id, stall_s, future = self._saving
        self._pace.hurry()
        outcome = future.result()
        self._saving = None
        if outcome["state"] == SUPERSEDED:
            raise SupersededError(outcome["error"])
        if outcome["state"] != COMMITTED:
            error = SaveFailedError(f"cannot save step {id.step}: {outcome['error']}")
            error.is_permanent = outcome["permanent"]
            raise error
        self._last, self._growth = id.manifest, Growth.from_json(outcome["growth"])
        self.warnings.extend(outcome["warnings"])
        figures = {name: outcome[name] for name in SaveReport.__dataclass_fields__ if name in outcome}
        return SaveReport(attempt=id.attempt, step=id.step, stall_s=stall_s, **figures)

    @property
    def wishes(self) -> dict[str, Any]:
        """What the coordinator was asked for, see `CoordinatorService.wishes`, a second late; rank 0 alone knows it."""
        return self._wishes

    def close(self) -> None:
        """End: nothing more will be saved. A save that is on its way is given up, and not waited for."""
        self._closing.set()
        self._pace.give_up()
        self._background.shutdown(wait=False, cancel_futures=True)
        if self._own_coordinator is not None:
            self._own_coordinator.close()

    def _finite(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics that are finite numbers, and warn of the others: none of them ends a run."""
        finite: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                number = math.nan if isinstance(value, str) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                finite[name] = number
            else:
                self.warnings.append(
                    f"metric {name} of step {step}: found {value!r}, expected a finite number; the checkpoint is saved "
                    "without it"
                )
        return finite

    def _ask_for_wishes(self) -> None:
        while not self._closing.wait(WISH_INTERVAL_S):
            try:
                self._wishes = self._coordinator.call("wishes")
            except OSError:
                return  # saves say that the coordinator is gone

    def _of_rank_0(self, method: str, **arguments: Any) -> Any:
        return self._coordinator.call(method, **arguments) if self._worker.rank == 0 else {}

    def _base_for(self, step: int, tables: Mapping[str, RowTable]) -> ManifestId | None:
        """Return the checkpoint that the next save adds to, None if it writes whole tables; the same on all ranks."""
        if not self._incremental or self._last is None or self._growth is None:
            return None
        known = {n: (t.num_rows, t.row_shape, t.dtype) for n, t in tables.items() if t.last_step is not None}
        rows = None if self._rows_per_step is None else (step - self._last.step) * self._rows_per_step
        return self._last if known and self._growth.allows_increment(known, rows) else None
