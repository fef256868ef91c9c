"""An object in a store together with its size and checksum: what is read is what was written, or an error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import xxhash

from cluster.rereading import read_again
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


def read_object(store: Store, expected: StoredObject, num_threads: int = 1) -> bytearray:
    """Return the object's bytes. DamagedObjectError if it is missing, shorter, longer or different.

    Its size is looked up before much memory is taken for it.
    """
    if expected.num_bytes > RANGE_BYTES:
        read_again(store, lambda: _require_size(store, expected), (DamagedObjectError,))
    data = bytearray(expected.num_bytes)
    read_into(store, expected, memoryview(data), num_threads=num_threads)
    return data


def read_into(
    store: Store, expected: StoredObject, target: memoryview | None, start: int = 0, *, num_threads: int = 1
) -> None:
    """Read an object in ranges of 16 MiB and verify it; its bytes from `start` on fill `target`, None: nothing.

    num_threads: how many ranges are read at once, where all of them have a place in `target`. What seems to be damaged
    is read again, as a whole. Errors as `read_object`. What is in `target` after an error is not what was written.
    """
    target = memoryview(bytearray()) if target is None else target

    def read() -> None:
        if num_threads > 1 and expected.num_bytes > RANGE_BYTES and start == 0 and len(target) >= expected.num_bytes:
            _read_at_once(store, expected, target[: expected.num_bytes], num_threads)
        else:
            _read_in_turn(store, expected, target, start)

    read_again(store, read, (DamagedObjectError,))


def _read_at_once(store: Store, expected: StoredObject, target: memoryview, num_threads: int) -> None:
    digest = _digest_of(expected)

    def fill(at: int) -> memoryview:
        place = target[at : at + RANGE_BYTES]
        size, has_more = _filled(store, expected, place, at, _ignore)
        is_last = at + len(place) == expected.num_bytes
        if size < len(place) or has_more is is_last:
            raise _wrong_size(store, expected, at + size, has_more)
        return place

    with ThreadPoolExecutor(num_threads, thread_name_prefix="ranges") as pool:
        places = [pool.submit(fill, at) for at in range(0, expected.num_bytes, RANGE_BYTES)]
        try:
            for place in places:
                digest.update(place.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _require_digest(store, expected, digest)


def _read_in_turn(store: Store, expected: StoredObject, target: memoryview, start: int) -> None:
    digest = _digest_of(expected)
    beside = memoryview(bytearray())
    done, has_more = 0, True
    for at in range(0, max(expected.num_bytes, 1), RANGE_BYTES):
        length = min(RANGE_BYTES, expected.num_bytes - at)
        is_whole = start <= at and at + length <= start + len(target)
        if not is_whole and not beside:
            beside = memoryview(bytearray(length))
        place = target[at - start :][:length] if is_whole else beside[:length]
        size, has_more = _filled(store, expected, place, at, digest.update)
        done = at + size
        if size < length:
            break
        low, high = max(at, start), min(done, start + len(target))
        if not is_whole and low < high:
            target[low - start : high - start] = place[low - at : high - at]
    if done < expected.num_bytes or has_more:
        raise _wrong_size(store, expected, done, has_more)
    _require_digest(store, expected, digest)


def has_digest(expected: StoredObject, data: Buffer | mmap) -> bool:
    """Whether bytes are those of an object, by their checksum."""
    digest = _digest_of(expected)
    digest.update(data)
    return digest.hexdigest() == expected.checksum.partition(":")[2]


def _ignore(seen: memoryview) -> None: ...


def _digest_of(expected: StoredObject) -> Any:
    return ALGORITHMS[expected.checksum.partition(":")[0]]()


def _filled(
    store: Store, expected: StoredObject, place: memoryview, at: int, seen: Callable[[memoryview], None]
) -> tuple[int, bool]:
    """`Store.read_into`, with what is missing as damage."""
    try:
        return store.read_into(expected.key, place, at, seen)
    except ObjectMissingError as error:
        raise DamagedObjectError(f"object {expected.key} in {store.uri} is missing") from error


def _require_size(store: Store, expected: StoredObject) -> None:
    try:
        size = store.size(expected.key)
    except ObjectMissingError as error:
        raise DamagedObjectError(f"object {expected.key} in {store.uri} is missing") from error
    if size != expected.num_bytes:
        raise _wrong_size(store, expected, size, False)


def _wrong_size(store: Store, expected: StoredObject, done: int, has_more: bool) -> DamagedObjectError:
    found = f"more than {expected.num_bytes}" if has_more and done >= expected.num_bytes else done
    return DamagedObjectError(f"object {expected.key} in {store.uri} has {found} bytes, expected {expected.num_bytes}")


def _require_digest(store: Store, expected: StoredObject, digest: Any) -> None:
    if digest.hexdigest() != expected.checksum.partition(":")[2]:
        raise DamagedObjectError(f"object {expected.key} in {store.uri} differs from its checksum")
