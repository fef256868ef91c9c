"""What a run's store holds: every checkpoint and its state, what torn saves left, and who trains the run. Reads only.

It may be taken of a run that trains: what retention deletes meanwhile is left out. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.attempts import manifest_ids, read_history
from cluster.lease import KEY as HEARTBEAT
from cluster.lease import Holder, read_heartbeat
from cluster.manifest import Manifest, ManifestError, ManifestId, NewerFormatError, read_listed_manifest
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError, StoredObject
from cluster.threads import in_threads

_NUM_THREADS = 8
_OBJECT = re.compile(r"objects/(\d{6,})/(\d{12,})-(\d{4,})/.*")
_MANIFEST = re.compile(r"manifests/\d{6,}-\d{12,}\.json")
_ATTEMPT = re.compile(r"attempts/\d{6,}(\.start)?\.json")


class State(StrEnum):
    """What a checkpoint is good for.

    NEWEST: what a restart goes on from, if it is intact. VALID: one before it. ORPHAN: of an attempt that was left
    behind. DAMAGED: a restore found it damaged; it is kept for inspection. INCOMPLETE: objects of it are missing, or
    have another size. UNREADABLE: its manifest is. NEWER: a newer version wrote it. UNCLEAR: the records of the
    attempts, which say what is valid, cannot be used.
    """

    NEWEST = "newest"
    VALID = "valid"
    ORPHAN = "orphan"
    DAMAGED = "damaged"
    INCOMPLETE = "incomplete"
    UNREADABLE = "unreadable"
    NEWER = "newer format"
    UNCLEAR = "unclear"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint. manifest: None where it cannot be read. problem: what is wrong, "" for nothing that is known.

    on_chain: whether it is valid if it is intact.
    """

    id: ManifestId
    state: State
    manifest: Manifest | None
    problem: str = ""
    on_chain: bool = False

    @property
    def own_bytes(self) -> int:
        """Bytes that its save wrote."""
        return sum(stored.num_bytes for stored in self._objects() if stored.key.startswith(self.id.objects_prefix))

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects that a restore reads, those of earlier saves included."""
        return sum(stored.num_bytes for stored in self._objects())

    @property
    def num_increments(self) -> int:
        """Saves whose increments it consists of, beside the whole tables."""
        tables = self.manifest.tables.values() if self.manifest else ()
        owners = [_OBJECT.fullmatch(increment.key) for table in tables for increment in table.increments]
        return len({owner.group(1, 2, 3) for owner in owners if owner})

    @property
    def base(self) -> ManifestId | None:
        """The save that wrote the whole tables that it adds to; None where it wrote them itself."""
        owners = [_OBJECT.fullmatch(stored.key) for stored in self._objects()]
        first = min((ManifestId(int(owner[1]), int(owner[2])) for owner in owners if owner), default=self.id)
        return first if first < self.id else None

    def _objects(self) -> Sequence[StoredObject]:
        return self.manifest.objects() if self.manifest else ()


@dataclass(frozen=True, order=True, kw_only=True)
class Remains:
    """Objects of a save without a manifest. is_open: they may be of a save that is being written now."""

    attempt: int
    step: int
    save: int
    num_objects: int
    num_bytes: int
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Who has the run, by its heartbeat. is_dead: it surely ended without saying so. Times are of its own clock."""

    holder: Holder
    since: str
    renewed: str
    is_dead: bool


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Everything in a run's store of checkpoints.

    entries: oldest first. sizes: bytes of every object, by key. strays: keys that are none of ours. attempt: the newest
    that was begun, 0 for none. damaged: the record of what restores found damaged. holding: None where nobody has the
    run. problem: why it is not clear which checkpoints are valid; "" where it is.
    """

    uri: str
    entries: tuple[Entry, ...]
    remains: tuple[Remains, ...]
    strays: tuple[str, ...]
    sizes: Mapping[str, int] = field(repr=False)
    attempt: int
    damaged: tuple[ManifestId, ...]
    holding: Holding | None
    problem: str = ""

    @property
    def is_held(self) -> bool:
        """Whether somebody may train the run now."""
        return self.holding is not None and not self.holding.is_dead

    @property
    def chain(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.on_chain]

    @property
    def usable(self) -> list[Entry]:
        """The valid checkpoints of which nothing is known to be wrong, oldest first."""
        return [entry for entry in self.chain if entry.state in (State.NEWEST, State.VALID)]

    @property
    def newest(self) -> Entry | None:
        return self.usable[-1] if self.usable else None


def take_stock(store: Store) -> Inventory:
    """Look at everything in the store. StoreError where it does not answer."""
    holding = read_holding(store)
    problem, chain, damaged, attempt = "", frozenset[ManifestId](), (), 0
    try:
        history = read_history(store)
        ids, chain, damaged, attempt = history.manifests, frozenset(history.chain), history.damaged, history.newest
    except (CheckpointError, NewerFormatError) as error:
        ids, problem = manifest_ids(store), str(error)
    found = in_threads(lambda id: _read(store, id), ids, _NUM_THREADS)
    # After the manifests: whatever a manifest names was there before it.
    sizes = dict(store.list_sizes())
    entries: list[Entry] = []
    for id, read in zip(ids, found, strict=True):
        manifest = read if isinstance(read, Manifest) else None
        lacking = _lacking(manifest, sizes) if manifest else ""
        if (lacking or manifest is None) and not store.exists(id.key):
            continue  # deleted while we looked
        if isinstance(read, NewerFormatError):
            state = State.NEWER
        elif manifest is None:
            state = State.UNREADABLE
        elif problem:
            state = State.UNCLEAR
        elif id in damaged:
            state = State.DAMAGED
        elif id not in chain:
            state = State.ORPHAN
        else:
            state = State.INCOMPLETE if lacking else State.VALID
        entries.append(
            Entry(
                id=id,
                state=state,
                manifest=manifest,
                problem=lacking if manifest else str(read),
                on_chain=id in chain and id not in damaged,
            )
        )
    valid = [place for place, entry in enumerate(entries) if entry.state is State.VALID]
    if valid:
        entries[valid[-1]] = replace(entries[valid[-1]], state=State.NEWEST)
    return Inventory(
        uri=store.uri,
        entries=tuple(entries),
        remains=tuple(_remains(entries, sizes, attempt if holding and not holding.is_dead else None)),
        strays=tuple(key for key in sizes if not _is_ours(key)),
        sizes=sizes,
        attempt=attempt,
        damaged=damaged,
        holding=holding,
        problem=problem,
    )


def read_holding(store: Store) -> Holding | None:
    """Return who has the run, None where nobody has, or where the last one released it."""
    heartbeat = read_heartbeat(store)
    if heartbeat is None or heartbeat["released"]:
        return None
    holder = Holder(**heartbeat["holder"])
    return Holding(
        holder=holder, since=heartbeat["since"], renewed=heartbeat["renewed"], is_dead=holder.is_surely_dead()
    )


def _read(store: Store, id: ManifestId) -> Manifest | Exception:
    try:
        return read_listed_manifest(store, id)
    except (ManifestError, NewerFormatError, ObjectMissingError) as error:
        return error


def _lacking(manifest: Manifest, sizes: Mapping[str, int]) -> str:
    """Return what is missing of a checkpoint by the sizes of the objects, in words; "" for nothing."""
    objects = manifest.objects()
    lacking = [stored.key for stored in objects if sizes.get(stored.key) != stored.num_bytes]
    if not lacking:
        return ""
    return f"{len(lacking)} of {len(objects)} objects are missing or have another size: {', '.join(lacking[:3])}"


def _remains(entries: Sequence[Entry], sizes: Mapping[str, int], open_attempt: int | None) -> list[Remains]:
    """Return what belongs to no manifest, by save. open_attempt: the one that may be writing now."""
    needed = {stored.key for entry in entries if entry.manifest for stored in entry.manifest.objects()}
    unread = tuple(entry.id.objects_prefix for entry in entries if entry.manifest is None)
    found: dict[tuple[int, int, int], list[int]] = {}
    for key, num_bytes in sizes.items():
        owner = _OBJECT.fullmatch(key)
        if owner and key not in needed and not key.startswith(unread):
            found.setdefault((int(owner[1]), int(owner[2]), int(owner[3])), []).append(num_bytes)
    committed = max((e.manifest.save for e in entries if e.manifest and e.id.attempt == open_attempt), default=-1)
    return [
        Remains(
            attempt=attempt,
            step=step,
            save=save,
            num_objects=len(found[attempt, step, save]),
            num_bytes=sum(found[attempt, step, save]),
            is_open=attempt == open_attempt and save > committed,
        )
        for attempt, step, save in sorted(found)
    ]


def _is_ours(key: str) -> bool:
    return key == HEARTBEAT or any(pattern.fullmatch(key) for pattern in (_OBJECT, _ATTEMPT, _MANIFEST))
