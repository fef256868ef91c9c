"""A Ray cluster of several hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

    run_in_a_network([sys.executable, "script.py"])     # in the script:  with Hosts(folder) as hosts: ...

`run_in_a_network` runs a command in a new namespace that has the bridge; there it is the machine of whoever looks on,
with the S3 server. Hosts can be killed like in a power cut, cut off from the network, drained, and added.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUBNET, OUTSIDE = "10.88.77", 254
GCS_PORT, DASHBOARD_PORT = 6379, 8265
VARIABLE = "RAY_HOSTS_NETWORK"
COMMAND_TIMEOUT_S, START_TIMEOUT_S, END_TIMEOUT_S = 20.0, 90.0, 20.0
OBJECT_STORE_BYTES = 80 * 2**20


def why_not() -> str | None:
    """Return why there can be no hosts here, None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or None in map(shutil.which, ("ip", "nsenter")):
        return "network namespaces need Linux, root, iproute2 and util-linux"
    name = f"hosts{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made: {made.stderr.strip()}"
    try:
        bridge = _ip("-n", name, "link", "add", "br0", "type", "bridge", check=False)
        return f"no bridge can be made: {bridge.stderr.strip()}" if bridge.returncode else None
    finally:
        _ip("netns", "del", name, check=False)


def run_in_a_network(
    command: Sequence[str], environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command where `Hosts` can be made, as `subprocess.run` does; everything of the network goes with it."""
    name = f"hosts{os.getpid()}-{secrets.token_hex(2)}"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
        _ip("-n", name, "addr", "add", f"{SUBNET}.{OUTSIDE}/24", "dev", "br0")
        _ip("-n", name, "link", "set", "br0", "up")
        environment = {**(os.environ if environment is None else environment), VARIABLE: name}
        return subprocess.run([*_inside(name), *command], env=environment, **options)
    finally:
        for namespace in [*_namespaces(f"{name}-"), name]:
            for pid in _pids(namespace):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip("netns", "del", namespace, check=False)


class Host:
    """One machine of the cluster, whose Ray processes live in a namespace of its own."""

    def __init__(self, network: str, number: int, folder: Path, environment: dict[str, str]) -> None:
        self.number, self.address = number, f"{SUBNET}.{number}"
        self.namespace = f"{network}-{number}"
        self._link, self._folder = f"h{number}", folder
        self.environment = {**os.environ, **environment}
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("link", "set", self._link, "master", "br0")
        _ip("link", "set", self._link, "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on this host."""
        return [*_inside(self.namespace), *argv]

    def run(self, argv: Sequence[str], timeout_s: float = START_TIMEOUT_S) -> str:
        """Run a command on this host and return what it prints."""
        done = subprocess.run(
            self.command(argv), env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def start_ray(self, head: Host, num_cpus: int) -> None:
        """Start Ray: the head's processes on the host that is its own head, else a node of it."""
        ray = [str(Path(sys.executable).parent / "ray"), "start", f"--num-cpus={num_cpus}"]
        options = [f"--node-ip-address={self.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        if head is self:
            options += ["--head", f"--port={GCS_PORT}", f"--temp-dir={self._folder}", "--dashboard-host", self.address]
            options += [f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            options += [f"--address={head.address}:{GCS_PORT}"]
        self.run([*ray, *options, "--disable-usage-stats"])

    def pids(self) -> list[int]:
        """Return the numbers of the processes that live on this host."""
        return _pids(self.namespace)

    def kill(self) -> None:
        """Take the power away: every process ends at once. The host itself can start Ray again."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes of {self.address} do not end"
            time.sleep(0.01)

    def cut(self) -> None:
        """Take the network away: nothing that is sent arrives, and nobody is told."""
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """Give the network back."""
        _ip("link", "set", self._link, "up")


class Hosts:
    """A cluster: a head without room for workers, and hosts with `num_cpus` each. Called in `run_in_a_network`."""

    def __init__(self, folder: Path, environment: dict[str, str], num_cpus: int = 1) -> None:
        self.folder, self.num_cpus = folder, num_cpus
        self._environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            **environment,
        }
        self._sessions = 0
        self.head = Host(os.environ[VARIABLE], 1, folder, self._environment)
        self.workers: list[Host] = []

    @property
    def environment(self) -> dict[str, str]:
        """What whoever talks to the cluster from outside needs."""
        return {**os.environ, **self._environment}

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def start_head(self) -> None:
        """Start the head's Ray, in a folder of its own each time."""
        self._sessions += 1
        self.head._folder = self.folder / f"r{self._sessions}"
        self.head.start_ray(self.head, 0)

    def add(self) -> Host:
        """Start one more host and return it."""
        host = Host(os.environ[VARIABLE], 2 + len(self.workers), self.folder, self._environment)
        self.workers.append(host)
        host.start_ray(self.head, self.num_cpus)
        return host

    def alive(self) -> list[dict]:
        """Return Ray's nodes as the head sees them."""
        script = (
            f"import json,ray;ray.init('{self.head.address}:{GCS_PORT}',logging_level='ERROR',log_to_driver=False);"
            "print(json.dumps([n for n in ray.nodes() if n['Alive']]))"
        )
        return json.loads(self.head.run([sys.executable, "-c", script]).splitlines()[-1])

    def drain(self, host: Host, seconds: int) -> None:
        """Tell Ray that a host will be taken away in so many seconds."""
        (node,) = [n["NodeID"] for n in self.alive() if n["NodeManagerAddress"] == host.address]
        ray = str(Path(sys.executable).parent / "ray")
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        address = ["--address", f"{self.head.address}:{GCS_PORT}", "--node-id", node]
        self.head.run([ray, "drain-node", *address, *reason, "--deadline-remaining-seconds", str(seconds)])

    def close(self) -> None:
        """End all hosts."""
        for host in [*self.workers, self.head]:
            host.kill()


@contextlib.contextmanager
def cluster(folder: Path, environment: dict[str, str], num_workers: int, num_cpus: int = 1) -> Iterator[Hosts]:
    """Yield a running cluster; it is ended on leaving."""
    hosts = Hosts(folder, environment, num_cpus)
    try:
        hosts.start_head()
        for _ in range(num_workers):
            hosts.add()
        yield hosts
    finally:
        hosts.close()


def _inside(namespace: str) -> list[str]:
    # `ip netns exec` would also give each command file systems of its own.
    return ["nsenter", f"--net=/run/netns/{namespace}"]


def _namespaces(prefix: str) -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").stdout.splitlines() if line.startswith(prefix)]


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace, check=False).stdout.split()]


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done
