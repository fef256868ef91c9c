import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray._private.utils

from cluster.ray_session import RayClusterError, _reread_token, _without_handlers, ray_session
from cluster.ray_trainer import run_on_ray
from cluster.ray_worker import interface_of

START_TIMEOUT_S = 240  # two idle cores need about 30 s


def sum_ranks(worker, offset):
    import torch
    import torch.distributed as dist

    sum_1 = torch.tensor([worker.rank + offset])
    dist.all_reduce(sum_1)
    worker.emit({"sum": int(sum_1), "threads": torch.get_num_threads()})
    print("a worker's print must not reach the terminal")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not worker.all_gather_object(worker.stop_requested())[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return {"rank": worker.rank, "sum": int(sum_1), "openmp": os.environ["OMP_WAIT_POLICY"]}


class RecipeError(ValueError):
    """An exception of the user's own, with arguments that pickle alone would lose."""

    def __init__(self, name):
        self.name = name
        super().__init__(f"no recipe {name!r}")

    def __reduce__(self):
        return RecipeError, (self.name,)


def fail_on_rank_1(worker):
    if worker.rank == 1:
        raise RecipeError("cifar11")
    worker.all_gather_object("waits for rank 1")


DRIVER = """
import json, os, psutil, ray, signal, stat, threading
from pathlib import Path
from cluster.open_ports import open_ports
from cluster.ray_session import ray_session
from cluster.ray_trainer import run_on_ray
from families import family
from test_ray_trainer import RecipeError, fail_on_rank_1, sum_ranks

def stop(event):
    events.append(event)
    started.extend(family(os.getpid()))
    names = {process.pid: process.name() for process in [psutil.Process(), *started]}
    ports.extend([port.role, port.host] for port in open_ports(names))
    os.killpg(0, signal.SIGTERM)  # as `timeout` does; Ray's own processes must outlive it

if __name__ == "__main__":
    events, started, ports, error = [], [], [], None
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with ray_session(None, 2, quiet=True):  # one Ray for both runs: starting it is what takes the time
        result = run_on_ray(sum_ranks, 2, 5, on_event=stop, threads_per_worker=1)
        try:
            run_on_ray(fail_on_rank_1, 2)
        except RecipeError as caught:
            error = [caught.name, *caught.__notes__]
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        mode = min(stat.S_IMODE(folder.stat().st_mode) for folder in session.parents if folder.name.startswith("ray-"))
        threads = [thread.name for thread in threading.enumerate()]  # one that uses a Ray shut down ends the process
    started.extend(family(os.getpid()))
    _, left = psutil.wait_procs(started, timeout=5)
    left = [process.name() for process in left]
    restored = handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    report = {"result": result, "events": events, "error": error, "restored": restored, "threads": threads}
    print(json.dumps({**report, "ports": ports, "mode": mode, "num_started": len(started), "left": left}))
"""


def test_a_run_on_a_private_ray(tmp_path):
    """One process, one Ray: collectives, events, SIGTERM to its group, an error, silence, and nothing left over."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join(map(str, (Path(__file__).parent, *Path(__file__).parents[1:3])))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["result"] == {"rank": 0, "sum": 11, "openmp": "PASSIVE"}
    assert report["events"] == [{"sum": 11, "threads": 1}]
    assert report["error"][0] == "cifar11"
    assert report["error"][1].startswith("raised by rank 1 of 2")
    assert "fail_on_rank_1" in report["error"][1]
    assert report["num_started"] >= 6  # gcs_server, raylet, mailbox, controller, two workers
    assert {host for _, host in report["ports"]} == {"127.0.0.1"}  # Ray's, torch's and our own: on loopback only
    assert len(report["ports"]) >= 10
    assert report["mode"] == 0o700  # no other user reaches Ray's sockets and logs, which it opens to everybody
    assert report["left"] == []
    assert report["restored"]
    assert "ray-train" not in report["threads"]


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "127.0.0.1:port", ":6379"])
def test_a_malformed_address_is_refused_by_name(address):
    with pytest.raises(RayClusterError, match="not of the form host:port") as caught:
        run_on_ray(sum_ranks, 1, 0, address=address)
    assert repr(address) in str(caught.value)


def test_ray_takes_no_signal_over_so_that_a_private_one_starts_in_any_thread():
    before, errors = signal.getsignal(signal.SIGTERM), []

    def start():
        try:
            ray._private.utils.set_sigterm_handler(print)  # what Ray's node and its driver do
        except ValueError as error:
            errors.append(error)

    with _without_handlers():
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        ray._private.utils.set_sigterm_handler(print)
    assert (errors, signal.getsignal(signal.SIGTERM)) == ([], before)


def test_an_unused_port_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"cannot connect .*refused"):
        run_on_ray(sum_ranks, 1, 0, address=address)
    assert time.monotonic() - started < 5


def test_a_token_that_cannot_be_read_is_told_as_such(monkeypatch, tmp_path):
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        _reread_token()
        with pytest.raises(RayClusterError, match="RAY_AUTH_TOKEN_PATH is set but file cannot be opened"):
            run_on_ray(sum_ranks, 1, 0, address=f"127.0.0.1:{server.getsockname()[1]}")
    _reread_token()


def test_something_that_is_not_a_ray_head_is_refused_within_ten_seconds(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(RayClusterError, match="does not answer as a Ray head"):
            run_on_ray(sum_ranks, 1, 0, address=address)
        assert time.monotonic() - started < 10
    assert capfd.readouterr() == ("", "")


def test_the_cluster_that_ray_job_submit_names_is_used(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "the job's cluster")
    with pytest.raises(RayClusterError, match="the job's cluster"), ray_session(None, 1, quiet=True):
        pass


def test_zero_workers_are_refused():
    with pytest.raises(ValueError, match="num_workers is 0"):
        run_on_ray(sum_ranks, 0)


def test_a_cluster_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(RayClusterError("head:6379", "it is down")))
    assert (error.address, error.reason) == ("head:6379", "it is down")
    assert str(error) == str(RayClusterError("head:6379", "it is down"))


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == "lo"
