"""Who trains a run: two processes never do at once, and none waits longer for a dead one than it has to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from checkpoint_content import assert_holds, save, start
from checkpoint_fakes import InlineCoordination, ThreadWorker

from cluster.checkpoint import Checkpointer, SupersededError, read_latest
from cluster.coordination import CoordinatorService
from cluster.coordinator import Coordinator
from cluster.lease import KEY, Holder, Lease, RunHeldError, read_heartbeat
from cluster.manifest import decode_document, encode_document
from cluster.store import Store

HERE = Path(__file__).parent
BEAT_S = 0.2


class Process:
    """A process that wants the lease of a folder."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        command = [sys.executable, "-W", "error", str(HERE / "hold_lease.py"), str(folder), str(lease_s), str(BEAT_S)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]
        )

    def hear(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def processes(folder: Path, *lease_s: float) -> Iterator[list[Process]]:
    """Processes that start at once; the second and later ones stand still before they take the lease."""
    started = [Process(folder, of_each) for of_each in lease_s]
    try:
        yield started
    finally:
        for process in started:
            process.end()


def other_machine(holder: Holder | None = None) -> Holder:
    return replace(holder or Holder.of_this_process(), token="ab" * 16, boot="another-boot", host="node7", pid=4711)


def put_heartbeat(store: Store, holder: Holder, beats: int = 3, released: bool = False, attempt: int = 0) -> None:
    document = {"holder": asdict(holder), "since": "2026-01-02T03:04:05+00:00", "beats": beats, "released": released}
    # Versions before did not say which attempt it is.
    document |= {"attempt": attempt} if attempt else {}
    store.put(KEY, encode_document({**document, "renewed": "2026-01-02T03:05:05+00:00"}))


def test_a_second_process_is_refused_and_told_who_trains_the_run_and_since_when(tmp_path):
    with processes(tmp_path, 30) as [first]:
        assert "started" in first.hear()
        assert first.hear() == {"taken": first.process.pid}
        with pytest.raises(RunHeldError) as caught:
            Lease(Store(tmp_path), Holder.of_this_process(), lease_s=30).take()
        text = str(caught.value)
        assert f"is trained by process {first.process.pid} on {socket.gethostname()} since " in text
        assert "Wait for its end or stop it" in text
        since = datetime.fromisoformat(text.partition(" since ")[2].split(": ")[0])
        assert timedelta(0) <= datetime.now(UTC) - since < timedelta(seconds=60)
        heartbeat = read_heartbeat(Store(tmp_path))
        assert heartbeat["holder"]["pid"] == first.process.pid, "the first one goes on"

        first.process.stdin.write("end\n")
        first.process.stdin.flush()
        assert first.hear() == {"released": first.process.pid}
        started_s = time.monotonic()
        Lease(Store(tmp_path), Holder.of_this_process(), lease_s=30).take()
        assert time.monotonic() - started_s < 1, "what was released is taken at once"


def test_of_two_processes_that_start_at_once_on_a_dead_run_at_most_one_goes_on(tmp_path):
    put_heartbeat(Store(tmp_path), other_machine())
    with processes(tmp_path, 2, 2) as both:
        said = [[process.hear()] for process in both]
        for process, words in zip(both, said, strict=True):
            words.append(process.hear())
            if "taken" in words[-1]:
                time.sleep(3 * BEAT_S)
        heartbeat = read_heartbeat(Store(tmp_path))
        still = [p for p, words in zip(both, said, strict=True) if "taken" in words[-1]]
        losers = [process for process in still if process.process.pid != heartbeat["holder"]["pid"]]
        assert len(still) - len(losers) == 1
        for process in losers:
            assert "lost" in process.hear()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path, is_reaped):
    with processes(tmp_path, 30) as [first]:
        first.hear()
        assert "taken" in first.hear()
        os.kill(first.process.pid, signal.SIGKILL)
        if is_reaped:
            first.process.wait()
        else:
            os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
        started_s = time.monotonic()
        Lease(Store(tmp_path), Holder.of_this_process(), lease_s=30).take()
        assert time.monotonic() - started_s < 1


def test_a_holder_that_stands_still_is_waited_for_and_replaced_and_ends_when_it_comes_back(tmp_path):
    with processes(tmp_path, 30) as [first]:
        first.hear()
        assert "taken" in first.hear()
        os.kill(first.process.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        Lease(Store(tmp_path), Holder.of_this_process(), lease_s=2).take()
        assert time.monotonic() - started_s >= 2
        os.kill(first.process.pid, signal.SIGCONT)
        assert first.hear() == {"lost": first.process.pid}
        assert read_heartbeat(Store(tmp_path))["holder"] == asdict(Holder.of_this_process()), "it wrote nothing"


class Clock:
    """A clock that goes on when somebody sleeps; `on_sleep` is what others do meanwhile."""

    def __init__(self, on_sleep=lambda: None) -> None:
        self.now_s, self.on_sleep = 1000.0, on_sleep

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()


def lease_of(store: Store, clock: Clock, holder: Holder | None = None) -> Lease:
    return Lease(store, holder or Holder.of_this_process(), lease_s=35, clock=clock, sleep=clock.sleep)


def test_a_holder_on_another_machine_is_waited_for_as_long_as_a_lease_lasts(uri):
    put_heartbeat(Store(uri), other_machine())
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert 35 <= clock.now_s - 1000 < 37
    assert read_heartbeat(Store(uri))["holder"]["token"] == Holder.of_this_process().token


def test_a_holder_of_this_pid_on_another_machine_is_not_taken_for_dead(uri):
    put_heartbeat(Store(uri), replace(other_machine(), pid=2**22 + 1))
    assert not other_machine().is_surely_dead()
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert clock.now_s - 1000 >= 35


def test_a_later_process_with_the_same_pid_does_not_pass_for_the_holder(uri):
    here = Holder.of_this_process()
    put_heartbeat(Store(uri), replace(here, token="cd" * 16, started="1"))
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert clock.now_s == 1000, "that process has ended"
    put_heartbeat(Store(uri), replace(here, token="cd" * 16))
    lease_of(Store(uri), clock).take()
    assert clock.now_s - 1000 >= 35, "this process lives"


@pytest.mark.parametrize("renewed_after_s", [1, 20, 34])
def test_one_renewal_during_the_wait_is_enough_to_be_refused(uri, renewed_after_s):
    store, clock = Store(uri), Clock()

    def renew() -> None:
        if clock.now_s - 1000 >= renewed_after_s:
            put_heartbeat(store, other_machine(), beats=4)

    put_heartbeat(store, other_machine())
    clock.on_sleep = renew
    with pytest.raises(RunHeldError, match="is trained by process 4711 on node7 since 2026-01-02T03:04:05"):
        lease_of(store, clock).take()
    assert clock.now_s - 1000 <= renewed_after_s + 1
    assert read_heartbeat(store)["holder"]["pid"] == 4711


def test_what_was_released_is_taken_at_once_from_any_machine(uri):
    put_heartbeat(Store(uri), other_machine(), released=True)
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert clock.now_s == 1000


@pytest.mark.parametrize("data", [b"", b"{", b'{"holder": 1}', encode_document({"holder": {"pid": 1}})])
def test_a_heartbeat_that_cannot_be_read_keeps_nobody_waiting(uri, data):
    Store(uri).put(KEY, data)
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert clock.now_s == 1000


def test_a_beat_renews_and_one_after_the_release_does_not_take_the_run_again(uri):
    lease = lease_of(Store(uri), Clock())
    assert lease.beat()
    assert read_heartbeat(Store(uri)) is None, "nothing was taken"
    lease.take()
    beats = []
    for _ in range(3):
        assert lease.beat()
        beats.append(read_heartbeat(Store(uri))["beats"])
    assert beats == [1, 2, 3]
    lease.release()
    assert lease.beat()
    assert read_heartbeat(Store(uri))["released"]


def test_a_coordinator_that_was_started_again_goes_on_renewing_and_in_the_end_releases(uri):
    lease_of(Store(uri), Clock()).take()
    before = read_heartbeat(Store(uri))
    restarted = lease_of(Store(uri), Clock())
    for number in (1, 2):
        assert restarted.beat()
        after = read_heartbeat(Store(uri))
        assert (after["beats"], after["since"], after["released"]) == (number, before["since"], False)
    again = lease_of(Store(uri), Clock())
    again.release()
    assert read_heartbeat(Store(uri))["released"]
    assert lease_of(Store(uri), Clock()).beat()
    assert read_heartbeat(Store(uri))["released"], "what was released stays so"


def test_a_coordinator_that_was_started_again_leaves_a_run_alone_that_another_took_meanwhile(uri):
    put_heartbeat(Store(uri), other_machine())
    restarted = lease_of(Store(uri), Clock())
    assert restarted.beat()
    restarted.release()
    assert read_heartbeat(Store(uri)) | {"renewed": ""} == {
        "holder": asdict(other_machine()), "attempt": 0, "since": "2026-01-02T03:04:05+00:00", "beats": 3,
        "released": False, "renewed": "",
    }  # fmt: skip


def service_of(store: Store, holder: Holder, clock: Clock) -> CoordinatorService:
    return CoordinatorService(
        store, Coordinator(store), Lease(store, holder, lease_s=35, clock=clock, sleep=clock.sleep)
    )


def test_an_old_driver_that_comes_back_after_it_was_replaced_is_superseded(uri, monkeypatch):
    monkeypatch.setattr("cluster.coordination.BEAT_S", 0.02)
    store = Store(uri)
    stalled = threading.Event()

    class Stalled(Store):
        """The network of a driver that is cut off for a while."""

        def get(self, key, start=None, stop=None):
            if key == KEY and stalled.is_set():
                raise OSError("no network")
            return super().get(key, start, stop)

    old_service = service_of(Stalled(uri), other_machine(), Clock())
    old, _ = start(store, coordinator=old_service)
    save(old, ThreadWorker(), 10)
    assert not old_service.call("wishes")["superseded"]
    stalled.set()
    time.sleep(0.1)
    new_service = service_of(store, Holder.of_this_process(), Clock())
    new, checkpoint = start(store, coordinator=new_service)
    assert_holds(checkpoint, 10)
    stalled.clear()
    deadline = time.monotonic() + 10
    while not old_service.call("wishes")["superseded"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(SupersededError, match="attempt 1 was left behind by attempt 2"):
        save(old, ThreadWorker(), 20)
    old_service.close()
    save(new, ThreadWorker(), 11)
    assert_holds(read_latest(store), 11)
    assert read_heartbeat(store)["holder"] == asdict(Holder.of_this_process())
    assert not read_heartbeat(store)["released"], "the old one did not release what it had lost"
    new_service.close()
    assert read_heartbeat(store)["released"]


def test_a_driver_that_is_refused_has_begun_no_attempt(uri):
    put_heartbeat(Store(uri), other_machine())
    clock = Clock(on_sleep=lambda: put_heartbeat(Store(uri), other_machine(), beats=9))
    service = service_of(Store(uri), Holder.of_this_process(), clock)
    checkpointer = Checkpointer(Store(uri), worker=ThreadWorker(), coordinator=service)
    with pytest.raises(RunHeldError, match="is trained by process 4711 on node7"):
        checkpointer.restore()
    assert Store(uri).list("attempts/") == []
    service.close()
    assert not read_heartbeat(Store(uri))["released"]
    start(Store(uri), coordinator=InlineCoordination(Store(uri)))


def test_a_process_of_another_user_of_which_nothing_can_be_seen_is_not_taken_for_dead(monkeypatch):
    """With /proc mounted with hidepid, as on some shared machines."""

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    holder = replace(Holder.of_this_process(), token="another", pid=1, started="12345")
    monkeypatch.setattr("cluster.lease._started", lambda pid: "")
    monkeypatch.setattr("os.kill", refuse)
    assert not holder.is_surely_dead()


def test_a_training_that_another_of_its_process_replaced_does_not_release_what_that_one_holds(uri):
    first, second = (lease_of(Store(uri), Clock(), Holder.of_this_process()) for _ in range(2))
    first.take()
    assert first.beat()
    time.sleep(1.1)  # seconds tell them apart
    second.take()
    first.release()
    assert not read_heartbeat(Store(uri))["released"]
    assert second.beat()
    second.release()
    assert read_heartbeat(Store(uri))["released"]


class Delayed(Store):
    """A store whose writes of heartbeats wait, once they are asked to, as behind a network that is cut off."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.is_open, self.is_waiting = threading.Event(), threading.Event()
        self.is_open.set()

    def put(self, key, *parts):
        if key == KEY and not self.is_open.is_set():
            self.is_waiting.set()
            assert self.is_open.wait(30)
        super().put(key, *parts)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_late_heartbeat_of_the_old_driver_does_not_end_the_rightful_one(uri, monkeypatch):
    monkeypatch.setattr("cluster.coordination.BEAT_S", 0.02)
    delayed = Delayed(uri)
    old = service_of(delayed, other_machine(), Clock())
    start(delayed, coordinator=old)
    delayed.is_open.clear()
    assert delayed.is_waiting.wait(20)
    new = service_of(Store(uri), Holder.of_this_process(), Clock())
    checkpointer, _ = start(Store(uri), coordinator=new)
    delayed.is_open.set()

    wait_until(lambda: old.call("wishes")["superseded"])
    wait_until(lambda: read_heartbeat(Store(uri))["holder"] == asdict(Holder.of_this_process()))
    time.sleep(0.2)
    assert not new.call("wishes")["superseded"], "the newer attempt goes on"
    save(checkpointer, ThreadWorker(), 1)
    old.close()
    found = read_heartbeat(Store(uri))
    assert (found["attempt"], found["released"]) == (2, False)
    new.close()
    assert read_heartbeat(Store(uri))["released"]


def test_a_late_release_by_the_old_driver_is_taken_back(uri):
    store = Store(uri)
    old, new = lease_of(store, Clock(), other_machine()), lease_of(store, Clock(), Holder.of_this_process())
    old.take()
    assert old.beat(1)
    new.take()
    assert new.beat(2)
    put_heartbeat(store, other_machine(), released=True, attempt=1)
    assert new.beat(2)
    found = read_heartbeat(store)
    assert (found["holder"], found["attempt"], found["released"]) == (asdict(Holder.of_this_process()), 2, False)
    assert not old.beat(1)


def test_a_coordinator_that_was_started_again_takes_its_run_back_from_a_late_heartbeat(uri):
    store = Store(uri)
    put_heartbeat(store, other_machine(), attempt=1)
    restarted = lease_of(store, Clock(), Holder.of_this_process())
    assert restarted.beat(2)
    assert read_heartbeat(store)["holder"] == asdict(Holder.of_this_process())
    zombie = lease_of(store, Clock(), other_machine())
    assert zombie.beat(1)
    assert read_heartbeat(store)["attempt"] == 2


def test_on_s3_a_late_heartbeat_is_refused_by_the_storage(s3_uri):
    store = Store(s3_uri)
    old, new = lease_of(store, Clock(), other_machine()), lease_of(store, Clock(), Holder.of_this_process())
    old.take()
    _, tag = store.get_tagged(KEY, 10_000)
    new.take()
    assert new.beat(2)
    assert not store.replace(KEY, b"late", tag)
    assert read_heartbeat(store)["attempt"] == 2
    _, tag = store.get_tagged(KEY, 10_000)
    assert store.replace(KEY, b"mine", tag)
    # The answer to a first try was lost.
    assert store.replace(KEY, b"mine", tag)


@pytest.mark.parametrize("answer", [False, None])
def test_a_storage_that_always_refuses_to_compare_is_written_to_without(s3_uri, monkeypatch, answer):
    """Ceph says that the ETag in quotes is another one, Swift that it does not know the condition."""
    store = Store(s3_uri)
    store.put(KEY, b"first")
    monkeypatch.setattr(type(store._backend()), "replace", lambda *_: answer)
    _, tag = store.get_tagged(KEY, 100)
    assert store.replace(KEY, b"second", tag)
    assert store.get(KEY) == b"second"


def test_a_newer_version_that_takes_the_run_over_ends_it_here_and_its_heartbeat_alone_does_not(uri, monkeypatch):
    monkeypatch.setattr("cluster.coordination.BEAT_S", 0.02)
    service = service_of(Store(uri), Holder.of_this_process(), Clock())
    start(Store(uri), coordinator=service)
    with monkeypatch.context() as patch:
        patch.setattr("cluster.manifest.FORMAT", 3)
        Store(uri).put(KEY, encode_document({"holder": "new", "beats": 1}))
    time.sleep(0.2)
    assert not service.call("wishes")["superseded"]
    Store(uri).put("attempts/000002.json", b"whatever it says")
    wait_until(lambda: service.call("wishes")["superseded"])
    service.close()


@pytest.mark.parametrize(
    "change",
    [{"holder": {"pid": "x"}}, {"holder": []}, {"beats": "x"}, {"released": 1}, {"since": []}, {"attempt": -1}],
)
def test_a_heartbeat_of_odd_kinds_counts_as_none(uri, change):
    put_heartbeat(Store(uri), other_machine())
    document = decode_document(Store(uri).get(KEY), KEY)
    if isinstance(change.get("holder"), dict):
        change = {"holder": {**document["holder"], **change["holder"]}}
    Store(uri).put(KEY, encode_document({**document, **change}))
    assert read_heartbeat(Store(uri)) is None
    clock = Clock()
    lease_of(Store(uri), clock).take()
    assert clock.now_s == 1000
