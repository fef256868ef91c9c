"""Which checkpoints are kept, and how the others are removed without ever endangering those.

A manifest is deleted before its objects, and both only after a newer manifest was committed: a crash between any two
operations leaves objects without a manifest, which the next removal finds, and never a manifest without objects. What
an increment needs of older saves is named in its own manifest, and so stays with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.attempts import attempt_numbers
from cluster.manifest import Manifest, ManifestError, ManifestId, NewerFormatError
from cluster.store import Store

_OWNER = re.compile(r"objects/(\d{6,})/\d{12,}-(\d{4,})/.*")


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
    """What a removal deletes: manifests, then objects, then what killed writers left in folders."""

    manifests: list[ManifestId]
    objects: list[str]
    folders: list[str]


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
) -> Removal:
    """Find what no kept checkpoint needs: older ones, the remains of attempts off the chain, of failed saves and of
    unfinished uploads. Reads only.

    attempt, save: the newest save that has ended; what belongs to later ones is not touched. chain: the valid ones of
    `manifests`. damaged: these stay for inspection. dead_attempts: look for unfinished uploads of older attempts.
    """
    metrics: dict[ManifestId, Mapping[str, float]] = {}
    needed: dict[ManifestId, list[str] | None] = {}
    valid = set(chain)
    for id in chain if retention.best else ():
        metrics[id] = _read(store, id, needed)
    kept, deletable = retention.keep(chain, metrics)
    orphans = [id for id in manifests if id.attempt <= attempt and id not in valid and id not in damaged]
    needed_keys: set[str] = set()
    needed_prefixes = [id.objects_prefix for id in damaged]
    for id in [*kept, *(id for id in damaged if id in manifests)]:
        _read(store, id, needed)
        keys = needed[id]
        if keys is None:
            needed_prefixes.append(id.objects_prefix)
        else:
            needed_keys.update(keys)
    objects: list[str] = []
    for key in store.list("objects/"):
        owner = _OWNER.fullmatch(key)
        ended = owner is not None and (int(owner[1]), int(owner[2])) <= (attempt, save)
        if ended and key not in needed_keys and not key.startswith(tuple(needed_prefixes)):
            objects.append(key)
    folders = sorted({"/".join(key.split("/")[:3]) for key in objects})
    if dead_attempts:
        folders += [f"objects/{number:06d}" for number in attempt_numbers(store) if number < attempt]
    return Removal(manifests=[*deletable, *orphans], objects=objects, folders=folders)


def remove(store: Store, removal: Removal, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Delete what was planned: manifests before objects.

    on_progress: called before each deletion with how many are done, and of how many; what it raises ends the removal.
    """
    keys = [*(id.key for id in removal.manifests), *removal.objects]
    for done, key in enumerate(keys):
        if on_progress:
            on_progress(done, len(keys))
        store.delete(key)
    for folder in removal.folders:
        store.remove_leftovers(folder)


def _read(store: Store, id: ManifestId, needed: dict[ManifestId, list[str] | None]) -> Mapping[str, float]:
    """Take down the objects that a manifest needs (None: it does not say) and return its metrics."""
    try:
        manifest = Manifest.from_bytes(store.get(id.key), id.key)
    except (ManifestError, NewerFormatError, FileNotFoundError):
        needed[id] = None
        return {}
    needed[id] = [stored.key for stored in manifest.objects()]
    return manifest.metrics
