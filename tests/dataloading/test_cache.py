"""The cache: one downloader per file, room by next use, and no failure of it is one of training."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataloading.cache import OVERDUE_S, Fetched, ShardCache


def writer(data, calls=None, before=None):
    def download(descriptor):
        if calls is not None:
            calls.append(data)
        if before is not None:
            before()
        os.pwrite(descriptor, data, 0)

    return download


def fetch(cache, key, size=1000, next_use=None, **more):
    next_use = time.time() if next_use is None else next_use
    return cache.fetch(key, size, writer(key[:1].encode() * size, **more), next_use)


def files(cache):
    return sorted(
        str(p.relative_to(cache.folder)) for p in cache.folder.rglob("*") if p.is_file() and p.name != ".room"
    )


def test_a_file_is_downloaded_once_and_then_read(tmp_path):
    cache, calls = ShardCache(tmp_path), []
    assert cache.open("a/0.tar") is None
    assert fetch(cache, "a/0.tar", calls=calls) is Fetched.THERE
    assert fetch(cache, "a/0.tar", calls=calls) is Fetched.THERE
    descriptor = cache.open("a/0.tar")
    assert os.pread(descriptor, 2000, 0) == b"a" * 1000
    os.close(descriptor)
    assert len(calls) == 1
    assert files(cache) == ["a/0.tar"]


def test_of_many_that_want_a_file_one_downloads_it(tmp_path):
    calls, start = [], threading.Barrier(8)

    def want(_):
        cache = ShardCache(tmp_path)  # a process of its own would have its own, too
        start.wait()
        while (got := fetch(cache, "a/0.tar", calls=calls, before=lambda: time.sleep(0.2))) is Fetched.BUSY:
            time.sleep(0.01)
        return got

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))) == [Fetched.THERE] * 8
    assert len(calls) == 1


def test_room_is_made_by_the_file_that_is_needed_latest(tmp_path):
    cache, now = ShardCache(tmp_path, limit_bytes=3500), time.time()
    for name, seconds in (("a", 100), ("b", 400), ("c", 50)):
        assert fetch(cache, name, next_use=now + seconds) is Fetched.THERE
    assert fetch(cache, "d", next_use=now + 200) is Fetched.THERE
    assert files(cache) == ["a", "c", "d"]
    # Everything there is needed sooner than this one.
    assert fetch(cache, "e", next_use=now + 1000) is Fetched.NO_ROOM
    assert files(cache) == ["a", "c", "d"]
    cache.touch("a", now + 5000)  # another job still needs it sooner
    assert fetch(cache, "f", next_use=now + 10) is Fetched.THERE
    assert files(cache) == ["a", "c", "f"]


def test_what_a_job_that_is_gone_left_goes_first(tmp_path):
    cache, now = ShardCache(tmp_path, limit_bytes=2500), time.time()
    fetch(cache, "old", next_use=now - OVERDUE_S - 60)
    fetch(cache, "new", next_use=now + 60)
    assert fetch(cache, "x", next_use=now + 600) is Fetched.THERE
    assert files(cache) == ["new", "x"]


def test_a_file_larger_than_the_cache_is_not_taken_and_nothing_goes_for_it(tmp_path):
    cache = ShardCache(tmp_path, limit_bytes=2000)
    fetch(cache, "a", next_use=time.time() + 600)
    assert fetch(cache, "b", size=3000, next_use=time.time()) is Fetched.NO_ROOM
    assert files(cache) == ["a"]


def test_a_reader_keeps_a_file_that_is_removed_meanwhile(tmp_path):
    cache = ShardCache(tmp_path, limit_bytes=1500)
    fetch(cache, "a", next_use=time.time() + 600)
    descriptor = cache.open("a")
    fetch(cache, "b", next_use=time.time())
    assert files(cache) == ["b"]
    assert os.pread(descriptor, 1000, 0) == b"a" * 1000
    os.close(descriptor)


def test_a_download_that_fails_leaves_nothing(tmp_path):
    def fail(descriptor):
        os.pwrite(descriptor, b"half", 0)
        raise OSError("the storage does not answer")

    cache = ShardCache(tmp_path)
    with pytest.raises(OSError, match="does not answer"):
        cache.fetch("a", 1000, fail, time.time())
    assert files(cache) == []
    assert fetch(cache, "a") is Fetched.THERE


_DOWNLOADER = """
import os, sys, time
from dataloading.cache import ShardCache
def slow(descriptor):
    os.pwrite(descriptor, b"x" * 500, 0)
    print("half", flush=True)
    time.sleep(60)
ShardCache(sys.argv[1]).fetch("a/0.tar", 1000, slow, time.time())
"""


def test_a_downloader_that_is_killed_is_followed_by_another(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _DOWNLOADER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    cache = ShardCache(tmp_path)
    assert fetch(cache, "a/0.tar") is Fetched.BUSY
    assert cache.open("a/0.tar") is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files(cache) == ["a/0.tar.part"]
    assert fetch(cache, "b/1.tar") is Fetched.THERE  # which removes what the dead one left
    assert files(cache) == ["b/1.tar"]
    assert fetch(cache, "a/0.tar") is Fetched.THERE


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_once_and_nothing_breaks(small_disk, caplog):
    cache = ShardCache(small_disk / "cache", limit_bytes=1 << 30)
    assert fetch(cache, "a", size=1 << 20, next_use=time.time() + 5) is Fetched.THERE
    (small_disk / "ours").write_bytes(b"x" * (2 << 20))  # somebody else's
    assert fetch(cache, "b", size=3 << 20) in (Fetched.NO_ROOM, Fetched.REFUSED)
    assert fetch(cache, "b", size=3 << 20) in (Fetched.NO_ROOM, Fetched.REFUSED)
    assert files(cache) == ["a"]
    assert len(caplog.records) <= 1


def test_a_disk_that_fills_during_the_download_is_survived(small_disk, caplog):
    cache = ShardCache(small_disk / "cache")

    def grow(descriptor):
        os.ftruncate(descriptor, 0)
        (small_disk / "ours").write_bytes(b"x" * (3 << 20))
        os.pwrite(descriptor, b"y" * (2 << 20), 0)
        os.pwrite(descriptor, b"y" * (2 << 20), 2 << 20)  # a write of which a part only finds room is an error next

    assert cache.fetch("a", 2 << 20, grow, time.time()) is Fetched.REFUSED
    assert files(cache) == []
    assert "No space left" in caplog.text


def test_a_read_only_disk_is_survived(small_disk, caplog):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    cache = ShardCache(small_disk / "cache")
    assert fetch(cache, "a") is Fetched.REFUSED
    assert fetch(cache, "a") is Fetched.REFUSED
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "Read-only" in caplog.text


def test_a_file_where_the_folder_should_be_is_survived(tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder")
    assert fetch(ShardCache(tmp_path / "cache"), "a") is Fetched.REFUSED
    assert str(Path(tmp_path / "cache")) in caplog.text


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 0"):
        ShardCache(tmp_path, -1)


@pytest.mark.parametrize("key", ["/etc/passwd", "../outside", "a/../../outside"])
def test_a_key_that_would_leave_the_cache_is_refused(tmp_path, key):
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a relative path below it"):
        cache.fetch(key, 4, lambda descriptor: os.write(descriptor, b"evil"), 0.0)
    assert not (tmp_path / "outside").exists()
