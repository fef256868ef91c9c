"""Attempts to run: each has a number that no other has, and a record of the checkpoint that it starts from.

The number is won by a conditional create, so that of two drivers that start at once one gets the lower number. Winning
it fences: whoever has a lower one commits nothing any more. Only then does the new attempt look for the checkpoint to
start from, so that none is lost that an older attempt committed, and records it. The newest attempt with such a record
decides which checkpoints are valid: an older one that still runs (a zombie) harms nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from cluster.document_kinds import ID_OR_NONE, IDS, TEXT, WHOLE, require_kinds
from cluster.manifest import (
    ManifestError,
    ManifestId,
    NewerFormatError,
    decode_document,
    encode_document,
    read_bytes,
    visible_chain,
)
from cluster.rereading import read_again
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError
from cluster.threads import in_threads

_NUM_THREADS = 16
_NUMBER = re.compile(r"attempts/(\d{6,})(?:\.start)?\.json")
"""Either record shows that a number was won: one that vanished must not be won again."""
_OF_RECORD = {"number": WHOLE, "parent": ID_OR_NONE, "damaged": IDS, "token": TEXT, "created": TEXT}
_START = re.compile(r"attempts/(\d{6,})\.start\.json")


class SupersededError(CheckpointError):
    """A newer attempt goes on with the run; nothing that this process saves would be valid."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The record of the start of an attempt.

    parent: the manifest that it starts from. damaged: manifests that restores found damaged and that retention
    therefore leaves for inspection. token: makes the record different from that of a rival for the same number.
    created: by the clock of the coordinator's machine. about: what the workers say of themselves, JSON (`starts`).
    """

    number: int
    parent: ManifestId | None
    damaged: tuple[ManifestId, ...]
    token: str
    created: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class History:
    """What the store says about a run: the attempts on the newest one's chain by number, as far back as there are
    manifests, and all manifests.

    newest: the highest number that was won, 0 if none was; that attempt may not have started yet.
    """

    attempts: dict[int, Attempt]
    manifests: list[ManifestId]
    newest: int

    @property
    def parents(self) -> dict[int, ManifestId | None]:
        return {number: attempt.parent for number, attempt in self.attempts.items()}

    @property
    def chain(self) -> list[ManifestId]:
        """The valid manifests, oldest first."""
        return visible_chain(self.parents, self.manifests)

    @property
    def candidates(self) -> list[ManifestId]:
        """What a new attempt may start from, oldest first: the valid manifests, and where nothing was saved since the
        newest attempt started, those that it could not read: they may be intact after all.
        """
        chain, parent = self.chain, self.parents[max(self.parents)] if self.parents else None
        if parent is None or chain[-1:] != [parent]:
            return chain
        return [*chain, *sorted(id for id in set(self.damaged) & set(self.manifests) if id > parent)]

    @property
    def damaged(self) -> tuple[ManifestId, ...]:
        return self.attempts[max(self.attempts)].damaged if self.attempts else ()


def attempt_numbers(store: Store) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    return sorted({int(match[1]) for key in store.list("attempts/") if (match := _NUMBER.fullmatch(key))})


def manifest_ids(store: Store) -> list[ManifestId]:
    """Return the ids of all manifests, whether valid or not, ascending."""
    return sorted(id for key in store.list("manifests/") if (id := ManifestId.from_key(key)))


def read_history(store: Store, known: Mapping[int, Attempt] | None = None) -> History:
    """Read which checkpoints a run has. CheckpointError where the records of its attempts are damaged or missing.

    known: records that were read already (`read_attempts`), and are not read again.
    """
    known = known or {}
    # Manifests first: an attempt that begins between the two listings then has none of its own in them.
    manifests = manifest_ids(store)
    keys = store.list("attempts/")
    numbers = sorted({int(match[1]) for key in keys if (match := _NUMBER.fullmatch(key))})
    started = {int(match[1]) for key in keys if (match := _START.fullmatch(key))}
    if manifests and (not numbers or manifests[-1].attempt > numbers[-1]):
        raise CheckpointError(
            f"{store.uri} has a manifest of attempt {manifests[-1].attempt} but no record of that attempt: the run was "
            "changed by hand; put attempts/ back, or start a new run under another URI"
        )
    number = _newest_started(store, numbers, started | set(known))
    if manifests and manifests[-1].attempt > (number or 0):
        raise CheckpointError(
            f"{store.uri} has a manifest of attempt {manifests[-1].attempt} but no record of that attempt's start: the "
            f"run was changed by hand; put {_start_key(manifests[-1].attempt)} back, or start a new run elsewhere"
        )
    attempts: dict[int, Attempt] = {}
    if number is not None:
        # Older attempts say nothing of the manifests that are there.
        oldest = manifests[0].attempt if manifests else number
        ahead = [other for other in numbers if oldest <= other <= number and other not in known and other in started]
        records = {**known, **dict(zip(ahead, in_threads(_reader(store), ahead, _NUM_THREADS), strict=True))}
        while number is not None and (number >= oldest or not attempts):
            record = records.get(number) or read_attempt(store, number)
            if isinstance(record, Exception):
                raise record
            attempts[number] = record
            number = record.parent.attempt if record.parent else None
    return History(attempts=attempts, manifests=manifests, newest=numbers[-1] if numbers else 0)


def _reader(store: Store) -> Callable[[int], Attempt | Exception]:
    """Return `read_attempt` that returns what is wrong with a record: it may be one that nobody needs."""

    def read(number: int) -> Attempt | Exception:
        try:
            return read_attempt(store, number)
        except (CheckpointError, NewerFormatError) as error:
            return error

    return read


def read_attempts(store: Store) -> dict[int, Attempt]:
    """Return the records of all attempts that have started, by number, be they on the chain or not; several are read
    at a time. Those that cannot be read are left out.
    """

    found = in_threads(_reader(store), attempt_numbers(store), _NUM_THREADS)
    return {attempt.number: attempt for attempt in found if isinstance(attempt, Attempt)}


def read_attempt(store: Store, number: int) -> Attempt:
    """Return the record of an attempt's start. CheckpointError if it is damaged or missing."""
    key = _start_key(number)
    try:
        try:
            document = _read(store, key)
        except ObjectMissingError:
            document = _peek(store, number)
            if "parent" not in document:
                # The record of the number is there, so this one may be, too.
                document = read_again(store, lambda: _read(store, key), (ObjectMissingError,))
            else:
                key = _number_key(number)  # format 1 had one record for both
        require_kinds(document, _OF_RECORD, key)
        parent = document.pop("parent")
        damaged = tuple(ManifestId(*id) for id in document.pop("damaged"))
        attempt = Attempt(parent=ManifestId(*parent) if parent else None, damaged=damaged, **document)
        if attempt.number != number or (attempt.parent and attempt.parent.attempt >= number):
            raise ManifestError(f"{key} contradicts itself: number {attempt.number}, parent {attempt.parent}")
    except (ObjectMissingError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, NewerFormatError):
            raise
        raise CheckpointError(
            f"the record of attempt {number} cannot be used, and it decides which checkpoints are valid: {error}; put "
            f"{key} in {store.uri} back from a copy, or start a new run under another URI"
        ) from error
    return attempt


def win_number(store: Store) -> int:
    """Win a number for a new attempt and return it. From here on no attempt with a lower one commits anything."""
    number = max(attempt_numbers(store), default=0)
    while True:
        number += 1
        record = {"number": number, "token": uuid4().hex, "created": _now()}
        if store.claim(_number_key(number), encode_document(record)):
            return number


def record_start(
    store: Store,
    number: int,
    parent: ManifestId | None,
    damaged: Sequence[ManifestId] = (),
    about: Mapping[str, Any] | None = None,
) -> Attempt:
    """Record what an attempt starts from: from here on it decides which checkpoints are valid. May be repeated.

    about: what the workers say of themselves, JSON.
    SupersededError if a newer attempt has won a number meanwhile, CheckpointError if the parent was deleted, which only
    another attempt that still runs can do.
    """
    require_newest(store, number)
    if parent and not store.exists(parent.key):
        raise CheckpointError(
            f"{parent.key} in {store.uri} was deleted while this attempt began: another process still writes "
            "to this run; stop one of the two and start again"
        )
    attempt = Attempt(
        number=number,
        parent=parent,
        damaged=tuple(damaged),
        token=uuid4().hex,
        created=_now(),
        about=dict(about or {}),
    )
    if not store.claim(_start_key(number), encode_document(asdict(attempt))):
        earlier = read_attempt(store, number)
        if (earlier.parent, earlier.damaged) != (attempt.parent, attempt.damaged):
            raise CheckpointError(
                f"{_start_key(number)} in {store.uri} names another checkpoint to start from ({earlier.parent}) than "
                f"{attempt.parent}; start again"
            )
        return earlier
    return attempt


def require_newest(store: Store, number: int) -> None:
    """Raise SupersededError if an attempt with a higher number was begun."""
    newest = max(attempt_numbers(store), default=0)
    if newest < number:
        raise CheckpointError(
            f"{store.uri} has no record of attempt {number}, which is running: it was deleted or moved "
            "or changed by hand; put attempts/ back, or start a new run under another URI"
        )
    if newest > number:
        raise SupersededError(
            f"attempt {number} was left behind by attempt {newest}, which goes on with {store.uri}: this process must "
            "end"
        )


def _newest_started(store: Store, numbers: Sequence[int], started: set[int]) -> int | None:
    for number in reversed(numbers):
        if number in started or "parent" in _peek(store, number):
            return number
    return None


def _peek(store: Store, number: int) -> dict[str, Any]:
    """Return what the record of a number says; one that cannot be read may decide which checkpoints are valid."""
    try:
        return read_again(store, lambda: _read(store, _number_key(number)), (ObjectMissingError,))
    except (ObjectMissingError, ManifestError) as error:
        raise CheckpointError(
            f"the record of attempt {number} cannot be used, and it decides which checkpoints are valid: {error}; put "
            f"{_number_key(number)} in {store.uri} back from a copy, or start a new run under another URI"
        ) from error


def _read(store: Store, key: str) -> dict[str, Any]:
    """Return a record; one that seems to be damaged is read again. ObjectMissingError if it is not there."""
    return read_again(store, lambda: decode_document(read_bytes(store, key), f"{key} in {store.uri}"), (ManifestError,))


def _number_key(number: int) -> str:
    return f"attempts/{number:06d}.json"


def _start_key(number: int) -> str:
    return f"attempts/{number:06d}.start.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
