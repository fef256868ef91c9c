"""Commits of a run's saves: a manifest is written, and the save is a checkpoint; later on older ones may go.

Nothing is kept between two commits that the store could not tell again.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cluster.attempts import Attempt, History, SupersededError, manifest_ids, read_history, require_newest
from cluster.document_kinds import ID_OR_NONE, MAPPING, NUMBER, WHOLE, require_kinds
from cluster.manifest import Manifest, ManifestError, ManifestId, read_listed_manifest, read_manifest, visible_chain
from cluster.parts import Growth, join_parts
from cluster.retention import Needs, Retention, plan_removal, remove
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

_OF_PART = {"since": ID_OR_NONE, "snapshot_s": NUMBER, "write_s": NUMBER, "wish": WHOLE, "tables": MAPPING}
_LIBRARIES = ("torch", "numpy", "safetensors", "fsspec")


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


@dataclass(frozen=True)
class Removed:
    """What became of a removal. problems: why something stayed that should not, in sentences."""

    after: SaveId
    problems: list[str]
    seconds: float


class Commits:
    """The commits of one run's saves to a store. Safe in threads. retention: which checkpoints are kept."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._run: _Run | None = None
        self._needs = Needs()
        self._removable: tuple[_Run, SaveId] | None = None
        self._records: dict[int, Attempt] = {}
        # An attempt can start while a commit of the one before is still at work: each has its own `_Run`.
        self.wrote: int | None = None
        """The attempt of the newest manifest that this process wrote, rather than a coordinator before it."""

    def history(self) -> History:
        """Return what the store says about the run; records of attempts, which never change, are read once."""
        history = read_history(self._store, self._records)
        self._records = history.attempts
        return history

    def adopt(self, attempt: int) -> dict[str, Any] | None:
        """Take over an attempt from what the store says of it; return the growth of its newest checkpoint, if any.

        Raises SupersededError where it has not started or is not the newest.
        """
        return self._adopted(attempt).growth

    def commit(self, id: SaveId, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a save whose parts are all here a checkpoint, unless it is one already; return figures about it.

        Raises SupersededError after a newer attempt, CheckpointError and ValueError for what can never be committed,
        OSError for what the storage refused.
        """
        started_s = time.perf_counter()
        # All that may be odd about the parts shows before the manifest is there: a failure is told where none is.
        for part in parts:
            require_kinds(part, _OF_PART, "a rank's part")
        said = {
            "is_base": not any(part["since"] for part in parts),
            "snapshot_s": max(part["snapshot_s"] for part in parts),
            "write_s": max(part["write_s"] for part in parts),
            "wish": parts[0].get("wish", 0),
        }
        require_newest(self._store, id.attempt)
        run = self._run
        if run is None or run.attempt != id.attempt:
            run = self._adopted(id.attempt)
        manifest = self._written(run, id, parts)
        # A manifest beside a newer attempt's is never valid; whoever wrote it must not count on it.
        require_newest(self._store, id.attempt)
        run.last = manifest
        self._needs.learn(manifest)
        self._removable = run, id
        written = [stored for stored in manifest.objects() if stored.key.startswith(f"{id.prefix}/")]
        num_bytes = sum(stored.num_bytes for stored in written)
        return {
            "num_bytes": num_bytes,
            "table_bytes": num_bytes - manifest.tensors.num_bytes,
            **said,
            "commit_s": time.perf_counter() - started_s,
            "growth": run.growth,
        }

    def _written(self, run: _Run, id: SaveId, parts: Sequence[Mapping[str, Any]]) -> Manifest:
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
        self.wrote = id.attempt
        return manifest

    def _base_of(self, run: _Run, parts: Sequence[Mapping[str, Any]]) -> Manifest | None:
        """Return the checkpoint that the parts add to: the last one, or one before it where workers were told that the
        last failed.
        """
        since = parts[0]["since"]
        if since is None or (run.last is not None and run.last.id == ManifestId(*since)):
            return run.last
        return read_listed_manifest(self._store, ManifestId(*since))

    def _adopted(self, attempt: int) -> _Run:
        history = self.history()
        if max(history.attempts, default=0) != attempt:
            raise SupersededError(
                f"attempt {attempt} has not started, or is no longer the newest: this process must end"
            )
        chain = history.chain
        last = read_listed_manifest(self._store, chain[-1]) if chain else None
        run = self._run = _Run(attempt, history.parents, history.damaged, last)
        return run

    def remove_old(self, is_wanted: Callable[[SaveId], bool]) -> Removed | None:
        """Apply retention after the newest commit; None if there was none since the last call. Not while another call
        of it is at work.

        is_wanted: asked before each piece of the work whether to go on after this save; what is left then is found the
        next time. A failure costs space and not the checkpoint, so that it is a warning.
        """
        removable = self._removable
        if removable is None:
            return None
        run, id = removable
        started_s = time.perf_counter()
        problems: list[str] = []
        try:
            problems += self._remove(run, id, is_wanted)
        except Exception as error:
            # Whatever it is: checkpoints are committed all the same.
            text = str(error) if isinstance(error, OSError) else repr(error)
            problems.append(f"older checkpoints were not removed: {text}")
        if self._removable is removable:
            self._removable = None
        return Removed(id, problems, time.perf_counter() - started_s)

    def _remove(self, run: _Run, id: SaveId, is_wanted: Callable[[SaveId], bool]) -> list[str]:
        manifests = manifest_ids(self._store)
        chain = visible_chain(run.parents, manifests)
        self._needs.forget_all_but(manifests)
        removal = plan_removal(
            self._store,
            attempt=id.attempt,
            save=id.number,
            chain=[other for other in chain if other <= id.manifest],
            newer=[other for other in chain if other > id.manifest],
            manifests=manifests,
            damaged=run.damaged,
            retention=self._retention,
            dead_attempts=not run.is_cleaned,
            needs=self._needs,
        )
        # A newer attempt may need what this one would delete, if it found the newest checkpoints damaged.
        require_newest(self._store, id.attempt)

        def look(done: int, total: int) -> None:
            if not is_wanted(id):
                raise InterruptedError(f"{total - done} of {total} objects are left for the next time")

        with suppress(InterruptedError):
            remove(self._store, removal, look)
            run.is_cleaned = True
        return removal.problems
