"""The coordinator of a run's checkpoints: begins attempts, collects what workers wrote, and commits manifests.

A plain state machine: no threads, no clock, no torch collectives, so that a dead rank cannot hang it and a test can
stop it between any two operations. It keeps nothing that it could not rebuild from the store: workers repeat what they
have to say until it is answered, and everything that they say may come late, twice or in another order.
"""

from __future__ import annotations

import json
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cluster.attempts import (
    SupersededError,
    manifest_ids,
    read_history,
    record_start,
    require_newest,
    win_number,
)
from cluster.manifest import Manifest, ManifestError, ManifestId, read_manifest, visible_chain
from cluster.parts import Growth, join_parts
from cluster.patience import is_transient
from cluster.retention import Retention, plan_removal, remove
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

_LIBRARIES = ("torch", "numpy", "safetensors", "fsspec")
_REMEMBERED = 16
COMMIT_TRIES = 100
"""How often a save is tried to be committed while the storage fails in ways that pass."""
DOUBT_REPEATS = 600
"""How often a rank repeats itself, once a second, to a coordinator that was started again before the others, which have
not spoken since, are taken to have heard a failure from the one before."""
COLLECTING, COMMITTED, FAILED, SUPERSEDED = "collecting", "committed", "failed", "superseded"


@dataclass(frozen=True, order=True)
class SaveId:
    """Which save: the attempt, the step, and the number of the save within the attempt."""

    attempt: int
    step: int
    number: int

    @property
    def manifest(self) -> ManifestId:
        return ManifestId(self.attempt, self.step)

    @property
    def prefix(self) -> str:
        """The beginning of the keys of the objects of this save."""
        return f"{self.manifest.objects_prefix}{self.number:04d}"


@dataclass
class _Save:
    world_size: int
    parts: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failures: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    repeats: Counter[int] = field(default_factory=Counter)
    tries: int = 0

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.world_size or bool(self.failures)


@dataclass
class _Run:
    """What the store says of the attempt whose saves are committed. last: its newest checkpoint, or its parent."""

    attempt: int
    parents: dict[int, ManifestId | None]
    damaged: tuple[ManifestId, ...]
    last: Manifest | None
    is_cleaned: bool = False

    @property
    def growth(self) -> dict[str, Any] | None:
        return asdict(Growth.of(self.last)) if self.last else None


class Coordinator:
    """Checkpoints of one run. `begin_attempt`, `start_attempt` and `work` use the store, the rest does not.

    Safe in threads. retention: which checkpoints are kept. All arguments and results are JSON-able.
    """

    def __init__(self, store: Store, *, retention: Retention | None = None) -> None:
        self._store = store
        self._retention = retention or Retention()
        self._lock = threading.Lock()
        self._saves: dict[SaveId, _Save] = {}
        self._outcomes: dict[SaveId, dict[str, Any]] = {}
        self._attempt = 0
        """The newest attempt that is known to have won a number."""
        self._run: _Run | None = None
        # An attempt can start while a commit of the one before is still at work: each has its own `_Run`.
        self._sure_of: int | None = None
        """The attempt of whose present save no coordinator before this one can have told the outcome."""

    def begin_attempt(self) -> dict[str, Any]:
        """Win a number for a new attempt, and return what it may start from: the valid checkpoints, oldest first.

        Returns {"attempt", "chain", "damaged"}. From here on no older attempt commits anything.
        """
        number = win_number(self._store)
        history = read_history(self._store)
        started_from = history.parents[max(history.parents)] if history.parents else None
        if started_from and not history.chain:
            raise CheckpointError(
                f"{started_from.key} in {self._store.uri}, from which attempt {max(history.parents)} started, was "
                "deleted, and there is no newer checkpoint: put it back from a copy, or start a new run under another "
                "URI"
            )
        with self._lock:
            self._attempt = max(self._attempt, number)
        return {"attempt": number, "chain": history.chain, "damaged": history.damaged}

    def start_attempt(
        self,
        attempt: int,
        parent: list[int] | None,
        damaged: list[list[int]],
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Record the checkpoint that an attempt starts from (None: nothing), which ones are damaged, and what the
        workers say of themselves.

        Returns {"growth"} of the parent; None without one, and after damage: of a checkpoint that an older attempt had
        left behind, that attempt may still be deleting the objects, so that nothing new may need them.
        """
        started_from = ManifestId(*parent) if parent else None
        record_start(self._store, attempt, started_from, tuple(ManifestId(*id) for id in damaged), about)
        run = self._adopt(attempt)
        with self._lock:
            self._sure_of = attempt
        return {"growth": None if damaged else run.growth}

    def acknowledge(
        self, attempt: int, step: int, number: int, rank: int, world_size: int, message: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Take in what a rank says of its part of a save, and return the save's state, as `state_of`.

        message: {"part": …} as `checkpoint_writer.write_part` returns it, or {"error": text, "permanent": bool}.
        """
        id = SaveId(attempt, step, number)
        with self._lock:
            if id not in self._outcomes and attempt >= self._attempt:
                self._attempt = attempt
                save = self._saves.setdefault(id, _Save(world_size))
                save.repeats[rank] += 1
                if "part" in message:
                    save.parts.setdefault(rank, message["part"])
                else:
                    save.failures.setdefault(rank, message)
        return self.state_of(attempt, step, number)

    def state_of(self, attempt: int, step: int, number: int) -> dict[str, Any]:
        """Return {"state"}: COLLECTING, COMMITTED with figures, FAILED with "error" and "permanent", or SUPERSEDED."""
        id = SaveId(attempt, step, number)
        with self._lock:
            if id in self._outcomes:
                return self._outcomes[id]
            if attempt < self._attempt:
                return {"state": SUPERSEDED, "error": f"attempt {attempt} was left behind by attempt {self._attempt}"}
            return {"state": COLLECTING}

    def work(self) -> bool:
        """Decide a save of which all parts are here, if there is one; return whether there was."""
        with self._lock:
            complete = min((id for id, save in self._saves.items() if save.is_complete), default=None)
            id = complete or max(self._saves, default=None)
            if id is None or (not complete and (id.attempt == self._sure_of or id.attempt < self._attempt)):
                return False
            save = self._saves[id]
        outcome = self._decide(id, save) if complete else self._resolve(id, save)
        if outcome is None:
            return False
        with self._lock:
            # Saves of one attempt come one after the other: what is older will never be complete.
            self._saves = {other: s for other, s in self._saves.items() if other > id}
            self._outcomes[id] = outcome
            for old in sorted(self._outcomes)[:-_REMEMBERED]:
                del self._outcomes[old]
        return True

    @property
    def last_wish(self) -> int:
        """The highest number of a wish for a checkpoint that a committed save fulfilled."""
        with self._lock:
            return max((outcome.get("wish", 0) for outcome in self._outcomes.values()), default=0)

    def is_superseded(self) -> bool:
        """Whether a newer attempt than this coordinator's was begun elsewhere."""
        with self._lock:
            attempt = self._attempt
        try:
            if attempt:
                require_newest(self._store, attempt)
        except SupersededError:
            return True
        return False

    def _decide(self, id: SaveId, save: _Save) -> dict[str, Any] | None:
        """Return what becomes of a save, None where the storage has to answer first.

        A failure is told only where no manifest was written or will be: a coordinator that is started again then tells
        the other ranks the same.
        """
        if save.failures:
            texts = [f"rank {rank}: {failure['error']}" for rank, failure in sorted(save.failures.items())]
            permanent = any(failure["permanent"] for failure in save.failures.values())
            return {"state": FAILED, "error": "; ".join(texts), "permanent": permanent}
        return self._guarded(save, lambda: self._commit(id, [save.parts[rank] for rank in range(save.world_size)]))

    def _resolve(self, id: SaveId, save: _Save) -> dict[str, Any] | None:
        """Return what the coordinator before this one told ranks that no longer ask, None while nobody knows.

        That it is committed the store says. That it failed it does not say; then the other ranks never speak again.
        """

        def from_store() -> dict[str, Any] | None:
            require_newest(self._store, id.attempt)
            try:
                if read_manifest(self._store, id.manifest).save != id.number:
                    raise ObjectMissingError(f"{id.manifest.key} is of another save")
            except ObjectMissingError:
                if max(save.repeats.values()) < DOUBT_REPEATS:
                    return None
                silent = sorted(set(range(save.world_size)) - set(save.parts))
                text = f"ranks {silent} have said nothing since the coordinator was started again"
                return {"state": FAILED, "error": text, "permanent": False}
            return self._commit(id, list(save.parts.values()))

        outcome = self._guarded(save, from_store)
        if outcome is not None:
            with self._lock:
                self._sure_of = id.attempt
        return outcome

    def _guarded(self, save: _Save, decide: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        try:
            return decide()
        except SupersededError as error:
            return {"state": SUPERSEDED, "error": str(error)}
        except Exception as error:
            # Whatever it is: workers wait for an answer.
            save.tries += 1
            if is_transient(error) and save.tries < COMMIT_TRIES:
                return None
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            return {"state": FAILED, "error": text, "permanent": not is_transient(error)}

    def _commit(self, id: SaveId, parts: list[Mapping[str, Any]]) -> dict[str, Any]:
        started_s = time.perf_counter()
        require_newest(self._store, id.attempt)
        run = self._run
        if run is None or run.attempt != id.attempt:
            run = self._adopt(id.attempt)
        manifest = self._written(run, id, parts)
        # A manifest beside a newer attempt's is never valid; whoever wrote it must not count on it.
        require_newest(self._store, id.attempt)
        run.last = manifest
        committed_s = time.perf_counter()
        warnings = self._remove_old(run, id)
        written = [stored for stored in manifest.objects() if stored.key.startswith(f"{id.prefix}/")]
        num_bytes = sum(stored.num_bytes for stored in written)
        return {
            "state": COMMITTED,
            "num_bytes": num_bytes,
            "table_bytes": num_bytes - manifest.tensors.num_bytes,
            "is_base": not any(part["since"] for part in parts),
            "snapshot_s": max(part["snapshot_s"] for part in parts),
            "write_s": max(part["write_s"] for part in parts),
            "commit_s": committed_s - started_s,
            "retention_s": time.perf_counter() - committed_s,
            "wish": parts[0].get("wish", 0),
            "growth": run.growth,
            "warnings": warnings,
        }

    def _written(self, run: _Run, id: SaveId, parts: list[Mapping[str, Any]]) -> Manifest:
        """Write the manifest, unless it is there already, and return what is there."""
        earliest = 0 if run.last is None else run.last.step
        if id.step < earliest:
            raise ValueError(f"step: found {id.step}, expected at least {earliest}, after the checkpoint before")
        try:
            # Written before the answer to its create was lost, or before this coordinator was started again.
            manifest = read_manifest(self._store, id.manifest)
            if manifest.save != id.number:
                raise ValueError(f"step: {id.step} was saved already")
            return manifest
        except ObjectMissingError:
            pass
        except ManifestError as error:
            raise CheckpointError(f"{id.manifest.key} in {self._store.uri} is there already: {error}") from error
        tables, tensors = join_parts(parts, self._base_of(run, parts))
        manifest = Manifest(
            attempt=id.attempt,
            step=id.step,
            save=id.number,
            parent=run.last.id if run.last else None,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in _LIBRARIES},
                **parts[0].get("versions", {}),
            },
            digests=parts[0].get("digests", {}),
            metrics=parts[0]["metrics"],
            tables=tables,
            tensors=tensors,
            state=json.loads(parts[0]["state"]),
        )
        if not self._store.claim(id.manifest.key, manifest.to_bytes()):
            raise CheckpointError(f"{id.manifest.key} in {self._store.uri} is there already, with other content")
        with self._lock:
            self._sure_of = id.attempt
        return manifest

    def _base_of(self, run: _Run, parts: list[Mapping[str, Any]]) -> Manifest | None:
        """Return the checkpoint that the parts add to: the last one, or one before it where workers were told that the
        last failed.
        """
        since = parts[0]["since"]
        if since is None or (run.last is not None and run.last.id == ManifestId(*since)):
            return run.last
        return read_manifest(self._store, ManifestId(*since))

    def _adopt(self, attempt: int) -> _Run:
        """Take over an attempt from what the store says of it, as after a restart of this coordinator."""
        history = read_history(self._store)
        if max(history.attempts, default=0) != attempt:
            raise SupersededError(
                f"attempt {attempt} has not started, or is no longer the newest: this process must end"
            )
        chain = history.chain
        last = read_manifest(self._store, chain[-1]) if chain else None
        run = _Run(attempt, history.parents, history.damaged, last)
        with self._lock:
            self._attempt = max(self._attempt, attempt)
            self._run = run
        return run

    def _remove_old(self, run: _Run, id: SaveId) -> list[str]:
        """Apply retention; a failure costs space and not the checkpoint, so that it is a warning."""
        try:
            manifests = manifest_ids(self._store)
            removal = plan_removal(
                self._store,
                attempt=id.attempt,
                save=id.number,
                chain=visible_chain(run.parents, manifests),
                manifests=manifests,
                damaged=run.damaged,
                retention=self._retention,
                dead_attempts=not run.is_cleaned,
            )
            # A newer attempt may need what this one would delete, if it found the newest checkpoints damaged.
            require_newest(self._store, id.attempt)
            remove(self._store, removal)
            run.is_cleaned = True
        except OSError as error:
            return [f"older checkpoints were not removed: {error}"]
        return []
