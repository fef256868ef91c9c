"""Which checkpoints are kept, and how the others are removed without ever endangering those.

A manifest is deleted before its objects, and both only after a newer manifest was committed: a crash between any two
operations leaves objects without a manifest, which the next removal finds, and never a manifest without objects. What
an increment needs of older saves is named in its own manifest, and so stays with it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.attempts import attempt_numbers
from cluster.manifest import Manifest, ManifestError, ManifestId, NewerFormatError, describe, read_listed_manifest
from cluster.store import Store
from cluster.threads import in_threads

_OWNER = re.compile(r"objects/(\d{6,})/(\d{12,})-(\d{4,})/.*")
_NUM_THREADS = 16
PIECE = 1000
"""Deletions between two looks at whether they are still wanted."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which of the valid checkpoints are kept; those that any of the three rules names.

    last: the newest so many. every_steps: the first at or after each multiple of so many steps. best: the one with the
    highest value of this metric, the lowest where lower_is_better (of several, the newest).
    """

    last: int = 3
    every_steps: int | None = None
    best: str | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every_steps is not None and self.every_steps < 1):
            raise ValueError(f"retention: found {self}, expected at least 1")

    def keep(
        self, chain: Sequence[ManifestId], metrics: Mapping[ManifestId, Mapping[str, float]] | None = None
    ) -> tuple[list[ManifestId], list[ManifestId]]:
        """Divide valid manifests, oldest first, into (kept, deletable). metrics: of those that have any."""
        kept = set(chain[-self.last :])
        if self.every_steps is not None:
            before = -1
            for id in chain:
                if id.step // self.every_steps > before // self.every_steps:
                    kept.add(id)
                before = id.step
        if self.best is not None and metrics:
            sign, usable = (-1 if self.lower_is_better else 1), set(chain)
            found = [(values[self.best], id) for id, values in metrics.items() if id in usable and self.best in values]
            # NaN is neither more nor less than anything, and JSON of other writers has it.
            rated = [(sign * value, id) for value, id in found if value == value and abs(value) != math.inf]
            kept.update([max(rated)[1]] if rated else [])
        return [id for id in chain if id in kept], [id for id in chain if id not in kept]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a removal deletes: manifests, then objects, then what killed writers left in folders.

    problems: what could not be read, so that whatever it may need stays, in sentences.
    """

    manifests: list[ManifestId]
    objects: list[str]
    folders: list[str]
    problems: list[str]


class Needs:
    """The objects that manifests need, and their metrics: read once, as what a manifest says never changes.

    Safe in threads, of which one forgets.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[ManifestId, tuple[tuple[str, ...], Mapping[str, float]]] = {}
        self._keys: dict[str, str] = {}

    def learn(self, manifest: Manifest) -> None:
        """Take down what a manifest needs."""
        with self._lock:
            # One text for each key: many manifests need the same objects.
            keys = tuple(self._keys.setdefault(stored.key, stored.key) for stored in manifest.objects())
            self._known[manifest.id] = keys, manifest.metrics

    def look_up(self, store: Store, ids: Iterable[ManifestId]) -> dict[ManifestId, str]:
        """Learn what these manifests need, several at a time; return which cannot be read, and why."""
        unknown = [id for id in ids if id not in self._known]
        problems: dict[ManifestId, str] = {}
        for id, read in zip(unknown, in_threads(lambda id: _read(store, id), unknown, _NUM_THREADS), strict=True):
            if isinstance(read, Manifest):
                self.learn(read)
            else:
                problems[id] = str(read)
        return problems

    def keys(self, id: ManifestId) -> tuple[str, ...]:
        """Return the objects that a manifest needs; none where it is not known."""
        return self._known[id][0] if id in self._known else ()

    def metrics(self, ids: Iterable[ManifestId]) -> dict[ManifestId, Mapping[str, float]]:
        """Return the metrics of those of the manifests that are known."""
        return {id: self._known[id][1] for id in ids if id in self._known}

    def forget_all_but(self, ids: Collection[ManifestId]) -> None:
        """Forget manifests that are gone."""
        with self._lock:
            if gone := self._known.keys() - set(ids):
                for id in gone:
                    del self._known[id]
                self._keys = {key: key for keys, _ in self._known.values() for key in keys}


def plan_removal(
    store: Store,
    *,
    attempt: int,
    save: int,
    chain: Sequence[ManifestId],
    manifests: Collection[ManifestId],
    damaged: Collection[ManifestId],
    retention: Retention,
    dead_attempts: bool = True,
    newer: Collection[ManifestId] = (),
    needs: Needs | None = None,
) -> Removal:
    """Find what no kept checkpoint needs: older ones, the remains of attempts off the chain, of failed saves and of
    unfinished uploads. Reads only.

    Of a checkpoint that has to stay and cannot be read it is not known what it needs, or how good it is: it stays, and
    so does everything that is not newer.

    attempt, save: the newest save that has ended; what belongs to later ones is not touched. chain: the valid ones of
    `manifests`. damaged: these stay for inspection. newer: valid ones of later saves, which stay. dead_attempts: look
    for unfinished uploads of older attempts. needs: what is known from earlier.
    """
    needs = Needs() if needs is None else needs
    valid, there = set(chain), set(manifests)
    unread = needs.look_up(store, chain) if retention.best else {}
    kept, deletable = retention.keep(chain, needs.metrics(chain))
    staying = [id for id in (*kept, *newer, *damaged) if id in there]
    unread |= needs.look_up(store, [id for id in staying if id not in unread])
    last_unread = max(unread, default=None)
    orphans = [id for id in manifests if id.attempt <= attempt and id not in valid | set(newer) and id not in damaged]
    needed_keys = {key for id in staying for key in needs.keys(id)}
    needed_prefixes = tuple(id.objects_prefix for id in damaged)
    objects: list[str] = []
    for key in store.list("objects/"):
        owner = _OWNER.fullmatch(key)
        if owner is None or (int(owner[1]), int(owner[3])) > (attempt, save):
            continue
        is_unclear = last_unread is not None and (int(owner[1]), int(owner[2])) <= last_unread
        if not is_unclear and key not in needed_keys and not key.startswith(needed_prefixes):
            objects.append(key)
    folders = sorted({"/".join(key.split("/")[:3]) for key in objects})
    if dead_attempts:
        folders += [f"objects/{number:06d}" for number in attempt_numbers(store) if number < attempt]
    return Removal(
        manifests=[id for id in (*deletable, *orphans) if last_unread is None or id > last_unread],
        objects=objects,
        folders=folders,
        problems=[_unread(id, unread[id]) for id in sorted(unread)],
    )


def remove(store: Store, removal: Removal, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Delete what was planned: manifests before objects.

    on_progress: called before each piece of the work with how many deletions are done, and of how many; what it raises
    ends the removal.
    """
    manifests = [id.key for id in removal.manifests]
    total = len(manifests) + len(removal.objects)
    done = 0
    for keys in (manifests, removal.objects):
        for start in range(0, len(keys), PIECE):
            if on_progress:
                on_progress(done, total)
            piece = keys[start : start + PIECE]
            store.delete_many(piece)
            done += len(piece)
    if removal.folders:
        store.remove_leftovers(*removal.folders)


def _unread(id: ManifestId, problem: str) -> str:
    return (
        f"nothing as old as the checkpoint of {describe([id])} was removed, since it is not known what it needs: "
        f"{problem}; put its manifest back from a copy, or remove it by hand (checkpoints prune --damaged)"
    )


def _read(store: Store, id: ManifestId) -> Manifest | Exception:
    """Return a manifest that a listing showed, or why it cannot be read."""
    try:
        return read_listed_manifest(store, id)
    except (ManifestError, NewerFormatError, FileNotFoundError) as error:
        return error
