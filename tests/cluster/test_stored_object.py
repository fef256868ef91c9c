"""Objects with a checksum: read as a whole or in part, in ranges, and every difference found."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import stored_object
from cluster.store import Store
from cluster.stored_object import DamagedObjectError, StoredObject, read_into, read_object, write_object
from cluster.tensor_file import deserialize, serialize


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch):
    monkeypatch.setattr(stored_object, "RANGE_BYTES", 8)


@given(st.integers(0, 40), st.integers(0, 45), st.integers(0, 45))
def test_any_part_is_read_where_it_belongs_and_all_of_the_object_verified(size, start, length):
    start, length = min(start, size), min(length, size - min(start, size))
    store = Store(f"memory://{uuid.uuid4().hex}")
    data = np.random.default_rng(size).bytes(size)
    stored = write_object(store, "k", [data[: size // 3], data[size // 3 :]])
    memory = bytearray(b"?" * (length + 2))
    read_into(store, stored, memoryview(memory)[1:-1], start)
    assert memory == b"?" + data[start : start + length] + b"?"
    read_into(store, stored, None)
    assert read_object(store, stored) == data

    for at in range(size):
        store.put("k", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DamagedObjectError, match="differs from its checksum"):
            read_into(store, stored, memoryview(memory)[1:-1], start)
        assert (memory[0], memory[-1]) == (ord("?"), ord("?"))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 21])
def test_another_length_and_a_missing_object_are_named(size, tmp_path):
    store = Store(tmp_path)
    data = bytes(range(size))
    stored = write_object(store, "k", [data])
    for longer in (1, 8, 20):
        store.put("k", data + bytes(longer))
        with pytest.raises(DamagedObjectError, match=f"object k in .* has more than {size} bytes, expected {size}"):
            read_into(store, stored, None)
    for shorter in range(size):
        store.put("k", data[:shorter])
        with pytest.raises(DamagedObjectError, match=f"object k in .* has {shorter} bytes, expected {size}"):
            read_object(store, stored)
    store.delete("k")
    with pytest.raises(DamagedObjectError, match=r"object k in .* is missing"):
        read_into(store, stored, None)


def test_a_checksum_of_format_1_is_verified_too(tmp_path):
    store = Store(tmp_path)
    store.put("k", b"0123456789")
    digest = hashlib.sha256(b"0123456789").hexdigest()
    assert read_object(store, StoredObject(key="k", num_bytes=10, checksum=f"sha256:{digest}")) == b"0123456789"
    store.put("k", b"0123456780")
    with pytest.raises(DamagedObjectError):
        read_object(store, StoredObject(key="k", num_bytes=10, checksum=f"sha256:{digest}"))


class Together(Store):
    """A store that answers when two ask at once."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.meeting = threading.Barrier(2, timeout=30)

    def read_into(self, key, target, start, seen):
        self.meeting.wait()
        return super().read_into(key, target, start, seen)


def test_ranges_of_an_object_are_read_at_once_and_damage_in_any_of_them_is_found():
    store = Together(f"memory://{uuid.uuid4().hex}")
    data = np.random.default_rng(0).bytes(32)
    stored = write_object(store, "k", [data])
    assert read_object(store, stored, num_threads=2) == data
    for at in range(32):
        store.put("k", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DamagedObjectError, match="differs from its checksum"):
            read_object(store, stored, num_threads=2)
    for other in (data[:-1], data[:8], b"", data + b"x"):
        store.put("k", other)
        with pytest.raises(DamagedObjectError, match=f"has {len(other)} bytes, expected 32"):
            read_object(store, stored, num_threads=2)


def test_tensors_are_read_with_one_copy_in_memory(tmp_path):
    tensors = {name: torch.full((2**20,), float(number)) for number, name in enumerate("abcd")}
    stored_object.RANGE_BYTES = 2**20  # given back by the fixture
    store = Store(tmp_path)
    stored = write_object(store, "k", serialize(tensors))
    tracemalloc.start()
    try:
        found = deserialize(read_object(store, stored, num_threads=4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert stored.num_bytes <= peak < 1.1 * stored.num_bytes
    found["a"][0] = 7.0
    assert found["b"][0] == 1.0
