"""Events on their way to a store: files that never change, a store that hangs or refuses, an end that is waited for."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from test_tensorboard import scalars

from cluster.store import Store, StoreError
from instdisc.train import event_file, event_mirror
from instdisc.train.event_mirror import EventMirror, interval_s
from instdisc.train.tensorboard import EventWriter

TIMEOUT_S = 30.0


def place() -> str:
    return f"memory://{uuid.uuid4().hex}/tensorboard"


def files(uri: str) -> dict[str, bytes]:
    store = Store(uri)
    return {key: store.get(key) for key in store.list()}


def copied(uri: str, folder: Path) -> Path:
    """Copy the event files into a folder, for TensorBoard's reader."""
    folder.mkdir()
    for key, content in files(uri).items():
        (folder / key).write_bytes(content)
    return folder


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch):
    """Files end after a tenth of a second; intervals do not grow within a test."""
    monkeypatch.setattr(event_mirror, "SHORTEST_S", 0.1)
    monkeypatch.setattr(event_mirror, "LONGEST_S", 0.1)
    monkeypatch.setattr(event_mirror, "RETRY_S", 0.1)
    monkeypatch.setattr(event_mirror, "_TICK_S", 0.02)


class UnwillingStore(Store):
    """Writes wait while the gate is closed, and fail while there is a reason."""

    gate = threading.Event()
    reason: str | None = None
    tries = 0

    def put(self, key, *parts):
        cls = type(self)
        cls.tries += 1
        assert cls.gate.wait(TIMEOUT_S)
        if cls.reason is not None:
            raise StoreError(f"cannot write {key!r} in {self.uri}: {cls.reason}")
        super().put(key, *parts)


@pytest.fixture
def unwilling(monkeypatch):
    UnwillingStore.gate, UnwillingStore.reason, UnwillingStore.tries = threading.Event(), None, 0
    monkeypatch.setattr(event_file, "Store", UnwillingStore)
    yield UnwillingStore
    UnwillingStore.gate.set()


def test_events_get_there_while_more_are_written_in_files_that_never_change(quick, tmp_path):
    uri = place()
    writer, seen = EventWriter(uri, attempt=1, purge_step=1), {}
    for step in itertools.count(1):
        writer.scalars(step, {"train/loss": float(step)})
        for key, content in files(uri).items():
            assert seen.setdefault(key, content) == content, "an object was written again"
        if len(seen) >= 4:
            break
        time.sleep(0.01)
        assert step < 3000
    writer.close()
    assert list(seen) == sorted(files(uri))[: len(seen)], "files come in the order of their names"
    folder = copied(uri, tmp_path / "copy")
    assert scalars(folder, "train/loss") == [(s, float(s)) for s in range(1, step + 1)]
    # Each file is one of its own: the points of the first are there without the others.
    first = tmp_path / "first"
    first.mkdir()
    name = min(seen)
    (first / name).write_bytes(seen[name])
    alone = scalars(first, "train/loss")
    assert alone == [(s, float(s)) for s in range(1, len(alone) + 1)]
    assert 0 < len(alone) < step


def test_no_file_is_put_while_there_is_nothing_new(quick):
    uri = place()
    writer = EventWriter(uri, attempt=1, purge_step=1)
    writer.scalars(1, {"train/loss": 1.0})
    wait_until(lambda: len(files(uri)) == 1)
    time.sleep(0.5)
    writer.close()
    assert len(files(uri)) == 1


def test_files_grow_rarer_and_stay_few_over_days():
    num_files, now_s, counts = 0, 0.0, []
    for hours in (1, 24, 72):
        while now_s + interval_s(num_files) <= 3600 * hours:
            now_s += interval_s(num_files)
            num_files += 1
        counts.append(num_files)
    assert counts == [36, 216, 504]
    assert [interval_s(n) for n in (0, 8, 10**6)] == [30, 60, 600]


class Hours:
    """A mirror of an attempt whose time is set by hand."""

    def __init__(self, uri: str, attempt: int) -> None:
        self.now_s, self.attempt, self.store = 0.0, attempt, Store(uri)
        self.mirror = EventMirror(self.store, attempt, clock=lambda: self.now_s)
        self.mirror.start()

    def files_at(self, now_s: float, expected: int) -> int:
        """Return how many files the attempt has at a time, when there was time to put as many as expected."""
        self.now_s = now_s
        deadline = time.monotonic() + TIMEOUT_S
        while len(self._names()) < expected and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        return len(self._names())

    def _names(self) -> list[str]:
        return self.store.list(f"events.out.tfevents.{self.attempt:010d}")


def test_a_run_that_goes_on_counts_the_files_that_it_has_and_soon_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(event_mirror, "_TICK_S", 0.01)
    uri = place()
    for number in range(72):
        Store(uri).put(f"events.out.tfevents.{1:010d}.{number:06d}.there", b"")
    hours = Hours(uri, attempt=2)
    hours.mirror.add(Event(step=1))
    assert hours.files_at(29, 0) == 0
    assert hours.files_at(31, 1) == 1, "the first file of an attempt ends soon"
    hours.mirror.add(Event(step=2))
    assert 300 < interval_s(73) < 305
    assert hours.files_at(31 + 299, 1) == 1
    assert hours.files_at(31 + 305, 2) == 2
    hours.mirror.close()


def test_a_committed_checkpoint_brings_its_points_along_once_half_the_time_has_passed(monkeypatch):
    monkeypatch.setattr(event_mirror, "_TICK_S", 0.01)
    hours = Hours(place(), attempt=1)
    hours.mirror.add(Event(step=1))
    hours.mirror.flush()
    assert hours.files_at(14, 0) == 0
    assert hours.files_at(16, 1) == 1
    hours.mirror.close()


def test_a_store_that_hangs_holds_nobody_up_and_gets_everything_in_the_end(quick, unwilling, tmp_path):
    uri, told = place(), []
    writer = EventWriter(uri, attempt=1, purge_step=1, on_failure=told.append)
    writer.scalars(1, {"train/loss": 1.0})
    wait_until(lambda: unwilling.tries)
    longest_s = 0.0
    for step in range(2, 1000):
        before_s = time.monotonic()
        writer.scalars(step, {"train/loss": float(step)})
        longest_s = max(longest_s, time.monotonic() - before_s)
    assert longest_s < 1.0, "a step waited for the store"
    time.sleep(0.5)
    assert unwilling.tries == 1
    unwilling.gate.set()
    writer.close()
    assert told == []
    assert len(files(uri)) == 2, "what came meanwhile is one file"
    assert len(scalars(copied(uri, tmp_path / "copy"), "train/loss")) == 999


def test_a_store_that_refuses_is_told_once_and_gets_everything_later(quick, unwilling, tmp_path):
    unwilling.gate.set()
    unwilling.reason = "no permission"
    uri, told = place(), []
    writer = EventWriter(uri, attempt=1, purge_step=1, on_failure=told.append)
    step = 0
    while unwilling.tries < 4:
        step += 1
        writer.scalars(step, {"train/loss": float(step)})
        time.sleep(0.01)
        assert step < 3000
    assert len(told) == 1, told
    assert "do not reach" in told[0]
    assert "no permission" in told[0]
    assert files(uri) == {}
    unwilling.reason = None
    wait_until(lambda: files(uri))
    writer.close()
    assert len(told) == 1
    assert len(scalars(copied(uri, tmp_path / "copy"), "train/loss")) == step


def test_the_end_waits_for_the_store_for_a_limited_time_and_says_what_is_missing(quick, unwilling, monkeypatch):
    monkeypatch.setattr(event_mirror, "CLOSE_S", 0.3)
    uri, told = place(), []
    writer = EventWriter(uri, attempt=1, purge_step=1, on_failure=told.append)
    writer.scalars(1, {"train/loss": 1.0})
    before_s = time.monotonic()
    writer.close()
    assert time.monotonic() - before_s < 5
    (text,) = told
    assert "the last TensorBoard events did not reach memory://" in text
    assert "longer than 0 s" in text


def test_a_large_file_ends_at_once(monkeypatch, unwilling):
    monkeypatch.setattr(event_mirror, "MAX_BYTES", 20_000)
    monkeypatch.setattr(event_mirror, "_TICK_S", 0.02)
    uri = place()
    writer = EventWriter(uri, attempt=1, purge_step=1)
    for step in range(6):
        writer.text(step, "config", "x" * 9_000)
        time.sleep(0.1)
    unwilling.gate.set()
    writer.close()
    sizes = [len(content) for content in files(uri).values()]
    assert len(sizes) >= 3, "also while the store does not answer"
    assert max(sizes) < 40_000


def test_nothing_is_left_in_the_temporary_folder_even_of_a_process_that_is_killed(tmp_path):
    code = (
        "import sys, time; from instdisc.train.tensorboard import EventWriter;"
        "w = EventWriter('memory://killed/tensorboard', attempt=1, purge_step=1);"
        "[w.scalars(step, {'train/loss': 1.0}) for step in range(100)]; print('written', flush=True); time.sleep(60)"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert list(temporary.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert list(temporary.iterdir()) == []
