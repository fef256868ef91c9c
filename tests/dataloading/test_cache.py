"""The cache: one downloader per file, room by next use, and no failure of it is one of training."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataloading.cache import OVERDUE_S, Fetched, ShardCache, writing
from dataloading.cache_folder import MARK


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
    """Return the files below the cache's folder, but those that it keeps of itself."""
    found = (str(p.relative_to(cache.folder)) for p in cache.folder.rglob("*") if p.is_file() or p.is_symlink())
    return sorted(name for name in found if not name.startswith(MARK))


def parts(cache):
    return sorted(os.listdir(cache.folder / MARK / "parts"))


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
    assert parts(cache) == ["a%2F0.tar.part"]
    tight = ShardCache(tmp_path, limit_bytes=1000)
    assert fetch(tight, "b/1.tar") is Fetched.THERE  # which removes what the dead one left
    assert (files(cache), parts(cache)) == (["b/1.tar"], [])
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


FOREIGN = ("notes.txt", "work/thesis.tex", "work/movie.mkv.part", "a/000000.tar.part", "a/mine.tar", "made", ".room2")


def test_files_that_the_cache_did_not_make_are_never_removed_or_replaced(tmp_path, caplog):
    for name in (*FOREIGN, "a/000002.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 60_000)
        os.utime(tmp_path / name, (time.time() - 2 * OVERDUE_S,) * 2)
    (tmp_path / "link.tar").symlink_to(tmp_path / "notes.txt")
    cache = ShardCache(tmp_path, 120_000)
    for number in range(6):
        expected = Fetched.REFUSED if number == 2 else Fetched.THERE
        assert fetch(cache, f"a/{number:06d}.tar", 50_000, next_use=time.time() + 600 - number) is expected
    cache.remove("notes.txt")
    cache.remove("a/000002.tar")
    assert set(files(cache)) == {*FOREIGN, "link.tar", "a/000002.tar", "a/000004.tar", "a/000005.tar"}
    assert (tmp_path / "a/000002.tar").read_bytes() == b"x" * 60_000
    assert "a/000002.tar is not the cache's" in caplog.text


def test_what_an_earlier_version_kept_is_taken_over_by_its_names(tmp_path):
    theirs = (f"{'0f' * 16}/000000.tar", f"manifests/{'a1' * 16}.arrow", f"demo/train-{'b' * 16}")
    others = (f"{'0f' * 16}/notes.txt", "manifests/thesis.arrow", "work/000000.tar")
    for name in (*theirs, *others, ".room"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (time.time() - 2 * OVERDUE_S,) * 2)
    cache = ShardCache(tmp_path, 2500)
    fetch(cache, "a", 2000)
    assert files(cache) == sorted((*others, "a"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE, errno.EINTR])
def test_a_folder_without_locks_is_survived(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = ShardCache(tmp_path)
    assert fetch(cache, "a") is Fetched.REFUSED
    assert fetch(cache, "a") is Fetched.REFUSED
    assert caplog.text.count(os.strerror(number)) == 1


@pytest.mark.parametrize("place", ["loop", "loop/below", "x" * 300])
def test_a_folder_that_cannot_be_is_survived(tmp_path, caplog, place):
    (tmp_path / "loop").symlink_to("loop")
    cache = ShardCache(tmp_path / place)
    assert fetch(cache, "a") is Fetched.REFUSED
    assert cache.open("a") is None
    cache.touch("a", 0.0)
    cache.remove("a")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_reserve_room_does_without(tmp_path, monkeypatch, number):
    def refuses(descriptor, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert fetch(ShardCache(tmp_path), "a") is Fetched.THERE


@pytest.mark.parametrize("error", [OSError("no answer"), ConnectionResetError(errno.ECONNRESET, "reset")])
def test_a_storage_that_fails_in_a_download_is_no_failure_of_the_disk(tmp_path, error):
    def fail(descriptor):
        raise error

    cache = ShardCache(tmp_path)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        cache.fetch("a", 1000, fail, time.time())
    assert caught.value is error
    assert fetch(cache, "a") is Fetched.THERE


def test_bytes_are_on_the_disk_before_a_file_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename would else leave a file of the right size with lost bytes."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new))[1])
    fetch(ShardCache(tmp_path), "a")
    assert done == ["fsync", "rename"]


def test_filling_a_cache_looks_at_its_files_once_and_not_for_every_file(tmp_path, monkeypatch):
    """Looking at all files for each of them took minutes in a cache of some ten thousand."""
    looked, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda place=".": (looked.append(place), listdir(place))[1])
    cache = ShardCache(tmp_path, limit_bytes=60_000)
    for number in range(60):
        assert fetch(cache, f"a/{number}", next_use=time.time() + 60) is Fetched.THERE
    assert len(looked) == 2  # `made` and `parts`, at the first
    assert fetch(cache, "a/60", next_use=time.time() + 600) is Fetched.NO_ROOM
    assert len(looked) == 4
    fetch(cache, "b", next_use=time.time())  # makes room
    assert len(files(cache)) == 60


def test_room_that_a_killed_process_took_is_found_again(tmp_path):
    cache = ShardCache(tmp_path, limit_bytes=2000)
    fetch(cache, "a", next_use=time.time() + 60)
    (tmp_path / MARK / "room").write_text("99999999")
    assert fetch(cache, "b", next_use=time.time() + 60) is Fetched.THERE
    assert files(cache) == ["a", "b"]


def test_a_writer_that_was_given_up_writes_to_no_other_file(tmp_path):
    with open(tmp_path / "a", "wb") as file, writing(file.fileno()) as writer:
        writer.write(b"ours", 0)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)  # which has the number of the file before
    writer.write(b"late", 0)
    assert os.fstat(other).st_size == 0
    os.close(other)
    assert (tmp_path / "a").read_bytes() == b"ours"
