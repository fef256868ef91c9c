"""A coordinator in a process of its own: killed in the middle of saves and started again, it loses none of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Client

import pytest
from checkpoint_content import assert_holds, save, start
from checkpoint_fakes import ThreadWorker, run_group

from cluster.checkpoint import CoordinatorGoneError, Retention, RunHeldError, SupersededError, read_latest
from cluster.coordination import CoordinatorSpec, answered
from cluster.coordinator import Coordinator
from cluster.lease import KEY, Holder, read_heartbeat
from cluster.local_coordinator import (
    LocalCoordination,
    LocalCoordinator,
    close_coordinator,
    listen,
    serve,
    socket_of,
)
from cluster.manifest import encode_document
from cluster.store import ObjectMissingError, Store
from cluster.worker import run_local

TIMEOUT_S = 60


class Service:
    """The process of a coordinator, and the folder of its socket."""

    def __init__(self, uri: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="npid-")
        self.spec = CoordinatorSpec(uri=uri, retention=Retention(last=2))
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "cluster.local_coordinator"])
        arguments = (self.spec.to_json(), self.folder, dict(os.environ))
        self.process = context.Process(target=serve, args=arguments, name="coordinator")
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == -signal.SIGKILL

    def close(self) -> int | None:
        close_coordinator(self.folder)
        self.process.join(TIMEOUT_S)
        return self.process.exitcode


@pytest.fixture
def service(tmp_path) -> Iterator[Service]:
    service = Service(str(tmp_path / "run"))
    yield service
    if service.process.is_alive():
        service.kill()
    service.process.close()
    shutil.rmtree(service.folder)


def test_workers_save_through_a_coordinator_that_is_killed_again_and_again(service):
    uri, num_kills, world_size = service.spec.uri, 4, 2
    stop = threading.Event()
    saves_at_kill: list[int] = []
    steps: list[int] = []

    def kill_again_and_again() -> None:
        for _ in range(num_kills):
            seen = len(steps)
            deadline = time.monotonic() + TIMEOUT_S
            while len(steps) < seen + 2 and time.monotonic() < deadline:
                time.sleep(0.003)
            time.sleep(0.007 * len(saves_at_kill))  # at other moments of a save
            service.kill()
            saves_at_kill.append(len(steps))
            time.sleep(0.1)
            service.start()
        stop.set()

    def work(worker: ThreadWorker) -> list[int]:
        checkpointer, _ = start(Store(uri), worker, coordinator=LocalCoordination(service.folder))
        step = 0
        reports = []
        while not worker.all_gather_object(stop.is_set())[0] or step < 5:
            step += 1
            reports.append(save(checkpointer, worker, step))
            if worker.rank == 0:
                steps.append(step)
        assert checkpointer.warnings == []
        return [report.step for report in reports]

    killer = threading.Thread(target=kill_again_and_again)
    killer.start()
    outcomes = run_group(world_size, work)
    killer.join(TIMEOUT_S)
    assert outcomes == [steps, steps], "every save was committed, and both ranks were told so"
    assert len(set(saves_at_kill)) == num_kills
    assert_holds(read_latest(Store(uri)), steps[-1])
    assert read_latest(Store(uri)).attempt == 1, "no restart of the workers"
    assert read_heartbeat(Store(uri))["holder"] == asdict(service.spec.holder)

    assert service.close() == 0
    assert read_heartbeat(Store(uri))["released"], "although this process never took it"
    assert len(Store(uri).list("manifests/")) == 2


def test_errors_come_through_the_socket_as_what_they_are(service):
    store = Store(service.spec.uri)
    checkpointer, _ = start(store, coordinator=LocalCoordination(service.folder))
    save(checkpointer, ThreadWorker(), 1)
    Coordinator(store).begin_attempt()
    with pytest.raises(SupersededError, match="attempt 1 was left behind by attempt 2"):
        save(checkpointer, ThreadWorker(), 2)
    assert service.close() == 0


def test_a_run_that_another_machine_trains_is_refused_through_the_socket(service):
    store = Store(service.spec.uri)
    holder = replace(Holder.of_this_process(), token="ab", boot="another", host="node7")
    renewing = threading.Event()

    def renew() -> None:
        for beats in range(1000):
            document = {"holder": asdict(holder), "since": "then", "beats": beats, "released": False, "renewed": "now"}
            store.put(KEY, encode_document(document))
            if renewing.wait(0.2):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunHeldError, match=r"is trained by process .* on node7 since then"):
            start(store, coordinator=LocalCoordination(service.folder))
    finally:
        renewing.set()
        thread.join()
    assert service.close() == 0
    assert read_heartbeat(store)["holder"]["host"] == "node7"


@pytest.mark.parametrize("request_bytes", [b"", b"{", b"\xff\xfe", b"17", b'{"method": "__class__", "arguments": {}}'])
def test_what_is_no_request_is_answered_or_dropped_and_harms_nobody(service, request_bytes):
    other = LocalCoordination(service.folder)
    assert other.call("wishes")["saves"] == 0
    with Client(socket_of(service.folder), family="AF_UNIX") as connection:
        connection.send_bytes(request_bytes)
        with contextlib.suppress(EOFError):
            assert b'"error"' in connection.recv_bytes()
    number = other.call("want_save")
    assert other.call("wishes")["saves"] == number > 0
    with pytest.raises(OSError, match="the coordinator failed: KeyError"):
        other.call("__class__")


def test_many_threads_share_one_way_to_the_coordinator(service):
    coordination = LocalCoordination(service.folder)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.extend(coordination.call("want_save") for _ in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert coordination.call("wishes")["saves"] == max(answers)
    assert len(set(answers)) == 160


def test_a_coordinator_that_is_gone_for_good_is_given_up_and_named(service, monkeypatch):
    coordination = LocalCoordination(service.folder)
    assert coordination.call("wishes")["saves"] == 0
    monkeypatch.setattr("cluster.local_coordinator.GONE_TIMEOUT_S", 0.3)
    service.kill()
    started_s = time.monotonic()
    with pytest.raises(CoordinatorGoneError, match=f"the coordinator at {service.folder}/coordinator does not answer"):
        coordination.call("wishes")
    assert 0.3 <= time.monotonic() - started_s < 5


def run_a_driver(uri: str, folder: str, ready) -> None:
    """A driver that starts a coordinator and stays."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=serve, args=(CoordinatorSpec(uri=uri).to_json(), folder, dict(os.environ)))
    process.start()
    LocalCoordination(folder).call("wishes")
    ready.send(process.pid)
    time.sleep(TIMEOUT_S)


def test_a_coordinator_ends_with_its_driver(tmp_path, service):
    context = multiprocessing.get_context("forkserver")
    folder = tempfile.mkdtemp(prefix="npid-")
    ours, theirs = context.Pipe()
    driver = context.Process(target=run_a_driver, args=(str(tmp_path / "other"), folder, theirs))
    driver.start()
    assert ours.poll(TIMEOUT_S)
    coordinator_pid = ours.recv()
    driver.kill()
    driver.join(TIMEOUT_S)
    deadline = time.monotonic() + 10
    while is_alive(coordinator_pid):
        assert time.monotonic() < deadline, "it stays although its driver is gone"
        time.sleep(0.02)
    assert not os.path.exists(folder), "nor does its socket stay"


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_spec_goes_through_its_text_unchanged():
    spec = CoordinatorSpec(uri="s3://bucket/run", retention=Retention(last=2, every_steps=100, best="knn"))
    assert CoordinatorSpec.from_json(spec.to_json()) == spec


def test_what_is_not_there_is_no_coordinator_that_is_gone(tmp_path):
    """The coordinator's answer that an object is missing is a FileNotFoundError, as is a missing socket."""

    class Missing:
        def answer(self, request: str) -> str:
            def method() -> None:
                raise ObjectMissingError("cannot read 'manifests/1.json'")

            return answered(request, {"begin_attempt": method})

    folder = tempfile.mkdtemp(prefix="npid-")
    listener = listen(Missing(), folder, threading.Event())  # pyright: ignore[reportArgumentType]
    started_s = time.monotonic()
    with pytest.raises(ObjectMissingError, match="cannot read"):
        LocalCoordination(folder).call("begin_attempt")
    assert time.monotonic() - started_s < 10
    listener.close()
    shutil.rmtree(folder)


def test_a_coordinator_killed_in_the_middle_of_an_answer_is_asked_again():
    folder = tempfile.mkdtemp(prefix="npid-")
    server = socket.socket(socket.AF_UNIX)
    server.bind(socket_of(folder))
    server.listen()

    def answer() -> None:
        answer = json.dumps({"result": "x" * 100}).encode()
        for sent in (answer[:10], answer):
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(len(answer).to_bytes(4, "big") + sent)

    threading.Thread(target=answer, daemon=True).start()
    assert LocalCoordination(folder).call("wishes") == "x" * 100
    server.close()
    shutil.rmtree(folder)


def test_a_coordinator_that_dies_in_a_long_call_is_waited_for_as_in_a_short_one(monkeypatch):
    monkeypatch.setattr("cluster.local_coordinator.GONE_TIMEOUT_S", 0.3)
    folder = tempfile.mkdtemp(prefix="npid-")
    server = socket.socket(socket.AF_UNIX)
    server.bind(socket_of(folder))
    server.listen()

    def answer() -> None:
        for seconds, answer in ((0.6, b""), (0.0, b'{"result": 1}')):
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                time.sleep(seconds)
                if answer:
                    connection.sendall(len(answer).to_bytes(4, "big") + answer)

    threading.Thread(target=answer, daemon=True).start()
    assert LocalCoordination(folder).call("begin_attempt") == 1
    server.close()
    shutil.rmtree(folder)


def test_a_coordinator_that_stands_still_is_named_and_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr("cluster.local_coordinator.CALL_TIMEOUT_S", 0.2)
    folder = tempfile.mkdtemp(prefix="npid-")
    server = socket.socket(socket.AF_UNIX)
    server.bind(socket_of(folder))
    server.listen()
    with pytest.raises(CoordinatorGoneError, match="is there but has not answered 'wishes'"):
        LocalCoordination(folder).call("wishes")
    server.close()
    shutil.rmtree(folder)


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_named(tmp_path, monkeypatch):
    place = tmp_path / ("x" * 80)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with pytest.raises(OSError, match="set TMPDIR to a shorter one"):
        run_local(time.sleep, 1, coordinator=CoordinatorSpec(uri=str(tmp_path / "run")))


def test_an_impatient_ctrl_c_leaves_no_coordinator_that_goes_on_holding_the_run(tmp_path):
    class Process:
        exitcode: int | None = None
        interrupted = killed = False

        def Process(self, **arguments):
            return self

        def start(self) -> None: ...

        def join(self, timeout_s: float | None = None) -> None:
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt

        def kill(self) -> None:
            self.killed = True

        def close(self) -> None: ...

    process = Process()
    coordinator = LocalCoordinator(CoordinatorSpec(uri=str(tmp_path)), str(tmp_path), process)  # pyright: ignore
    coordinator.start()
    with pytest.raises(KeyboardInterrupt):
        coordinator.end()
    assert process.killed


def test_a_run_whose_store_no_longer_answers_ends_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.coordination.CLOSE_TIMEOUT_S", 0.2)
    service = CoordinatorSpec(uri=str(tmp_path / "run")).start()
    service.begin_attempt()
    answers = threading.Event()
    monkeypatch.setattr(Store, "put", lambda *arguments: answers.wait(TIMEOUT_S))
    started_s = time.monotonic()
    service.close()
    assert time.monotonic() - started_s < 5
    answers.set()


def test_a_coordinator_that_cannot_be_started_is_no_reason_to_fail_at_the_end(tmp_path):
    class NoProcess:
        def Process(self, **arguments):
            return self

        def start(self) -> None:
            raise BlockingIOError("no more processes")

    coordinator = LocalCoordinator(CoordinatorSpec(uri=str(tmp_path)), str(tmp_path), NoProcess())  # pyright: ignore
    with pytest.raises(BlockingIOError):
        coordinator.start()
    coordinator.end()


def test_a_coordinator_that_cannot_be_started_again_is_no_reason_to_fail_at_the_end_either(tmp_path):
    class OneProcess:
        exitcode, num_starts, is_closed = 1, 0, False

        def Process(self, **arguments):
            return self

        def start(self) -> None:
            self.num_starts += 1
            if self.num_starts == 2:
                raise BlockingIOError("no more processes")

        def join(self, timeout_s: float | None = None) -> None:
            if self.is_closed:
                raise ValueError("process object is closed")

        def close(self) -> None:
            self.is_closed = True

    coordinator = LocalCoordinator(CoordinatorSpec(uri=str(tmp_path)), str(tmp_path), OneProcess())  # pyright: ignore
    coordinator.start()
    with pytest.raises(BlockingIOError):
        coordinator.start_again()
    coordinator.end()
