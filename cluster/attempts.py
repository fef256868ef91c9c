"""Attempts to run: each has a number that no other has, and a record of the checkpoint that it starts from.

The number is won by a conditional create, so that of two drivers that start at once one gets the lower number. The
newest attempt alone decides which checkpoints are valid: an older one that still runs (a zombie) harms nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from uuid import uuid4

from cluster.manifest import ManifestError, ManifestId, decode_document, encode_document, visible_chain
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

_KEY = re.compile(r"attempts/(\d{6,})\.json")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The record of an attempt.

    parent: the manifest that it starts from. damaged: manifests that restores found damaged and that retention
    therefore leaves for inspection. token: makes the record different from that of a rival for the same number.
    """

    number: int
    parent: ManifestId | None
    damaged: tuple[ManifestId, ...]
    token: str
    created: str

    @property
    def key(self) -> str:
        return f"attempts/{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class History:
    """What the store says about a run: the attempts on the newest one's chain by number, and all manifests."""

    attempts: dict[int, Attempt]
    manifests: list[ManifestId]

    @property
    def chain(self) -> list[ManifestId]:
        """The valid manifests, oldest first."""
        return visible_chain({n: attempt.parent for n, attempt in self.attempts.items()}, self.manifests)

    @property
    def damaged(self) -> tuple[ManifestId, ...]:
        return self.attempts[max(self.attempts)].damaged if self.attempts else ()


def attempt_numbers(store: Store) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    return sorted(int(match[1]) for key in store.list("attempts/") if (match := _KEY.fullmatch(key)))


def manifest_ids(store: Store) -> list[ManifestId]:
    """Return the ids of all manifests, whether valid or not, ascending."""
    return sorted(id for key in store.list("manifests/") if (id := ManifestId.from_key(key)))


def read_history(store: Store) -> History:
    """Read which checkpoints a run has. CheckpointError where the records of its attempts are damaged or missing."""
    # Manifests first: an attempt that begins between the two listings then has none of its own in them.
    manifests = manifest_ids(store)
    numbers = attempt_numbers(store)
    if manifests and (not numbers or manifests[-1].attempt > numbers[-1]):
        raise CheckpointError(
            f"{store.uri} has a manifest of attempt {manifests[-1].attempt} but no record of that attempt: the run was "
            "changed by hand; put attempts/ back, or start a new run under another URI"
        )
    attempts: dict[int, Attempt] = {}
    number = numbers[-1] if numbers else None
    while number is not None:
        attempts[number] = read_attempt(store, number)
        parent = attempts[number].parent
        number = parent.attempt if parent else None
    return History(attempts=attempts, manifests=manifests)


def read_attempt(store: Store, number: int) -> Attempt:
    """Return the record of an attempt. CheckpointError if it is damaged or missing."""
    key = f"attempts/{number:06d}.json"
    try:
        document = decode_document(store.get(key), f"{key} in {store.uri}")
        parent = document.pop("parent")
        damaged = tuple(ManifestId(*id) for id in document.pop("damaged"))
        attempt = Attempt(parent=ManifestId(*parent) if parent else None, damaged=damaged, **document)
        if attempt.number != number or (attempt.parent and attempt.parent.attempt >= number):
            raise ManifestError(f"{key} contradicts itself: number {attempt.number}, parent {attempt.parent}")
    except (ObjectMissingError, ManifestError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the record of attempt {number} cannot be used, and it decides which checkpoints are valid: {error}; put "
            f"{key} in {store.uri} back from a copy, or start a new run under another URI"
        ) from error
    return attempt


def begin_attempt(store: Store, parent: ManifestId | None, damaged: Sequence[ManifestId] = ()) -> Attempt:
    """Win a number for a new attempt that starts from `parent` and return its record.

    CheckpointError if the parent was deleted meanwhile, which only another attempt that still runs can do.
    """
    number = max(attempt_numbers(store), default=0)
    while True:
        number += 1
        created = datetime.now(UTC).isoformat(timespec="seconds")
        attempt = Attempt(number=number, parent=parent, damaged=tuple(damaged), token=uuid4().hex, created=created)
        if store.claim(attempt.key, encode_document(asdict(attempt))):
            break
    if parent and not store.exists(parent.key):
        raise CheckpointError(
            f"{parent.key} in {store.uri} was deleted while this attempt began: another process still writes "
            "to this run; stop one of the two and start again"
        )
    return attempt
