"""A store's promises: whole objects or none, one winner of a create, clear errors."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from cluster.store import ObjectMissingError, Store, StoreError


@pytest.fixture(params=["file", "memory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_uri"))
    return Store(f"file://{tmp_path}/run" if request.param == "file" else f"memory://{uuid.uuid4().hex}/run")


def files_below(folder) -> list[str]:
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


def test_an_object_reads_back_whole_and_in_ranges(store):
    store.put("a/b.bin", b"0123", bytearray(b"45"), memoryview(b"6789"), b"")

    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", 3, 7) == b"3456"
    assert store.get("a/b.bin", 8) == b"89"
    assert store.get("a/b.bin", 8, 100) == b"89"
    assert store.size("a/b.bin") == 10
    assert store.exists("a/b.bin")
    assert not store.exists("a")


def test_a_range_may_be_empty_or_begin_behind_the_end(store):
    store.put("k", b"0123")
    assert (store.get("k", 2, 2), store.get("k", 4), store.get("k", 9, 12), store.get("k", 0, 9)) == (
        *(b"", b"", b"", b"0123"),
    )
    with pytest.raises(ObjectMissingError):
        store.get("missing", 2, 4)


@pytest.mark.parametrize("size", [0, 10, 700_000])
def test_an_object_is_read_into_memory_and_what_follows_is_told(store, size):
    data = np.random.default_rng(size).bytes(size)
    store.put("k", data)
    edges = sorted({0, min(3, size), size // 2, size, size + 4})
    for start, stop in [(start, stop) for start in edges for stop in edges if start <= stop]:
        memory, seen = bytearray(b"?" * (stop - start + 2)), bytearray()
        target = memoryview(memory)[1:-1]
        expected = data[start:stop]
        assert store.read_into("k", target, start, seen.extend) == (len(expected), size > start + len(expected))
        assert seen == target[: len(expected)] == expected
        assert memory[0] == memory[-1] == ord("?")
    with pytest.raises(ObjectMissingError):
        store.read_into("missing", memoryview(bytearray(3)), 2, seen.extend)


def test_put_replaces_and_delete_may_be_repeated(store):
    store.put("a", b"old")
    store.put("a", b"new, and longer")
    assert store.get("a") == b"new, and longer"

    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_an_empty_object_is_an_object(store):
    store.put("empty", memoryview(b""))
    assert store.get("empty") == b""
    assert store.list() == ["empty"]


def test_create_never_overwrites(store):
    assert store.create("k", b"first")
    assert not store.create("k", b"second")
    assert store.get("k") == b"first"


def test_a_claim_holds_when_the_same_bytes_are_there_already(store):
    assert store.claim("k", b"mine")
    assert store.claim("k", b"mine")
    assert not store.claim("k", b"theirs")


def test_of_racing_creators_exactly_one_wins_and_its_bytes_stay(store):
    # SeaweedFS takes seconds for a key that many want at once.
    num_writers, num_keys = (4, 2) if store.protocol == "s3" else (8, 20)
    for number in range(num_keys):
        start = threading.Barrier(num_writers)

        def write(writer: int, number: int = number, start: threading.Barrier = start) -> bool:
            start.wait(30)
            return store.create(f"keys/{number}", b"%d" % writer)

        with ThreadPoolExecutor(num_writers) as pool:
            won = list(pool.map(write, range(num_writers)))
        assert won.count(True) == 1
        assert store.get(f"keys/{number}") == b"%d" % won.index(True)


def test_a_reader_sees_the_old_or_the_new_object_and_never_a_mixture(store):
    size = 1 << 18
    store.put("k", b"a" * size)
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            store.put("k", (b"b" if number % 2 else b"a") * size)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(store.get("k"))
    writer.join(10)
    assert seen <= {b"a" * size, b"b" * size}


def test_list_gives_the_keys_that_begin_with_the_prefix_sorted(store):
    for key in ("b/2", "b/10", "b/x/1", "bb/1", "a"):
        store.put(key, b"")

    assert store.list() == ["a", "b/10", "b/2", "b/x/1", "bb/1"]
    assert store.list("b/") == ["b/10", "b/2", "b/x/1"]
    assert store.list("b") == ["b/10", "b/2", "b/x/1", "bb/1"]
    assert store.list("b/1") == ["b/10"]
    assert store.list("nothing/") == []


def test_a_long_list_is_complete(store):
    keys = [f"many/{number:04d} ä+&?.jpg" for number in range(1_050)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), keys))
    assert store.list_sizes("many/") == [(key, len(key.encode())) for key in keys]
    assert store.get(keys[-1]) == keys[-1].encode()


def test_a_store_that_keeps_its_promise_of_one_winner_is_taken_and_nothing_is_left_in_it(store):
    store.put("k", b"")
    store.require_exclusive_create()
    assert store.list() == ["k"]


def test_a_missing_object_is_named(store):
    with pytest.raises(ObjectMissingError, match=r"'no/where'.*run: it is not there"):
        store.get("no/where")


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/.tmp-x", "a\\b", "a\nb"])
def test_keys_that_are_not_plain_relative_paths_are_refused(store, key):
    with pytest.raises(ValueError, match="expected a relative path"):
        store.put(key, b"")


@pytest.mark.parametrize("key", ["a\tb\nc", "9.41\u202fAM", "a\u00a0b", "a\\b", "\x1b[31m", "\udcff", "x/.tmp-y"])
def test_objects_that_others_gave_odd_names_are_read(tmp_path, key):
    path = tmp_path / key
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"0123")
    memory = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(f"{memory}/{key}", b"0123")
    for store in (Store(tmp_path), Store(memory)):
        assert (store.get(key), store.get(key, 1, 3), store.size(key)) == (b"0123", b"12", 4)
        with pytest.raises(ValueError, match="expected a relative path"):
            store.put(key, b"")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/..", "."])
def test_nothing_outside_of_the_store_is_read(tmp_path, key):
    store = Store(tmp_path / "run")
    store.put("a", b"")
    (tmp_path / "x").write_bytes(b"secret")
    for read in (store.get, store.size):
        with pytest.raises(ValueError, match="expected a relative path"):
            read(key)


def test_a_store_means_the_same_place_in_every_process(store, tmp_path, monkeypatch):
    store.put("k", b"v")
    monkeypatch.chdir(tmp_path)
    relative = Store("run2")
    copies = pickle.loads(pickle.dumps((store, relative)))
    monkeypatch.chdir("/")

    assert copies[0].get("k") == b"v"
    assert copies[1].uri == str(tmp_path / "run2")


@pytest.mark.parametrize("uri", ["nowhere://bucket/run", "s3://", "memory://", "", "file://"])
def test_a_uri_that_names_no_place_is_refused(uri):
    with pytest.raises(ValueError, match="found"):
        Store(uri)


@pytest.mark.parametrize("uri", ["http://example.org/photos", "https://example.org/photos"])
def test_a_web_server_is_no_store_and_what_is_one_is_told(uri):
    with pytest.raises(ValueError, match=r"web server.*expected a folder, file://, s3://"):
        Store(uri)


def test_writers_that_were_killed_leave_nothing_that_is_listed(tmp_path):
    store = Store(tmp_path)
    store.put("dead/part/a", b"")
    store.delete("dead/part/a")
    (tmp_path / "dead/part/.tmp-123").write_bytes(b"half")
    store.put("dead/whole", b"")
    assert store.list() == ["dead/whole"]

    store.remove_leftovers("dead")
    assert [str(tmp_path / "dead/whole")] == files_below(tmp_path)
    assert not (tmp_path / "dead/part").exists()


def test_a_file_and_its_name_are_synced_before_put_and_create_return(tmp_path, monkeypatch):
    events: list[str] = []

    def record(name, path_of):
        original = getattr(os, name)

        def wrapper(*args):
            events.append(f"{name} {path_of(*args)}")
            return original(*args)

        monkeypatch.setattr(os, name, wrapper)

    def kind(descriptor):
        return "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"

    store = Store(tmp_path)
    record("fsync", kind)
    record("replace", lambda _, target: os.path.basename(target))
    record("link", lambda _, target: os.path.basename(target))
    store.put("k", b"v")
    store.create("c", b"v")
    store.put("new/k", b"v")

    write = ["fsync file", "replace k", "fsync folder"]
    assert events == [*write, "fsync file", "link c", "fsync folder", "fsync folder", *write]


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put("k", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write 'k' in .*: the disk is full; free space") as caught:
        store.put("k", b"new")
    monkeypatch.undo()

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert files_below(tmp_path) == [str(tmp_path / "k")]
    assert store.get("k") == b"old"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    for action in (lambda: store.put("a", b""), lambda: store.create("a", b""), lambda: store.list("a/")):
        with pytest.raises(StoreError, match="a part of this path is a file, not a folder"):
            action()


def test_a_place_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    store = Store(tmp_path / "run")
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="no permission; check the owner"):
            store.put("k", b"")
    finally:
        if as_root:
            os.seteuid(0)


def test_many_objects_are_removed_at_once_and_those_that_are_gone_do_not_matter(store):
    keys = [f"many/{number:04d} ä+&?.bin" for number in range(1_050)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), [*keys, "other"]))
    store.delete(keys[7])
    store.delete_many(keys)
    store.delete_many(keys[:2])
    store.delete_many([])
    assert store.list() == ["other"]


def test_an_object_that_cannot_be_removed_is_named_and_the_others_are_gone(tmp_path):
    store = Store(tmp_path)
    for key in ("a", "b/c", "d", "e/f"):
        store.put(key, b"")
    with pytest.raises(StoreError, match=r"cannot delete 'b' in .*, among others"):
        store.delete_many(["a", "b", "d", "e"])
    assert store.list() == ["b/c", "e/f"]


class LooksThenWrites(Store):
    """A store whose create looks whether there is an object, and writes a moment later."""

    def create(self, key, data):
        if self.exists(key):
            return False
        time.sleep(0.002)
        self.put(key, data)
        return True


def test_a_store_whose_create_looks_and_then_writes_is_refused(tmp_path):
    store = LooksThenWrites(tmp_path)
    with pytest.raises(StoreError, match=r"found that \d of 2 that wrote .* at the same time won"):
        store.require_exclusive_create()
    assert store.list() == []
