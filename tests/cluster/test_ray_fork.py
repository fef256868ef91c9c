"""Workers of Ray that are forked from a process with everything imported: they are as those that Ray starts."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from families import fork_servers

from cluster.ray_fork import READY, ForkRequest, forked_runtime_env, receive_request, send_request
from cluster.ray_fork_server import MOST_CRASHES
from cluster.ray_session import ray_session

TIMEOUT_S = 60
LIGHT = ("email.mime.text",)
MODULES = ("torch", "email.mime.text")
REPORT = """
import json, os, random, sys, threading
import numpy, torch, ray
print(json.dumps({
    "pid": os.getpid(), "argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ),
    "main": sys.modules["__main__"].__dict__.get("mark"), "path": sys.path[0], "stdin": sys.stdin.read(),
    "numpy": numpy.random.random(), "random": random.random(), "uuid": str(__import__("uuid").uuid4()),
    "ray": ray.ObjectID.from_random().hex(), "threads": threading.active_count(), "session": os.getsid(0),
    "preloaded": "email.mime.text" in sys.modules,
    "parallel": float(torch.ones(300, 300).mm(torch.ones(300, 300)).sum()),
}))
sys.exit(7)
"""


def wait_until(condition, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class FakeRaylet:
    """A process that the fork server watches, and the folders of a session of Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sockets", "logs"):
            (folder / name).mkdir()
        self.process = subprocess.Popen(["sleep", "600"])
        self.environment = {**os.environ, "RAY_RAYLET_PID": str(self.process.pid)}

    def command(self, script: Path, *arguments: str, modules=LIGHT) -> list[str]:
        plasma = f"--object-store-name={self.folder}/sockets/plasma_store"
        return [
            *(sys.executable, "-P", "-m", "cluster.ray_fork_client", *modules, "--"),
            *(str(script), plasma, *arguments),
        ]

    def client(self, script: Path, *arguments: str, modules=LIGHT, **changed: str) -> SimpleNamespace:
        """Run a client; what the worker printed comes with it: it has the client's streams."""
        return subprocess.run(
            self.command(script, *arguments, modules=modules),
            env={**self.environment, **changed}, cwd=self.folder, input="from stdin", capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip

    def waiting_worker(self) -> psutil.Process:
        """Fork a worker that does nothing until it is killed."""
        script, out = self.folder / "waits.py", self.folder / "out"
        script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
        with open(out, "w") as stream:
            command = self.command(script)
            subprocess.run(
                command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=stream, check=True
            )
        wait_until(lambda: out.read_text().endswith("\n"), 10)
        return psutil.Process(int(out.read_text()))

    def sockets(self) -> list[str]:
        return [path.name for path in (self.folder / "sockets").iterdir() if not path.suffix]

    def family(self) -> list[psutil.Process]:
        return fork_servers({self.process.pid})


@pytest.fixture
def raylet(tmp_path) -> Iterator[FakeRaylet]:
    fake = FakeRaylet(tmp_path)
    yield fake
    fake.process.kill()
    fake.process.wait()
    wait_until(lambda: not fake.family(), timeout_s=10)
    assert fake.sockets() == []


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "scripts" / "report.py"
    path.parent.mkdir()
    path.write_text(f"mark = 1\n{REPORT}")
    return path


@pytest.fixture
def hello(tmp_path) -> Path:
    path = tmp_path / "hello.py"
    path.write_text("print('hello')\n")
    return path


def test_a_forked_worker_is_as_a_process_of_its_own_and_draws_numbers_of_its_own(raylet, script):
    ends = [raylet.client(script, "--rank", str(n), modules=MODULES) for n in range(2)]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
    first, second = (json.loads(end.stdout) for end in ends)
    assert first["argv"] == [str(script), f"--object-store-name={raylet.folder}/sockets/plasma_store", "--rank", "0"]
    assert first["folder"] == str(raylet.folder)
    assert {**first["environment"], "LC_CTYPE": ""} == {**raylet.environment, "LC_CTYPE": ""}  # Python sets it
    assert first["path"] == str(script.parent)
    assert (first["main"], first["threads"], first["stdin"]) == (1, 1, "from stdin")
    assert first["session"] == first["pid"]
    assert first["preloaded"]
    assert first["parallel"] == 300**3
    for name in ("numpy", "random", "uuid", "ray", "pid"):
        assert first[name] != second[name], name
    assert len(raylet.family()) == 1, "one server for all workers"


def test_clients_that_come_together_start_one_server(raylet, hello):
    clients = [
        subprocess.Popen(raylet.command(hello), env=raylet.environment, cwd=raylet.folder, stdout=subprocess.PIPE,
                         stdin=subprocess.DEVNULL) for _ in range(6)
    ]  # fmt: skip
    outputs = [client.communicate(timeout=TIMEOUT_S)[0] for client in clients]
    assert [client.returncode for client in clients] == [0] * 6
    assert all(output.startswith(b"hello") for output in outputs)
    assert len(raylet.family()) == 1


def test_another_environment_has_another_server(raylet, hello):
    assert raylet.client(hello).returncode == 0
    assert raylet.client(hello, RAY_JOB_ID="02000000").returncode == 0
    assert len(raylet.family()) == 2
    assert raylet.client(hello, CUDA_VISIBLE_DEVICES="1").returncode == 0
    assert len(raylet.family()) == 2, "each worker of a machine may have a GPU of its own"


DAMAGES = {
    "an error": "import no_such_module",
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "ids drawn": "import ray\nray.ObjectID.from_random()",
    "killed": "import os\nos.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_a_server_cannot_be_trusted_nothing_is_forked(raylet, script, tmp_path, damage):
    (tmp_path / "damaged.py").write_text(DAMAGES[damage])
    end = raylet.client(script, modules=("damaged",), PYTHONPATH=str(tmp_path))
    if damage == "killed":
        (raylet.folder / "sockets" / raylet.sockets()[0]).unlink()
    assert end.returncode == 1, end
    assert end.stdout == ""
    assert "this worker starts by itself" in end.stderr
    if damage != "killed":
        start_s = time.monotonic()
        again = raylet.client(script, modules=("damaged",), PYTHONPATH=str(tmp_path))
        assert again.returncode == 1
        assert "refused before" in again.stderr
        assert time.monotonic() - start_s < 1, "the imports are not tried again"


def test_a_worker_for_which_nothing_is_forked_starts_by_itself(raylet, script, tmp_path):
    (tmp_path / "damaged.py").write_text("import no_such_module")
    shell = forked_runtime_env({}, ("damaged",))["py_executable"]
    line = f"exec {shell} {script} --object-store-name={raylet.folder}/sockets/plasma_store"
    env = {**raylet.environment, "PYTHONPATH": str(tmp_path)}
    end = subprocess.run(["bash", "-c", line], env=env, cwd=raylet.folder, input="x", capture_output=True, text=True)
    assert end.returncode == 7, end
    assert json.loads(end.stdout)["argv"][0] == str(script)


def test_a_killed_server_is_followed_by_another_and_what_it_forked_lives_on(raylet):
    workers = []
    for _ in range(2):
        workers.append(raylet.waiting_worker())
        (server,) = raylet.family()
        server.kill()
        server.wait(10)
        assert workers[-1].is_running()
    for worker in workers:
        worker.kill()
    (raylet.folder / "sockets" / raylet.sockets()[0]).unlink()


def test_an_ended_worker_is_gone_at_once(raylet):
    worker = raylet.waiting_worker()
    worker.kill()
    wait_until(lambda: not psutil.pid_exists(worker.pid), 1)


def test_a_server_ends_with_its_raylet_and_leaves_its_workers_to_ray(raylet):
    worker = raylet.waiting_worker()
    raylet.process.kill()
    wait_until(lambda: not raylet.family(), 5)
    assert raylet.sockets() == []
    assert worker.is_running()
    worker.kill()


def test_a_client_that_waited_too_long_leaves_nothing_to_fork(raylet, tmp_path, hello):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(3)\n")
    env = {**raylet.environment, "PYTHONPATH": str(tmp_path)}
    out = tmp_path / "out"
    code = "import sys, cluster.ray_fork_client as c; c.READY_TIMEOUT_S = 0.5; sys.exit(c.main(sys.argv[1:]))"
    arguments = raylet.command(hello, modules=("slow",))[4:]
    with out.open("w") as stream:
        end = subprocess.run([sys.executable, "-c", code, *arguments], env=env, cwd=tmp_path, stdout=stream)
    assert end.returncode == 1
    end = raylet.client(hello, modules=("slow",), PYTHONPATH=str(tmp_path))
    assert end.returncode == 0
    assert end.stdout.startswith("hello")
    assert out.read_text() == ""


def test_a_client_that_gives_up_while_the_worker_is_forked_leaves_none(raylet, hello):
    assert raylet.client(hello).returncode == 0
    (server,) = raylet.family()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(raylet.folder / "sockets" / raylet.sockets()[0]))
        assert connection.recv(1) == READY
        marker = raylet.folder / "ran"
        hello.write_text(f"open({str(marker)!r}, 'w')")
        send_request(connection, ForkRequest([str(hello)], dict(os.environ), str(raylet.folder)))
        assert connection.recv(1) == READY
        assert len(server.children()) == 1
    wait_until(lambda: not server.children(), 5)
    assert not marker.exists()
    assert raylet.client(hello).returncode == 0
    wait_until(marker.exists, 5)


def test_workers_that_crash_soon_end_their_server(raylet, tmp_path):
    script = tmp_path / "crashes.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    for _ in range(MOST_CRASHES):
        assert raylet.client(script).returncode == 0
    wait_until(lambda: not raylet.family(), 5)
    assert "refused before" in raylet.client(script).stderr


def test_a_server_that_can_take_no_connection_is_followed_by_another(raylet, hello):
    worker = raylet.waiting_worker()
    (server,) = raylet.family()
    server.rlimit(psutil.RLIMIT_NOFILE, (server.num_fds(),) * 2)
    assert raylet.client(hello).returncode == 1  # the worker is started as Ray starts it
    wait_until(lambda: not raylet.family(), 5)
    assert raylet.client(hello).returncode == 0  # from the next one
    worker.kill()


def test_other_peoples_files_are_not_followed(raylet, hello, tmp_path):
    """Folders of Ray are open to everybody, and what lies in the folder of a job is not the project's."""
    (raylet.folder / "json.py").write_text("raise SystemExit(9)")
    assert raylet.client(hello).stdout == "hello\n"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for lock in (raylet.folder / "sockets").glob("*.lock"):
        lock.unlink()
        lock.symlink_to(victim)
    (server,) = raylet.family()
    server.kill()
    server.wait(10)
    end = raylet.client(hello)
    assert end.returncode == 1
    assert victim.read_text() == "precious"
    (raylet.folder / "sockets" / raylet.sockets()[0]).unlink()


def test_requests_arrive_whole_and_damaged_ones_are_refused_without_a_leak():
    chance = random.Random(3)
    request = ForkRequest(["script.py", "--a=ä\udcff\n"], {"X": "y" * 300_000, "\udcfe": ""}, "/tmp")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if os.fork() == 0:
            send_request(ours, request)
            os._exit(0)
        received, streams = receive_request(theirs)
        os.wait()
        assert received == request
        assert len(streams) == 3
        for stream in streams:
            os.close(stream)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(ours, [chance.randbytes(chance.choice((1, 4, 40)))], range(chance.choice((1, 3))))
            ours.close()
            with pytest.raises(ConnectionError):
                receive_request(theirs)
    for text in (b"[", b"\xff", b"[" * 100_000, b"[]", b"null", b'{"command": []}'):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(ours, [len(text).to_bytes(4, "big")], range(3))
            ours.sendall(text)
            with pytest.raises(ConnectionError, match="no request"):
                receive_request(theirs)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("field", ["pip", "uv", "conda", "container", "image_uri", "py_executable"])
def test_where_a_job_brings_its_own_python_workers_start_as_ray_starts_them(field):
    assert forked_runtime_env({field: "x"}, MODULES) == {}
    assert forked_runtime_env({"working_dir": "gcs://x.zip", "env_vars": {}}, MODULES) != {}


def test_a_private_ray_starts_and_ends_forked_workers_and_leaves_nothing_behind():
    class Facts:
        def facts(self) -> dict:
            return {"pid": os.getpid(), "parent": os.getppid()}

    with ray_session(None, 2, quiet=True):
        actor = ray.remote(runtime_env=forked_runtime_env({}, MODULES))(Facts)
        actors = [actor.remote() for _ in range(3)]
        facts = ray.get([a.facts.remote() for a in actors], timeout=TIMEOUT_S)
        assert {psutil.Process(fact["parent"]).name() for fact in facts} == {"fork-server"}
        assert len({fact["parent"] for fact in facts}) == 1
        server = psutil.Process(facts[0]["parent"])
        start_s = time.monotonic()
        late = actor.remote()
        ray.get(late.facts.remote(), timeout=TIMEOUT_S)
        print(f"{time.monotonic() - start_s:.2f} s for another worker")
        os.kill(facts[0]["pid"], signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actors[0].facts.remote(), timeout=10)
        ray.kill(actors[1])
        wait_until(lambda: not psutil.pid_exists(facts[1]["pid"]), 10)
        left = [psutil.Process(fact["pid"]) for fact in facts[2:]]
    psutil.wait_procs([*left, server], timeout=10)
    assert not server.is_running()
    assert not any(process.is_running() for process in left)
