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
from collections.abc import Mapping
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
    is_recalled: bool = False
    """Whether the store was asked if it was committed before this coordinator was started again."""

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.world_size or bool(self.failures)


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
        self._started: int | None = None
        """The attempt whose saves are committed."""
        self._parents: dict[int, ManifestId | None] = {}
        self._damaged: tuple[ManifestId, ...] = ()
        self._last: Manifest | None = None
        self._cleaned = False

    def begin_attempt(self) -> dict[str, Any]:
        """Win a number for a new attempt, and return what it may start from: the valid checkpoints, oldest first.

        Returns {"attempt", "chain", "damaged"}. From here on no older attempt commits anything.
        """
        number = win_number(self._store)
        history = read_history(self._store)
        with self._lock:
            self._attempt = max(self._attempt, number)
        return {"attempt": number, "chain": history.chain, "damaged": history.damaged}

    def start_attempt(self, attempt: int, parent: list[int] | None, damaged: list[list[int]]) -> dict[str, Any]:
        """Record the checkpoint that an attempt starts from (None: nothing), and which ones are damaged.

        Returns {"growth"} of the parent, None without one.
        """
        started_from = ManifestId(*parent) if parent else None
        record_start(self._store, attempt, started_from, tuple(ManifestId(*id) for id in damaged))
        self._adopt(attempt)
        return {"growth": self._growth()}

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
            incomplete = [id for id, save in self._saves.items() if not save.is_recalled]
        if complete is None:
            complete = next((id for id in incomplete if self._was_committed(id)), None)
        if complete is None:
            return False
        with self._lock:
            save = self._saves[complete]
        outcome = self._decide(complete, save)
        with self._lock:
            # Saves of one attempt come one after the other: what is older will never be complete.
            self._saves = {id: s for id, s in self._saves.items() if id > complete}
            self._outcomes[complete] = outcome
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

    def _was_committed(self, id: SaveId) -> bool:
        """Whether a save of which parts are missing was committed before this coordinator was started again: the ranks
        that were told so do not repeat their parts.
        """
        if self._started != id.attempt:
            try:
                # An earlier save of the same step, whose answer was lost, is as good.
                if read_manifest(self._store, id.manifest).save <= id.number:
                    return True
            except ObjectMissingError:
                pass
            except (OSError, ValueError):
                return False  # asked again with the next message
        with self._lock:
            self._saves[id].is_recalled = True
        return False

    def _decide(self, id: SaveId, save: _Save) -> dict[str, Any]:
        if save.failures:
            texts = [f"rank {rank}: {failure['error']}" for rank, failure in sorted(save.failures.items())]
            permanent = any(failure["permanent"] for failure in save.failures.values())
            return {"state": FAILED, "error": "; ".join(texts), "permanent": permanent}
        try:
            return self._commit(id, [part for _, part in sorted(save.parts.items())])
        except SupersededError as error:
            return {"state": SUPERSEDED, "error": str(error)}
        except Exception as error:
            # Whatever it is: workers wait for an answer.
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            return {"state": FAILED, "error": text, "permanent": not is_transient(error)}

    def _commit(self, id: SaveId, parts: list[Mapping[str, Any]]) -> dict[str, Any]:
        started_s = time.perf_counter()
        require_newest(self._store, id.attempt)
        if self._started != id.attempt:
            self._adopt(id.attempt)
        manifest = self._written(id, parts)
        # A manifest beside a newer attempt's is never valid; whoever wrote it must not count on it.
        require_newest(self._store, id.attempt)
        self._last = manifest
        committed_s = time.perf_counter()
        # From the manifest: after a restart of the coordinator parts may be missing here.
        prefix = SaveId(id.attempt, id.step, manifest.save).prefix
        num_bytes = [stored.num_bytes for stored in manifest.objects() if stored.key.startswith(f"{prefix}/")]
        warnings = self._remove_old(id)
        return {
            "state": COMMITTED,
            "num_bytes": sum(num_bytes),
            "table_bytes": sum(num_bytes) - manifest.tensors.num_bytes,
            "is_base": not any(part["since"] for part in parts),
            "snapshot_s": max(part["snapshot_s"] for part in parts),
            "write_s": max(part["write_s"] for part in parts),
            "commit_s": committed_s - started_s,
            "retention_s": time.perf_counter() - committed_s,
            "wish": parts[0].get("wish", 0),
            "growth": self._growth(),
            "warnings": warnings,
        }

    def _written(self, id: SaveId, parts: list[Mapping[str, Any]]) -> Manifest:
        """Write the manifest, unless it is there already, and return what is there."""
        earliest = 0 if self._last is None else self._last.step
        if id.step < earliest:
            raise ValueError(f"step: found {id.step}, expected at least {earliest}, after the checkpoint before")
        if self._last is not None and self._last.id == id.manifest and self._is_committed(self._last.save):
            raise ValueError(f"step: {id.step} was saved already")
        try:
            # Written before this coordinator was started again, or by a save of this step whose answer was lost.
            return read_manifest(self._store, id.manifest)
        except ObjectMissingError:
            pass
        except ManifestError as error:
            raise CheckpointError(f"{id.manifest.key} in {self._store.uri} is there already: {error}") from error
        tables, tensors = join_parts(parts, self._base_of(parts))
        manifest = Manifest(
            attempt=id.attempt,
            step=id.step,
            save=id.number,
            parent=self._last.id if self._last else None,
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
        return manifest

    def _is_committed(self, number: int) -> bool:
        """Whether workers were told that a save of this attempt is committed."""
        with self._lock:
            return any(
                id.number == number and id.attempt == self._started and outcome["state"] == COMMITTED
                for id, outcome in self._outcomes.items()
            )

    def _base_of(self, parts: list[Mapping[str, Any]]) -> Manifest | None:
        """Return the checkpoint that the parts add to: the last one, or one before it where workers were told that the
        last failed because its answer was lost.
        """
        since = parts[0]["since"]
        if since is None or (self._last is not None and self._last.id == ManifestId(*since)):
            return self._last
        return read_manifest(self._store, ManifestId(*since))

    def _adopt(self, attempt: int) -> None:
        """Take over an attempt from what the store says of it, as after a restart of this coordinator."""
        history = read_history(self._store)
        if max(history.attempts, default=0) != attempt:
            raise SupersededError(
                f"attempt {attempt} has not started, or is no longer the newest: this process must end"
            )
        chain = history.chain
        self._last = read_manifest(self._store, chain[-1]) if chain else None
        self._parents, self._damaged = history.parents, history.damaged
        with self._lock:
            self._attempt = max(self._attempt, attempt)
        self._started, self._cleaned = attempt, False

    def _growth(self) -> dict[str, Any] | None:
        return asdict(Growth.of(self._last)) if self._last else None

    def _remove_old(self, id: SaveId) -> list[str]:
        """Apply retention; a failure costs space and not the checkpoint, so that it is a warning."""
        try:
            manifests = manifest_ids(self._store)
            removal = plan_removal(
                self._store,
                attempt=id.attempt,
                save=id.number,
                chain=visible_chain(self._parents, manifests),
                manifests=manifests,
                damaged=self._damaged,
                retention=self._retention,
                dead_attempts=not self._cleaned,
            )
            remove(self._store, removal)
            self._cleaned = True
        except OSError as error:
            return [f"older checkpoints were not removed: {error}"]
        return []
