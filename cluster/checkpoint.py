"""Saving and restoring a run's checkpoints, by all ranks together and for any number of them.

Objects are written first, by every rank its own, under a prefix that no other attempt or save uses; the manifest, by
rank 0, last. No manifest, no checkpoint: a torn checkpoint is never visible. Ranks exchange small JSON documents only,
errors included, so that a full disk on one rank is the same clear error on all of them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

from torch import Tensor

from cluster.attempts import attempt_numbers, begin_attempt, manifest_ids, read_history
from cluster.checkpoint_reader import Checkpoint, CheckpointDeletedError, read_latest, verify_share
from cluster.checkpoint_writer import join_parts, write_part
from cluster.manifest import Manifest, ManifestId, describe, visible_chain
from cluster.retention import remove_old
from cluster.row_table import RowTable
from cluster.store import Store
from cluster.stored_object import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointDeletedError",
    "CheckpointError",
    "Checkpointer",
    "RowTable",
    "SaveReport",
    "SupersededError",
    "WorkerLike",
    "read_latest",
]
_LIBRARIES = ("torch", "numpy", "safetensors", "fsspec")


class SupersededError(CheckpointError):
    """A newer attempt goes on with the run; nothing that this process saves would be valid."""


class WorkerLike(Protocol):
    """What a checkpointer needs of a worker: its place in the group, and the control plane."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather_object(self, obj: Any) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save did, the same on every rank.

    num_bytes: of all objects. snapshot_s: copying to host memory. write_s: hashing and writing; both are the slowest
    rank's. commit_s: the manifest. retention_s: removing older checkpoints.
    """

    attempt: int
    step: int
    num_bytes: int
    snapshot_s: float
    write_s: float
    commit_s: float
    retention_s: float


class Checkpointer:
    """Saves and restores one run's checkpoints in a store. Every method is collective over the worker group.

    block_rows: rows of a block, about 64 MiB by default. keep_last: how many checkpoints stay.
    warnings: sentences about what was found damaged or could not be removed, in the order in which it happened.
    """

    def __init__(
        self,
        store: Store,
        *,
        worker: WorkerLike,
        block_rows: int | None = None,
        keep_last: int = 3,
        num_threads: int = 4,
    ) -> None:
        if keep_last < 1 or num_threads < 1 or (block_rows is not None and block_rows < 1):
            raise ValueError(
                f"keep_last {keep_last}, num_threads {num_threads}, block_rows {block_rows}: expected at least 1"
            )
        self.warnings: list[str] = []
        self._store = store
        self._worker = worker
        self._block_rows = block_rows
        self._keep_last = keep_last
        self._num_threads = num_threads
        self._restored = False
        self._parents: dict[int, ManifestId | None] = {}
        self._damaged: list[ManifestId] = []
        self._last: ManifestId | None = None
        self._attempt: int | None = None
        self._num_saves = 0

    def restore(self) -> Checkpoint | None:
        """Return the newest checkpoint of which every object verifies, None if the run has none yet.

        The ranks share the verification. Damaged ones are named in `warnings`, skipped and kept for inspection.
        CheckpointError if there are checkpoints but none is intact, or one is of a newer format.
        """

        chain = self._find()
        for id in reversed(chain):
            manifest, problems = self._examine(id)
            if manifest:
                self._last, self._restored = id, True
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
        self._last, self._restored = None, True
        return None

    def begin_attempt(self) -> int:
        """Win and return the number of a new attempt that starts from what `restore` found; then `save` may be called.

        From here on nothing that an older attempt saves is valid. CheckpointError if another process is still writing.
        """
        assert self._restored, "restore() comes before begin_attempt(): it says what the attempt starts from"

        def begin() -> dict[str, Any]:
            if self._worker.rank:
                return {}
            return {"number": begin_attempt(self._store, self._last, self._damaged).number}

        self._attempt = int(self._gather("begin an attempt", begin)[0]["number"])
        self._parents[self._attempt] = self._last
        return self._attempt

    def save(
        self, step: int, tables: Mapping[str, RowTable], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> SaveReport:
        """Save a checkpoint of `step`, then remove what retention gives up. It is committed on return.

        tables: on every rank its own rows, together each row once. tensors, state: rank 0's count; the state is JSON,
        without NaN and infinities. The rows may be in use by no one else until the return.
        CheckpointError, the same on every rank, if any rank fails; the checkpoint before then stays the newest.
        """
        assert self._attempt is not None, "begin_attempt() comes before save()"
        id = ManifestId(self._attempt, step)
        self._num_saves += 1
        parts = self._gather(f"save step {step}", lambda: self._write(id, tables, tensors))
        figures = self._gather(f"save step {step}", lambda: self._commit(id, parts, state))[0]
        self._last = id
        self.warnings.extend(figures.pop("warnings"))
        return SaveReport(
            attempt=id.attempt,
            step=step,
            num_bytes=sum(part["num_bytes"] for part in parts),
            snapshot_s=max(part["snapshot_s"] for part in parts),
            write_s=max(part["write_s"] for part in parts),
            **figures,
        )

    def _gather(self, action: str, reply: Callable[[], Any]) -> list[Any]:
        """Return every rank's reply, or raise the same CheckpointError on every rank if any of them failed."""
        cause = None
        try:
            document = {"reply": reply()}
        except Exception as error:
            cause = error
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            document = {"error": text, "superseded": isinstance(error, SupersededError)}
        documents = self._worker.all_gather_object(document)
        failures = [f"rank {rank}: {d['error']}" for rank, d in enumerate(documents) if "error" in d]
        if failures:
            superseded = any(d.get("superseded") for d in documents)
            kind = SupersededError if superseded else CheckpointError
            raise kind(f"cannot {action}: {'; '.join(failures)}") from cause
        return [d["reply"] for d in documents]

    def _find(self) -> list[ManifestId]:
        """Return the valid manifests as rank 0 sees them, oldest first."""

        def look() -> dict[str, Any]:
            if self._worker.rank:
                return {}
            history = read_history(self._store)
            self._parents = {number: attempt.parent for number, attempt in history.attempts.items()}
            return {"chain": history.chain, "damaged": history.damaged}

        found = self._gather("find checkpoints", look)[0]
        self._damaged = [ManifestId(*id) for id in found["damaged"]]
        return [ManifestId(*id) for id in found["chain"]]

    def _examine(self, id: ManifestId) -> tuple[Manifest | None, list[str]]:
        """Return the manifest if every object of it verifies on some rank, else None and what is wrong."""
        found: list[Manifest] = []

        def verify() -> list[str]:
            manifest, problems = verify_share(
                self._store, id, self._worker.rank, self._worker.world_size, self._num_threads
            )
            if problems and not self._store.exists(id.key):
                raise CheckpointError(
                    f"{id.key} in {self._store.uri} was deleted while it was read: another process still writes to "
                    "this run; stop it and start again"
                )
            found.extend([manifest] if manifest else [])
            return problems

        replies = self._gather(f"read the checkpoint of {describe([id])}", verify)
        problems = list(dict.fromkeys(problem for reply in replies for problem in reply))
        return (None if problems else found[0]), problems

    def _write(self, id: ManifestId, tables: Mapping[str, RowTable], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write this rank's objects and return what the manifest says of them."""
        earliest = 0 if self._last is None else self._last.step + (self._last.attempt == id.attempt)
        if id.step < earliest:
            raise ValueError(f"step: found {id.step}, expected at least {earliest}, after the checkpoint before")
        return write_part(
            self._store,
            f"{id.objects_prefix}{self._num_saves:04d}",
            tables,
            tensors if self._worker.rank == 0 else None,
            block_rows=self._block_rows,
            num_threads=self._num_threads,
        )

    def _commit(self, id: ManifestId, parts: list[Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0: write the manifest, then remove what retention gives up; return figures for the report."""
        if self._worker.rank:
            return {}
        started = time.perf_counter()
        newest = attempt_numbers(self._store)[-1]
        if newest > id.attempt:
            raise SupersededError(
                f"attempt {id.attempt} was left behind by attempt {newest}, which goes on with {self._store.uri}: "
                "this process must end"
            )
        tables, stored_tensors = join_parts(parts)
        manifest = Manifest(
            attempt=id.attempt,
            step=id.step,
            parent=self._last,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            tables=tables,
            tensors=stored_tensors,
            state=state,
        )
        if not self._store.claim(id.key, manifest.to_bytes()):
            raise CheckpointError(f"{id.key} in {self._store.uri} is there already, with other content")
        committed = time.perf_counter()
        warnings = self._remove_old(id.attempt)
        retention_s = time.perf_counter() - committed
        return {"warnings": warnings, "commit_s": committed - started, "retention_s": retention_s}

    def _remove_old(self, attempt: int) -> list[str]:
        """Apply retention; a failure costs space and not the checkpoint, so that it is a warning."""
        try:
            manifests = manifest_ids(self._store)
            remove_old(
                self._store,
                attempt=attempt,
                chain=visible_chain(self._parents, manifests),
                manifests=manifests,
                damaged=self._damaged,
                keep_last=self._keep_last,
            )
        except OSError as error:
            return [f"older checkpoints were not removed: {error}"]
        return []
