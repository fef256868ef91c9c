"""The spot daemon: on a real Ray cluster of two nodes, and its parts against processes and servers of our own."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from metadata_server import MetadataServer
from ray_nodes import HEAD, SECOND, end, free_port, two_nodes

from cluster import ray_drain, spot_watch
from cluster.local_raylets import AmbiguousRaylet, NoSuchRaylet, Raylet, choose_raylet, local_raylets
from cluster.metadata_service import Notice, detect
from cluster.open_ports import environment_of, open_ports, ray_processes
from cluster.ray_drain import NotDrained, drain_node
from cluster.ray_session import _reread_token
from cluster.spot_watch import SpotWatch, main

TIMEOUT_S = 60.0
POLL_S = 0.2
NODE_ID = "ab" * 28

# Holds a core of the second node and tells what Ray's tables say of it, until standard input ends; then lets it go.
OBSERVER = """
import json, sys, threading, time
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import state
from ray.core.generated import common_pb2, gcs_pb2, gcs_service_pb2 as service, gcs_service_pb2_grpc as stubs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

def tell(**what):
    print(json.dumps({**what, "at_s": time.time()}), flush=True)

address, ip = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
(node,) = [node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == ip]

@ray.remote(num_cpus=1)
class Busy:
    def ready(self):
        return True

busy = Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
ray.get(busy.ready.remote(), timeout=60)
tell(busy=node)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
last = None
while not ended.wait(0.05):
    draining = state.get_draining_nodes()
    if draining != last:
        last = draining
        tell(draining=draining)
ray.kill(busy)
channel = init_grpc_channel(address)
deadline_s = time.time() + 60
while time.time() < deadline_s:
    nodes = stubs.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(service.GetAllNodeInfoRequest()).node_info_list
    (info,) = [info for info in nodes if info.node_id.hex() == node]
    if info.state == gcs_pb2.GcsNodeInfo.DEAD:
        reason = common_pb2.NodeDeathInfo.Reason.Name(info.death_info.reason)
        tell(dead=reason, message=info.death_info.reason_message)
        break
    time.sleep(0.1)
"""


class Lines:
    """The lines that a process prints, as they come."""

    def __init__(self, stream):
        self.lines = []
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._stream:
            self.lines.append(line.rstrip("\n"))

    def wait(self, pattern):
        """Return the first line with the pattern."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            for line in list(self.lines):
                if re.search(pattern, line):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no line with {pattern!r} in {self.lines}")

    def wait_json(self, name):
        """Return the newest document that has this key; one must have come."""
        self.wait(f'"{name}"')
        return [json.loads(line) for line in self.lines if f'"{name}"' in line][-1]


def start(stack, command, environment):
    process = stack.enter_context(
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.kill)
    return process


@contextlib.contextmanager
def stopped(pid):
    """A process that does not run meanwhile, as one on a machine that hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_node_is_drained_in_ray_when_the_cloud_gives_notice(capfd):
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(two_nodes())
        address, environment = nodes.address, nodes.environment
        metadata = stack.enter_context(MetadataServer("aws"))
        family = {p.pid for node in (nodes.head, nodes.second) for p in psutil.Process(node.pid).children(True)}
        ours = {pid: role for pid, role in ray_processes().items() if pid in family}
        check_ports(ours, address)

        watch = [sys.executable, "-m", "cluster.spot_watch", "--address", address, "--poll-s", str(POLL_S)]
        unclear = subprocess.run(watch, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert unclear.returncode == 2
        assert "2 Ray nodes run on this machine" in unclear.stderr
        assert HEAD in unclear.stderr
        assert SECOND in unclear.stderr

        observer = start(stack, [sys.executable, "-c", OBSERVER, address, SECOND], environment)
        seen = Lines(observer.stdout)
        node_id = seen.wait_json("busy")["busy"]
        command = [*watch, "--node-ip", SECOND, "--metadata-url", metadata.url]
        intruder = start(stack, command, {**environment, "RAY_AUTH_TOKEN": "0" * 64})
        daemon = start(stack, command, environment)
        log, refused = Lines(daemon.stderr), Lines(intruder.stderr)
        assert node_id[:12] in log.wait("watching the metadata service of aws")
        refused.wait("watching the metadata service of aws")
        assert seen.wait_json("draining")["draining"] == {}

        deadline_s = float(int(time.time()) + 120)
        noticed_s = time.time()
        metadata.interrupt("terminate", deadline_s)
        log.wait("drained: the cluster knows")
        seen.wait(f'"{node_id}": ')
        drained = seen.wait_json("draining")
        assert drained["draining"] == {node_id: int(deadline_s * 1000)}
        refused.wait("refuses the authentication token")
        intruder.kill()

        # A head that hangs: asked again until it answers. The nearer deadline replaces the first.
        gcs = next(pid for pid, role in ours.items() if role == "gcs_server")
        nearer_s = deadline_s - 30
        with stopped(gcs):
            metadata.interrupt("terminate", nearer_s)
            log.wait("not drained yet .*no answer")
        seen.wait(str(int(nearer_s * 1000)))

        observer.stdin.close()
        dead = seen.wait_json("dead")
        assert dead["dead"] == "AUTOSCALER_DRAIN_PREEMPTED"
        assert "spot interruption: terminate" in dead["message"]
        assert daemon.wait(timeout=TIMEOUT_S) == 0
        log.wait("the raylet ended")
        told = "\n".join(log.lines + refused.lines)
        assert environment["RAY_AUTH_TOKEN"] not in told
        assert not any(token in told for token in metadata.tokens)
    with capfd.disabled():
        print(f"\nnotice to drain in Ray's table: {drained['at_s'] - noticed_s:.2f} s (asked every {POLL_S} s)")


@pytest.mark.slow
def test_a_notice_that_comes_while_the_head_is_being_restarted_is_not_lost(tmp_path):
    """A head that keeps its tables on disk, killed, and started again under the same address."""
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(two_nodes(RAY_gcs_storage="rocksdb", RAY_gcs_storage_path=str(tmp_path)))
        metadata = stack.enter_context(MetadataServer("gcp"))
        metadata.say("preempted", "FALSE")
        watch = [sys.executable, "-m", "cluster.spot_watch", "--address", nodes.address, "--poll-s", str(POLL_S)]
        command = [*watch, "--cloud", "gcp", "--node-ip", SECOND, "--metadata-url", metadata.url]
        log = Lines(start(stack, command, nodes.environment).stderr)
        log.wait("watching the metadata service of gcp")
        end(nodes.head)
        metadata.say("preempted", "TRUE")
        log.wait("not drained yet .*no answer")
        nodes.start_head()
        log.wait("drained: the cluster knows")
        log.wait("the raylet ended")  # nothing ran on it


def check_ports(processes, address):
    """What the doctor tells: the head's port, and ports that other machines reach; and who has token authentication."""
    roles = list(processes.values())
    assert roles.count("gcs_server") == 1
    assert roles.count("raylet") == 2
    servers = [pid for pid, role in processes.items() if role in ("gcs_server", "raylet")]
    assert [environment_of(pid, "RAY_AUTH_MODE") for pid in servers] == ["token"] * 3
    ports = open_ports(processes)
    head = int(address.rpartition(":")[2])
    (gcs,) = [port for port in ports if port.port == head]
    assert gcs.role == "gcs_server"
    listening = {(c.pid, c.laddr.port) for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    assert {(port.pid, port.port) for port in ports} <= listening
    assert {port for pid, port in listening if pid in processes} <= {port.port for port in ports}


@contextlib.contextmanager
def a_process(*arguments, name="/opt/ray/raylet"):
    """A process that sleeps under the command line of another."""
    code = "import time; time.sleep(600)"
    process = subprocess.Popen([name, "-c", code, *arguments], executable=sys.executable)
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while psutil.Process(process.pid).cmdline()[:1] != [name]:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def of_a_raylet(node_id, ip, address):
    return f"--node_id={node_id}", f"--node_ip_address={ip}", f"--gcs-address={address}", "--labels={}"


def test_raylets_are_found_by_their_command_lines():
    address = f"10.0.0.1:{free_port()}"
    with a_process(*of_a_raylet(NODE_ID, "10.0.0.7", address)) as process:
        (raylet,) = [raylet for raylet in local_raylets() if raylet.gcs_address == address]
        assert (raylet.pid, raylet.node_id, raylet.node_ip) == (process.pid, NODE_ID, "10.0.0.7")
        assert raylet.is_running()
        process.kill()
        process.wait()
        assert not raylet.is_running()
        assert raylet not in local_raylets()


def test_a_process_of_another_name_is_no_raylet():
    address = f"10.0.0.1:{free_port()}"
    with a_process(*of_a_raylet(NODE_ID, "10.0.0.7", address), name="/usr/bin/notraylet"):
        assert not [raylet for raylet in local_raylets() if raylet.gcs_address == address]


def a_raylet(node_id, ip="10.0.0.7", address="10.0.0.1:6379"):
    return Raylet(1, "0", node_id, ip, address)


def test_of_several_raylets_the_one_that_is_meant_is_chosen():
    head, worker = a_raylet("aa", "10.0.0.1"), a_raylet("bb", "10.0.0.7")
    other = a_raylet("cc", address="10.9.9.9:6379")
    assert choose_raylet([head, worker, other], None, node_id="bb") == worker
    assert choose_raylet([head, worker, other], None, node_ip="10.0.0.1") == head
    assert choose_raylet([head, other], "10.0.0.1:6379") == head
    assert choose_raylet([a_raylet("aa", address="127.0.0.1:6379")], "localhost:6379").node_id == "aa"
    with pytest.raises(AmbiguousRaylet, match=r"2 Ray nodes .*--node-id.*aa.*bb"):
        choose_raylet([head, worker, other], "10.0.0.1:6379")
    with pytest.raises(NoSuchRaylet, match=r"node id dd; found node aa.*Run `ray start` first"):
        choose_raylet([head], None, node_id="dd")


class Drains:
    """Takes drains, after it has failed a number of times."""

    def __init__(self, num_failures=0, error=None):
        self.taken = []
        self._error = error or ConnectionError("the head is away")
        self.num_tries = 0
        self._num_failures = num_failures

    def __call__(self, address, node_id, message, deadline_s):
        self.num_tries += 1
        if self.num_tries <= self._num_failures:
            raise self._error
        self.taken.append((address, node_id, message, deadline_s))


@contextlib.contextmanager
def token_from(path, monkeypatch):
    """Ray's token comes from this file, which may not be there."""
    with monkeypatch.context() as patch:
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        _reread_token()
        yield
    _reread_token()


def test_a_token_that_cannot_be_read_now_is_read_at_the_next_try(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_drain, "REQUEST_TIMEOUT_S", 0.2)
    path, address = tmp_path / "token", f"127.0.0.1:{free_port()}"
    with token_from(path, monkeypatch):
        for text in (None, "", "ab" * 32):
            if text is not None:
                path.write_text(text)
            expected = "no answer from the cluster" if text else "the authentication token cannot be read"
            with pytest.raises(NotDrained, match=expected):
                drain_node(address, NODE_ID, "preempted", time.time() + 60)


class Failing:
    """A metadata service that fails in a way of its own, once, before it gives notice."""

    name = "aws"

    def __init__(self):
        self.num_asked = 0

    def poll(self):
        self.num_asked += 1
        if self.num_asked == 1:
            raise RuntimeError("can't start new thread")
        return [Notice("spot interruption: terminate", 1e12)]


def test_the_watch_outlasts_errors_that_nobody_expected(monkeypatch, caplog):
    monkeypatch.setattr(spot_watch, "RETRY_S", 0.02)
    drains = Drains(num_failures=2, error=LookupError("two\nlines"))
    address = f"10.0.0.1:{free_port()}"
    with a_process(*of_a_raylet(NODE_ID, "10.0.0.7", address)) as process:
        watch = SpotWatch(choose_raylet(local_raylets(), address), Failing, drains, poll_s=0.02)
        thread = threading.Thread(target=watch.run, daemon=True)
        thread.start()
        wait_for(lambda: drains.taken)
        process.kill()
        process.wait()
        thread.join(TIMEOUT_S)
    assert drains.num_tries == 3
    assert "RuntimeError: can't start new thread" in caplog.text
    assert "not drained yet (LookupError: two lines)" in caplog.text


@contextlib.contextmanager
def watching(metadata_url, drains, monkeypatch):
    """A watch at work in a thread, for a process that sleeps; ends it with the process."""
    monkeypatch.setattr(spot_watch, "RETRY_S", 0.05)
    address = f"10.0.0.1:{free_port()}"
    with a_process(*of_a_raylet(NODE_ID, "10.0.0.7", address)) as process:
        raylet = choose_raylet(local_raylets(), address)
        watch = SpotWatch(raylet, lambda: detect(metadata_url), drains, poll_s=0.05)
        thread = threading.Thread(target=watch.run, daemon=True)
        thread.start()
        yield raylet
        process.kill()
        process.wait()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def wait_for(condition):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_drain_is_tried_until_it_is_taken_and_then_no_more(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="instdisc.spot_watch")
    drains = Drains(num_failures=5)
    with MetadataServer("gcp") as metadata, watching(metadata.url, drains, monkeypatch) as raylet:
        wait_for(lambda: "watching" in caplog.text)
        metadata.say("preempted", "TRUE")
        wait_for(lambda: drains.taken)
        time.sleep(0.5)
    ((address, node_id, message, deadline_s),) = drains.taken
    assert (address, node_id, message) == (raylet.gcs_address, NODE_ID, "preempted")
    assert deadline_s == pytest.approx(time.time() + 30, abs=10)
    assert drains.num_tries == 6
    assert len([r for r in caplog.records if "not drained yet" in r.message]) == 1  # told once in TELL_S


def test_a_metadata_service_that_vanishes_and_comes_back_is_told_in_two_lines(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="instdisc.spot_watch")
    monkeypatch.setattr("cluster.metadata_service.REQUEST_TIMEOUT_S", 0.3)
    drains = Drains()
    first = MetadataServer("aws")
    with watching(first.url, drains, monkeypatch):
        wait_for(lambda: "watching" in caplog.text)
        first.__exit__()
        wait_for(lambda: "no answer from the metadata service" in caplog.text)
        time.sleep(0.5)
        with MetadataServer("aws", first.port) as second:  # its tokens are others
            second.interrupt("terminate", time.time() + 90)
            wait_for(lambda: drains.taken)
            messages = [record.message for record in caplog.records]
    assert len([m for m in messages if m.startswith("no answer from the metadata service")]) == 1
    assert len([m for m in messages if m.startswith("the metadata service answers again")]) == 1


def test_a_recommendation_is_told_once_and_drains_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="instdisc.spot_watch")
    drains = Drains()
    with MetadataServer("aws") as metadata, watching(metadata.url, drains, monkeypatch):
        metadata.texts["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-05T08:22:00Z"}'
        wait_for(lambda: "rebalance" in caplog.text)
        time.sleep(0.5)
    assert not drains.taken
    assert caplog.text.count("rebalance") == 1


def test_a_notice_from_the_past_still_leaves_some_seconds(monkeypatch):
    drains = Drains()
    with MetadataServer("aws") as metadata, watching(metadata.url, drains, monkeypatch):
        metadata.interrupt("terminate", time.time() - 3600)
        wait_for(lambda: drains.taken)
    assert drains.taken[0][3] == pytest.approx(time.time() + spot_watch.LEAST_NOTICE_S, abs=4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metadata-url", "169.254.169.254"], "expected http://HOST"),
        (["--metadata-url", "http://127.0.0.1:99999"], "expected http://HOST"),
        (["--poll-s", "0"], "expected seconds, more than 0"),
        (["--poll-s", "nan"], "expected seconds, more than 0"),
        (["--address", "10.255.0.1:1", "--wait-s", "0"], "no Ray node of this machine fits address 10.255.0.1:1"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
