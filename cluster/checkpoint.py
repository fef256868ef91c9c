"""Saving and restoring a run's checkpoints, by all ranks together and for any number of them.

A save freezes the state between two steps and writes it while training goes on: every rank its own objects, under a
prefix that no other attempt or save uses. What each wrote it tells the coordinator, which writes the manifest last. No
manifest, no checkpoint: a torn checkpoint is never visible. Background work uses no torch collectives, so that a dead
rank cannot hang it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cluster.attempts import SupersededError
from cluster.checkpoint_reader import (
    Checkpoint,
    CheckpointDeletedError,
    read_latest,
    read_manifest,
    verify_share,
)
from cluster.checkpoint_writer import Growth, write_part
from cluster.coordination import Coordination, CoordinatorGoneError, CoordinatorSpec
from cluster.coordinator import COLLECTING, COMMITTED, SUPERSEDED, SaveId
from cluster.lease import RunHeldError
from cluster.manifest import Manifest, ManifestError, ManifestId, describe
from cluster.patience import is_transient
from cluster.phase import Phase, phase
from cluster.retention import Retention
from cluster.row_guard import RowGuard
from cluster.row_table import RowTable
from cluster.snapshot import Snapshot, SnapshotTaker
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError, DamagedObjectError, SaveFailedError
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
_FIRST_POLL_S, _LONGEST_POLL_S = 0.01, 1.0


class WorkerLike(Protocol):
    """What a checkpointer needs of a worker: its place in the group, and the control plane."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather_object(self, obj: Any) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save did, the same on every rank but for stall_s.

    num_bytes: of all objects written; table_bytes: those of row tables. is_base: whether whole tables were written.
    stall_s: that training waited on this rank. snapshot_s: the longest such wait. write_s: copying, hashing and
    writing beside training, the slowest rank's. commit_s: the manifest. retention_s: removing older checkpoints.
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

    coordinator: the way to the run's coordinator, common to all ranks; None: with one worker, one in this process.
    retention: for that one. block_rows: rows of a block, about 64 MiB by default. bandwidth_share: how much of the time
    each of `num_threads` threads sends. rows_per_step: most rows of a table that a step writes; from it follows when
    increments are no longer worth it. incremental: whether to write increments at all. digests, versions: what the
    manifest says of the run's configuration and code; `restore` refuses a checkpoint with other digests.
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
        versions: Mapping[str, str] | None = None,
    ) -> None:
        if num_threads < 1 or (block_rows is not None and block_rows < 1):
            raise ValueError(f"num_threads {num_threads}, block_rows {block_rows}: expected at least 1")
        if coordinator is None and worker.world_size > 1:
            raise ValueError(f"coordinator: found none for {worker.world_size} workers, expected one that all share")
        self.warnings: list[str] = []
        self._store, self._worker = store, worker
        self._own_coordinator = None
        if coordinator is None:
            coordinator = self._own_coordinator = CoordinatorSpec(
                uri=store.uri, retention=retention or Retention()
            ).start()
        self._coordinator = coordinator
        self._block_rows, self._num_threads, self._incremental = block_rows, num_threads, incremental
        self._rows_per_step = rows_per_step
        self._digests, self._versions = dict(digests or {}), dict(versions or {})
        self._pace = Pace(bandwidth_share)
        self._taker = SnapshotTaker()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-save")
        self._saving: tuple[SaveId, float, Future[dict[str, Any]]] | None = None
        self._attempt: int | None = None
        self._damaged: list[ManifestId] = []
        self._last: ManifestId | None = None
        self._growth: Growth | None = None
        self._num_saves = 0

    def restore(self, load: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
        """Begin an attempt and return the newest checkpoint that is intact, None if the run has none yet. Collective.

        load: takes over a checkpoint; what it reads is verified. It is called again with an older one where any rank
        finds damage. Without it the ranks share the verification of every object. Damaged checkpoints are named in
        `warnings`, skipped and kept for inspection. CheckpointError if there are checkpoints but none is intact, or one
        is of a newer format or of another configuration; RunHeldError if another process trains this run.
        """
        with phase(Phase.RESTORE):
            begun = self._gather("begin an attempt", lambda: self._of_rank_0("begin_attempt"))[0]
            self._attempt = int(begun["attempt"])
            self._damaged = [ManifestId(*id) for id in begun["damaged"]]
            chain = [ManifestId(*id) for id in begun["chain"]]
            for id in reversed(chain):
                manifest, problems = self._try(id, load)
                if manifest:
                    self._last = id
                    return Checkpoint(self._store, manifest, num_threads=self._num_threads)
                self._damaged.append(id)
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                self.warnings.append(
                    f"the checkpoint of {describe([id])} is damaged and was skipped: {problems[0]}{more}; it is kept "
                    "for inspection"
                )
            if chain:
                raise CheckpointError(
                    f"no checkpoint of {self._store.uri} is intact, {len(chain)} tried: {'; '.join(self.warnings)}; put "
                    "the damaged objects back from a copy, or start a new run under another URI"
                )
            self._last = None
            return None

    def begin_attempt(self) -> int:
        """Start the attempt from what `restore` found, and return its number; then `save` may be called. Collective.

        From here on nothing that an older attempt saves is valid. CheckpointError if another process is still writing.
        """
        assert self._attempt is not None, "restore() comes before begin_attempt(): it says what the attempt starts from"
        started = self._gather(
            "begin an attempt",
            lambda: self._of_rank_0("start_attempt", attempt=self._attempt, parent=self._last, damaged=self._damaged),
        )[0]
        self._growth = _growth_of(started["growth"])
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
    ) -> None:
        """Take a snapshot, and write it while training goes on. Every rank calls it between the same two steps, when no
        rank `is_saving`.

        tables: on every rank its own rows, together each row once; those with a guard may be written again on return,
        under the guard. tensors, state: rank 0's count; the state is JSON, without NaN and infinities. metrics: for
        retention's `best`.
        """
        assert self._attempt is not None, "begin_attempt() comes before start_save()"
        assert self._saving is None, "the save before has ended, and its outcome was asked for"
        started_s = time.perf_counter()
        self._num_saves += 1
        id = SaveId(self._attempt, step, self._num_saves)
        since = self._base_for(step, tables)
        try:
            with phase(Phase.SNAPSHOT):
                mine = tensors if self._worker.rank == 0 else None
                snapshot: Snapshot | Exception = self._taker.take(step, tables, mine, state, metrics or {})
        except Exception as error:
            # The other ranks wait for what this one says.
            snapshot = error
        stall_s = time.perf_counter() - started_s
        self._pace.relax()
        self._saving = id, stall_s, self._background.submit(self._write_and_agree, id, snapshot, since)

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
        self._last, self._growth = id.manifest, _growth_of(outcome["growth"])
        self.warnings.extend(outcome["warnings"])
        figures = {name: outcome[name] for name in SaveReport.__dataclass_fields__ if name in outcome}
        return SaveReport(attempt=id.attempt, step=id.step, stall_s=stall_s, **figures)

    def wishes(self) -> dict[str, Any]:
        """Return what the coordinator was asked for, see `CoordinatorService.wishes`. Local, quick."""
        return self._coordinator.call("wishes")

    def close(self) -> None:
        """End: nothing more will be saved. A save that is on its way is not waited for."""
        self._pace.hurry()
        self._background.shutdown(wait=False, cancel_futures=True)
        if self._own_coordinator is not None:
            self._own_coordinator.close()

    def _of_rank_0(self, method: str, **arguments: Any) -> Any:
        return self._coordinator.call(method, **arguments) if self._worker.rank == 0 else {}

    def _gather(self, action: str, reply: Callable[[], Any]) -> list[Any]:
        """Return every rank's reply, or raise the same CheckpointError on every rank if any of them failed."""
        cause = None
        try:
            document = {"reply": reply()}
        except Exception as error:
            cause = error
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            document = {"error": text, "kind": type(error).__name__}
        documents = self._worker.all_gather_object(document)
        failures = [f"rank {rank}: {d['error']}" for rank, d in enumerate(documents) if "error" in d]
        if failures:
            kinds = {d.get("kind") for d in documents}
            special = next((kind for kind in (SupersededError, RunHeldError) if kind.__name__ in kinds), None)
            if special is not None:
                raise special(next(d["error"] for d in documents if d.get("kind") == special.__name__)) from cause
            raise CheckpointError(f"cannot {action}: {'; '.join(failures)}") from cause
        return [d["reply"] for d in documents]

    def _try(self, id: ManifestId, load: Callable[[Checkpoint], None] | None) -> tuple[Manifest | None, list[str]]:
        """Return the manifest if everything of it that the ranks read is intact, else None and what is wrong."""
        found: list[Manifest] = []

        def read() -> list[str]:
            if load is None:
                manifest, problems = verify_share(
                    self._store, id, self._worker.rank, self._worker.world_size, self._num_threads
                )
                if manifest:
                    self._check_digests(manifest)
            else:
                manifest, problems = self._load(id, load)
            if problems and not self._store.exists(id.key):
                raise CheckpointError(
                    f"{id.key} in {self._store.uri} was deleted while it was read: another process still writes to "
                    "this run; stop it and start again"
                )
            found.extend([manifest] if manifest else [])
            return problems

        replies = self._gather(f"read the checkpoint of {describe([id])}", read)
        problems = list(dict.fromkeys(problem for reply in replies for problem in reply))
        return (None if problems else found[0]), problems

    def _load(self, id: ManifestId, load: Callable[[Checkpoint], None]) -> tuple[Manifest | None, list[str]]:
        try:
            manifest = read_manifest(self._store, id)
        except (ManifestError, ObjectMissingError) as error:
            return None, [str(error)]
        self._check_digests(manifest)
        try:
            load(Checkpoint(self._store, manifest, num_threads=self._num_threads))
        except DamagedObjectError as error:
            return manifest, [str(error)]
        return manifest, []

    def _check_digests(self, manifest: Manifest) -> None:
        differing = [n for n, digest in self._digests.items() if manifest.digests.get(n, digest) != digest]
        if differing:
            raise CheckpointError(
                f"{manifest.id.key} in {self._store.uri} was saved with another {' and '.join(differing)}; put the "
                "checkpoints of this run back, or start a new run under another URI"
            )

    def _base_for(self, step: int, tables: Mapping[str, RowTable]) -> ManifestId | None:
        """Return the checkpoint that the next save adds to, None if it writes whole tables; the same on all ranks."""
        if not self._incremental or self._last is None or self._growth is None:
            return None
        known = {name: table for name, table in tables.items() if table.last_step is not None}
        rows = None if self._rows_per_step is None else (step - self._last.step) * self._rows_per_step
        return self._last if known and self._growth.allows_increment(known, rows) else None

    def _write_and_agree(self, id: SaveId, snapshot: Snapshot | Exception, since: ManifestId | None) -> dict[str, Any]:
        """Write this rank's part, tell the coordinator until it answers what became of the save, and return that."""
        try:
            with phase(Phase.UPLOAD):
                message = self._write(id, snapshot, since)
        except Exception as error:
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            message = {"error": text, "permanent": not is_transient(error)}
        with phase(Phase.MANIFEST):
            return self._agree(id, message)

    def _write(self, id: SaveId, snapshot: Snapshot | Exception, since: ManifestId | None) -> dict[str, Any]:
        if isinstance(snapshot, Exception):
            raise snapshot
        try:
            part = write_part(
                self._store,
                id.prefix,
                snapshot,
                since=since,
                block_rows=self._block_rows,
                num_threads=self._num_threads,
                pace=self._pace,
            )
        finally:
            snapshot.release()
        if self._worker.rank == 0:
            part |= {"digests": self._digests, "versions": self._versions}
        return {"part": part}

    def _agree(self, id: SaveId, message: dict[str, Any]) -> dict[str, Any]:
        place = {"attempt": id.attempt, "step": id.step, "number": id.number}
        pause_s = _FIRST_POLL_S
        try:
            while True:
                # Said again each time: a coordinator that was started again knows nothing of it.
                outcome = self._coordinator.call(
                    "acknowledge", **place, rank=self._worker.rank, world_size=self._worker.world_size, message=message
                )
                if outcome["state"] != COLLECTING:
                    return outcome
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except OSError as error:
            return {"state": "failed", "error": str(error), "permanent": True}


def _growth_of(document: Mapping[str, Any] | None) -> Growth | None:
    if document is None:
        return None
    kinds = {name: (rows, tuple(shape), dtype) for name, (rows, shape, dtype) in document["kinds"].items()}
    return Growth(**{**document, "kinds": kinds})
