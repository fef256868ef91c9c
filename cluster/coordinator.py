"""The coordinator of a run's checkpoints: begins attempts, collects what workers wrote, and commits manifests.

A plain state machine: no threads, no clock, no torch collectives, so that a dead rank cannot hang it and a test can
stop it between any two operations. It keeps nothing that it could not rebuild from the store: workers repeat what they
have to say until it is answered, and everything that they say may come late, twice or in another order.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.attempts import SupersededError, record_start, require_newest, win_number
from cluster.commits import Commits, Removed, SaveId
from cluster.manifest import ManifestId, read_manifest
from cluster.patience import is_transient
from cluster.retention import Retention
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

_REMEMBERED = 16
COMMIT_TRIES = 100
"""How often a save is tried to be committed while the storage fails in ways that pass."""
DOUBT_REPEATS = 600
"""How often a rank repeats itself, once a second, to a coordinator that was started again before the others, which have
not spoken since, are taken to have heard a failure from the one before."""
COLLECTING, COMMITTED, FAILED, SUPERSEDED = "collecting", "committed", "failed", "superseded"


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


class Coordinator:
    """Checkpoints of one run. `begin_attempt`, `start_attempt`, `work`, `remove_old` and `is_superseded` use the store.

    Safe in threads. retention: which checkpoints are kept. All arguments and results are JSON-able.
    """

    def __init__(self, store: Store, *, retention: Retention | None = None) -> None:
        self._store = store
        self._commits = Commits(store, retention or Retention())
        self._lock = threading.Lock()
        self._saves: dict[SaveId, _Save] = {}
        self._outcomes: dict[SaveId, dict[str, Any]] = {}
        self._attempt = 0
        """The newest attempt that is known to have won a number."""
        self._removed: Removed | None = None
        """What became of the last removal; the next save tells it."""
        self._num_beginning = 0
        """Calls that are winning a number: a newer one than `_attempt` in the store may be theirs."""
        self._sure_of: int | None = None
        """The attempt that was started here, or of which the ranks were told here what became of a save."""

    def begin_attempt(self) -> dict[str, Any]:
        """Win a number for a new attempt, and return what it may start from: the valid checkpoints, oldest first, and
        newer ones that the attempt before could not read, if it saved nothing.

        Returns {"attempt", "chain", "damaged"}. From here on no older attempt commits anything.
        """
        with self._lock:
            self._num_beginning += 1
        try:
            number = win_number(self._store)
            with self._lock:
                self._attempt = max(self._attempt, number)
        finally:
            with self._lock:
                self._num_beginning -= 1
        history = self._commits.history()
        started_from = history.parents[max(history.parents)] if history.parents else None
        if started_from and not history.chain:
            raise CheckpointError(
                f"{started_from.key} in {self._store.uri}, from which attempt {max(history.parents)} started, was "
                "deleted, and there is no newer checkpoint: put it back from a copy, or start a new run under another "
                "URI"
            )
        return {"attempt": number, "chain": history.candidates, "damaged": history.damaged}

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
        growth = self._commits.adopt(attempt)
        with self._lock:
            self._attempt = max(self._attempt, attempt)
            self._sure_of = attempt
        return {"growth": None if damaged else growth}

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
            if id is None or (not complete and (self._is_sure_of(id) or id.attempt < self._attempt)):
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

    def remove_old(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Remove what the newest committed save left without use, if there is anything to do; return whether there was.

        A save is told before, and the next ones go on meanwhile, so that a thread of its own calls it. What went wrong
        stands among the warnings of this save for whoever asks from now on, and of the next one.
        """

        def is_wanted(id: SaveId) -> bool:
            return not should_stop() and id.attempt >= self._attempt

        removed = self._commits.remove_old(is_wanted)
        if removed is None:
            return False
        with self._lock:
            self._removed = removed
            told = self._outcomes.get(removed.after, {}).get("warnings", [])
            told += [problem for problem in removed.problems if problem not in told]
        return True

    @property
    def attempt(self) -> int:
        """The newest attempt that this coordinator knows of, 0 for none."""
        with self._lock:
            return self._attempt

    @property
    def last_wish(self) -> int:
        """The highest number of a wish for a checkpoint that a committed save fulfilled."""
        with self._lock:
            return max((outcome.get("wish", 0) for outcome in self._outcomes.values()), default=0)

    def is_superseded(self) -> bool:
        """Whether a newer attempt than this coordinator's was begun elsewhere."""
        attempt = self.attempt
        try:
            if attempt:
                require_newest(self._store, attempt)
        except SupersededError:
            with self._lock:
                return self._attempt == attempt and not self._num_beginning
        return False

    def _decide(self, id: SaveId, save: _Save) -> dict[str, Any] | None:
        """Return what becomes of a save, None where the storage has to answer first.

        A failure is told only where no manifest was written or will be: a coordinator that is started again then tells
        the other ranks the same.
        """
        if save.failures:
            texts = [f"rank {rank}: {failure.get('error')}" for rank, failure in sorted(save.failures.items())]
            permanent = any(failure.get("permanent", True) for failure in save.failures.values())
            return {"state": FAILED, "error": "; ".join(texts), "permanent": permanent}
        return self._guarded(save, lambda: self._commit(id, [save.parts[rank] for rank in range(save.world_size)]))

    def _commit(self, id: SaveId, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        figures = self._commits.commit(id, parts)
        with self._lock:
            removed, self._removed = self._removed, None
        return {
            "state": COMMITTED,
            **figures,
            "retention_s": removed.seconds if removed else 0.0,
            "warnings": list(removed.problems) if removed else [],
        }

    def _is_sure_of(self, id: SaveId) -> bool:
        """Whether no coordinator before this one can have told the outcome of the attempt's present save."""
        return id.attempt in (self._sure_of, self._commits.wrote)

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
