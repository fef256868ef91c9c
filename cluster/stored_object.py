"""An object in a store together with its size and checksum: what is read is what was written, or an error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from cluster.store import Buffer, ObjectMissingError, Store

ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3": xxhash.xxh3_128, "sha256": hashlib.sha256}
RANGE_BYTES = 16 * 2**20


class CheckpointError(OSError):
    """A checkpoint cannot be written or read: the text says which, why and what to do.

    is_permanent: whether the cause is one that does not pass by itself (a full disk, no permission).
    """

    is_permanent = True


class SaveFailedError(CheckpointError):
    """A save failed on some rank; the checkpoint before stays the newest."""


class DamagedObjectError(CheckpointError):
    """An object is missing or differs from what was written."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """A key, the number of bytes under it and their checksum: the name of its algorithm, a colon, hex digits.

    "xxh3" is XXH3 with 128 bits: it tells accidents, at the speed of memory. "sha256" stands in format 1.
    """

    key: str
    num_bytes: int
    checksum: str


def write_object(store: Store, key: str, parts: Sequence[Buffer]) -> StoredObject:
    """Write the concatenation of `parts` and return what it takes to verify it. Copies nothing."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    for part in parts:
        digest.update(part)
        num_bytes += len(part)
    store.put(key, *parts)
    return StoredObject(key=key, num_bytes=num_bytes, checksum=f"xxh3:{digest.hexdigest()}")


def read_object(store: Store, expected: StoredObject) -> bytearray:
    """Return the object's bytes. DamagedObjectError if it is missing, shorter, longer or different."""
    data = bytearray(expected.num_bytes)
    read_into(store, expected, memoryview(data))
    return data


def read_into(store: Store, expected: StoredObject, target: memoryview | None, start: int = 0) -> None:
    """Read an object in ranges of 16 MiB and verify it; its bytes from `start` on fill `target`, None: nothing.

    Errors as `read_object`. What is in `target` after an error is not what was written.
    """
    algorithm, _, expected_digest = expected.checksum.partition(":")
    digest = ALGORITHMS[algorithm]()
    target = memoryview(bytearray()) if target is None else target
    beside = memoryview(bytearray())
    done, has_more = 0, True
    for at in range(0, max(expected.num_bytes, 1), RANGE_BYTES):
        length = min(RANGE_BYTES, expected.num_bytes - at)
        is_whole = start <= at and at + length <= start + len(target)
        if not is_whole and not beside:
            beside = memoryview(bytearray(length))
        place = target[at - start :][:length] if is_whole else beside[:length]
        try:
            size, has_more = store.read_into(expected.key, place, at, digest.update)
        except ObjectMissingError as error:
            raise DamagedObjectError(f"object {expected.key} in {store.uri} is missing") from error
        done = at + size
        if size < length:
            break
        low, high = max(at, start), min(done, start + len(target))
        if not is_whole and low < high:
            target[low - start : high - start] = place[low - at : high - at]
    if done < expected.num_bytes or has_more:
        found = f"more than {expected.num_bytes}" if done == expected.num_bytes else done
        raise DamagedObjectError(
            f"object {expected.key} in {store.uri} has {found} bytes, expected {expected.num_bytes}"
        )
    if digest.hexdigest() != expected_digest:
        raise DamagedObjectError(f"object {expected.key} in {store.uri} differs from its checksum")
