"""The link with a delay: its round trip, its bytes, and that nothing of it stays."""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from slow_link import Host, SlowLinkError, slow_hosts, why_not

_REASON = why_not()
pytestmark = [pytest.mark.skipif(_REASON is not None, reason=str(_REASON)), pytest.mark.timeout(60)]

TIMEOUT_S = 20.0
NUM_BYTES = 5_000_000

ECHO = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
peer, _ = server.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(64):
    peer.sendall(data)
"""
ASK = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 5000))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(9):
    started = time.perf_counter()
    peer.sendall(b"x")
    peer.recv(64)
    print(time.perf_counter() - started)
"""
RECEIVE = """
import hashlib, socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
peer, _ = server.accept()
digest = hashlib.sha256()
while data := peer.recv(1 << 20):
    digest.update(data)
print(digest.hexdigest())
"""
SEND = """
import random, socket, sys
peer = socket.create_connection((sys.argv[1], 5000))
peer.sendall(random.Random(0).randbytes(int(sys.argv[2])))
peer.shutdown(socket.SHUT_WR)
peer.recv(1)
"""


def talk(server: Host, server_code: str, client: Host, client_code: str, *arguments: str) -> tuple[str, str]:
    """Run two programs against each other and return what each printed, the server's first."""
    python = (sys.executable, "-I", "-S", "-c")
    with subprocess.Popen(server.command([*python, server_code]), stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout.readline() == "ready\n"
            asking = client.command([*python, client_code, server.address, *arguments])
            asked = subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S)
            return serving.communicate(timeout=TIMEOUT_S)[0], asked.stdout
        finally:
            serving.kill()


def packets_sent(host: Host) -> int:
    """Return TCP's own count of packets sent in a namespace: OutSegs, after segmentation, and what was sent again."""
    done = subprocess.run(host.command(["cat", "/proc/net/snmp"]), stdout=subprocess.PIPE, text=True, check=True)
    names, values = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("Tcp:"))
    found = dict(zip(names, map(int, values), strict=True))
    return found["OutSegs"] + found["RetransSegs"]


def namespaces() -> set[str]:
    """Return the names of this process's namespaces that exist."""
    return {path.name for path in Path("/run/netns").glob(f"slow{os.getpid()}-*")}


def test_a_round_trip_takes_twice_the_delay_and_bytes_arrive_whole_and_counted():
    """Tolerances: 8 ms in the median of 9; bytes between the payload and 8 % more (headers are 3.6 %)."""
    with slow_hosts(3, delay_s=0.05) as link:
        first, second, third = link.hosts
        assert namespaces() == {host.name for host in link.hosts}

        _, printed = talk(second, ECHO, third, ASK)
        assert statistics.median(map(float, printed.split())) == pytest.approx(0.1, abs=0.008)

        before_first, before_third = first.counters(), third.counters()
        digest, _ = talk(third, RECEIVE, first, SEND, str(NUM_BYTES))
        assert digest.strip() == hashlib.sha256(random.Random(0).randbytes(NUM_BYTES)).hexdigest()
        sent_bytes = first.counters()["tx_bytes"] - before_first["tx_bytes"]
        received_bytes = third.counters()["rx_bytes"] - before_third["rx_bytes"]
        assert NUM_BYTES <= sent_bytes <= 1.08 * NUM_BYTES
        assert NUM_BYTES <= received_bytes <= 1.08 * NUM_BYTES
        assert first.counters()["tx_packets"] == pytest.approx(packets_sent(first), rel=0.005)
        assert second.counters()["tx_bytes"] < 10_000, "the second host had no part in the transfer"
    assert namespaces() == set()


def test_a_rate_bounds_what_a_host_sends():
    """1 MB at 2 MB/s takes 0.5 s; the upper bound leaves room for a packet that is sent again on a busy machine."""
    with slow_hosts(2, delay_s=0.0, rate_bytes_per_s=2e6) as link:
        sender, receiver = link.hosts
        script = "import time; started = time.perf_counter()" + SEND + "print(time.perf_counter() - started)"
        _, printed = talk(receiver, RECEIVE, sender, script, "1000000")
    assert 0.5 <= float(printed) <= 2.0


def test_nothing_stays_of_hosts_whose_block_failed():
    switch_pids = []

    def fail_within() -> None:
        with slow_hosts(2, delay_s=0.0) as link:
            switch_pids.append(link.switch_pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert not Path(f"/proc/{switch_pids[0]}").exists()
    assert namespaces() == set()


def test_an_unknown_congestion_control_is_an_error_that_leaves_nothing():
    with pytest.raises(SlowLinkError, match="congctl"), slow_hosts(2, delay_s=0.0, congestion_control="none_such"):
        pass
    assert namespaces() == set()
