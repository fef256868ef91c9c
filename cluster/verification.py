"""Choosing checkpoints of a run, and reading back every byte of them. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.attempts import History
from cluster.manifest import Manifest, ManifestError, ManifestId, describe, read_listed_manifest
from cluster.store import ObjectMissingError, Store, StoreError
from cluster.stored_object import CheckpointError, DamagedObjectError, StoredObject, read_into
from cluster.threads import in_threads


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What reading a checkpoint found. problems: sentences, none where it is intact."""

    id: ManifestId
    num_objects: int
    num_bytes: int
    problems: tuple[str, ...]


def choose(history: History, uri: str, *, step: int | None = None, attempt: int | None = None) -> ManifestId:
    """Return the newest valid checkpoint, or the one that was asked for, which need not be valid.

    CheckpointError where there is none, or where only the attempt would tell which of several is meant.
    """
    asked = [id for id in history.manifests if step in (None, id.step) and attempt in (None, id.attempt)]
    valid = [id for id in asked if id in set(history.chain)]
    if valid:
        return valid[-1]
    if not history.manifests:
        raise CheckpointError(f"{uri} has no checkpoint yet")
    if step is None and attempt is None:
        raise CheckpointError(f"{uri} has no valid checkpoint; orphans are {describe(asked[-5:])}")
    if not asked:
        raise CheckpointError(
            f"{uri} has no checkpoint of {_asked(step, attempt)}; expected one of {describe(history.manifests[-8:])}"
        )
    if len({id.attempt for id in asked}) > 1:
        raise CheckpointError(f"{uri} has {describe(asked)}, and none is valid: say which attempt")
    return asked[-1]


def verify(
    store: Store,
    ids: Sequence[ManifestId],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    num_threads: int = 4,
) -> list[Verified]:
    """Read checkpoints and all their objects, those that several share once; return what was found of each.

    Those that a running training deleted meanwhile are left out. on_progress: takes the bytes that are done, and of how
    many. Raises StoreError where a remote storage fails, NewerFormatError where a newer version wrote one.
    """
    manifests: dict[ManifestId, Manifest | str] = {}
    for id in ids:
        try:
            manifests[id] = read_listed_manifest(store, id)
        except (ManifestError, ObjectMissingError) as error:
            manifests[id] = str(error)
    objects = {stored: "" for m in manifests.values() if isinstance(m, Manifest) for stored in m.objects()}
    total, done, lock = sum(stored.num_bytes for stored in objects), 0, threading.Lock()
    if on_progress:
        on_progress(0, total)

    def look(stored: StoredObject) -> None:
        nonlocal done
        objects[stored] = _problem_of(store, stored)
        with lock:
            done += stored.num_bytes
            if on_progress:
                on_progress(done, total)

    in_threads(look, list(objects), num_threads)
    found: list[Verified] = []
    for id, manifest in manifests.items():
        needed = manifest.objects() if isinstance(manifest, Manifest) else []
        problems = [objects[s] for s in needed if objects[s]] if isinstance(manifest, Manifest) else [manifest]
        if problems and not store.exists(id.key):
            continue
        num_bytes = sum(stored.num_bytes for stored in needed)
        found.append(Verified(id=id, num_objects=len(needed), num_bytes=num_bytes, problems=tuple(problems)))
    return found


def _problem_of(store: Store, stored: StoredObject) -> str:
    try:
        read_into(store, stored, None)
    except DamagedObjectError as error:
        return str(error)
    except StoreError as error:
        # Of a disk, one file that cannot be read says nothing of the others.
        if store.protocol != "file":
            raise
        return str(error)
    return ""


def _asked(step: int | None, attempt: int | None) -> str:
    parts = [f"step {step:,}" if step is not None else "", f"attempt {attempt}" if attempt is not None else ""]
    return ", ".join(part for part in parts if part)
