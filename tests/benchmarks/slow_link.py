"""Hosts on one machine with a slow link between them: network namespaces joined by a switch that delays packets.

    with slow_hosts(3, delay_s=0.05) as link:
        subprocess.run(link.hosts[0].command(["ping", "-c", "3", link.hosts[1].address]))

For kernels without sch_netem. Each host is a network namespace with one TUN device; the switch is a process of its own
(this file as a script) that holds every packet for the delay. TCP crosses as the kernel's segments of up to 64 KiB with
their virtio header, so one read moves what would be 45 packets of 1,500 bytes; the counters count those 45.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import mmap
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

INTERFACE = "link0"
# A namespace has no network but ours, so nothing can collide with it, a second `slow_hosts` neither.
SUBNET = (10, 77, 201)
MAX_HOSTS = 254
# With a rate, a sender's packets wait at most this long for their turn, as in a router; later ones are lost.
MAX_WAIT_S = 0.2
# A window must hold rate times round trip; the distributions' 4 MiB of send buffer end at 40 MB/s and 0.1 s.
SOCKET_BUFFER_BYTES = 64 << 20
# In segments of up to 64 KiB: more than any window sends while the switch is not scheduled.
QUEUED_PACKETS = 10_000
STOP_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 10.0

COUNTERS = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
# linux/virtio_net.h: struct virtio_net_hdr is u8 flags, u8 gso_type, u16 hdr_len, gso_size, csum_start, csum_offset.
_VNET_BYTES = 10
_READ_BYTES = _VNET_BYTES + 65_536
# Reads of one sender before the others and the packets that are due have their turn.
_READS_IN_A_ROW = 64


class SlowLinkError(RuntimeError):
    """A namespace could not be made, or the switch did not live as long as its hosts."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace that stands for a host."""

    name: str
    """The namespace, as in `ip netns exec NAME`."""
    address: str
    """Its IPv4 address on the link."""
    interface: str
    """Its device on the link, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""
    rank: int
    _counts: mmap.mmap = field(repr=False)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on this host. It sees a /sys of its own, without cgroups."""
        return ["ip", "netns", "exec", self.name, *argv]

    def counters(self) -> dict[str, int]:
        """Return tx_bytes, rx_bytes (IP packets with headers) and tx_packets, rx_packets since the start.

        Counted by the switch: sent when it takes a packet, received when it delivers it. They stay readable after
        `slow_hosts` has ended. The kernel's own statistics of the device count a segment of 64 KiB as one packet.
        """
        values = _counts_of(self._counts)[4 * self.rank : 4 * self.rank + 4]
        return dict(zip(COUNTERS, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class SlowLink:
    """Hosts, and the switch between them."""

    hosts: list[Host]
    switch_pid: int


def why_not() -> str | None:
    """Return why `slow_hosts` cannot run here, None where it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in ("ip", "sysctl") if shutil.which(command) is None]
    if missing:
        return f"commands not found: {', '.join(missing)}"
    try:
        os.close(_open_tun()[0])
        with ExitStack() as stack:
            _add_namespace(f"slow{os.getpid()}-{secrets.token_hex(2)}-probe", stack)
    except (OSError, SlowLinkError) as error:
        return f"no TUN device or network namespace can be made: {error}"
    return None


@contextmanager
def slow_hosts(
    num_hosts: int,
    *,
    delay_s: float,
    rate_bytes_per_s: float | None = None,
    mtu_bytes: int = 1500,
    keep_window: bool = False,
    congestion_control: str = "cubic",
) -> Iterator[SlowLink]:
    """Yield hosts whose packets to one another take `delay_s` (one way), in order; all is removed on leaving.

    `rate_bytes_per_s` limits what each host sends; packets that would wait longer than MAX_WAIT_S for it are lost.
    `mtu_bytes` is the size of an IP packet, 1,500 as on Ethernet.
    `keep_window` lets TCP keep its window over idle times, as tuned clusters do; it makes no difference to bbr, which
    paces. `congestion_control` is one of net.ipv4.tcp_available_congestion_control. A run that is killed leaves names
    in /run/netns and nothing else: they carry its process id.

    Raises ValueError for impossible arguments, SlowLinkError where a namespace cannot be made (see `why_not`) or the
    switch has ended early, OSError without /dev/net/tun.
    """
    _check(num_hosts, delay_s, rate_bytes_per_s)
    settings = _tcp_settings(keep_window)
    prefix = f"slow{os.getpid()}-{secrets.token_hex(2)}"
    with ExitStack() as stack:
        counts_fd = os.memfd_create("slow_link_counts")
        tun_fds: list[int] = []
        stack.callback(lambda: [os.close(fd) for fd in (counts_fd, *tun_fds)])
        os.ftruncate(counts_fd, 4 * 8 * num_hosts)
        counts = mmap.mmap(counts_fd, 0)
        hosts = []
        for rank in range(num_hosts):
            name, address = f"{prefix}-{rank}", ".".join(map(str, _address(rank)))
            _add_namespace(name, stack)
            tun_fd, device = _open_tun()
            tun_fds.append(tun_fd)
            _connect(name, device, address, mtu_bytes, congestion_control, settings)
            hosts.append(Host(name=name, address=address, interface=INTERFACE, rank=rank, _counts=counts))
        with _switch(tun_fds, counts_fd, delay_s, rate_bytes_per_s) as switch_pid:
            yield SlowLink(hosts=hosts, switch_pid=switch_pid)


def _check(num_hosts: int, delay_s: float, rate_bytes_per_s: float | None) -> None:
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise ValueError(f"num_hosts is {num_hosts}; one subnet holds 1 to {MAX_HOSTS}")
    if not 0 <= delay_s < float("inf"):
        raise ValueError(f"delay_s is {delay_s}; give seconds, 0 or more")
    if rate_bytes_per_s is not None and not rate_bytes_per_s > 0:
        raise ValueError(f"rate_bytes_per_s is {rate_bytes_per_s}; give a positive rate, or None for no limit")


def _tcp_settings(keep_window: bool) -> dict[str, str]:
    """Return values of net.ipv4 for a namespace."""
    return {
        "tcp_slow_start_after_idle": str(int(not keep_window)),
        # No metrics of past connections: they would make a later trial differ from the first.
        "tcp_no_metrics_save": "1",
        "tcp_rmem": f"4096 131072 {SOCKET_BUFFER_BYTES}",
        "tcp_wmem": f"4096 16384 {SOCKET_BUFFER_BYTES}",
    }


def _address(rank: int) -> tuple[int, int, int, int]:
    return (*SUBNET, rank + 1)


def _counts_of(counts: mmap.mmap) -> memoryview:
    """Return the counters of all hosts, uint64 of shape (num_hosts * 4,), in the order of COUNTERS."""
    return memoryview(counts).cast("Q")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise SlowLinkError(f"`ip {' '.join(arguments)}` ended with {done.returncode}: {done.stderr.strip()}")


def _add_namespace(name: str, stack: ExitStack) -> None:
    """Make a namespace that goes with the stack."""
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)


def _open_tun() -> tuple[int, str]:
    """Return a new TUN device of this namespace as (file descriptor, name); it lives as long as the descriptor."""
    tun_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", b"slow%d", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        name = struct.unpack("16sH22x", fcntl.ioctl(tun_fd, _TUNSETIFF, request))[0].rstrip(b"\0").decode()
        fcntl.ioctl(tun_fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    except OSError:
        os.close(tun_fd)
        raise
    return tun_fd, name


def _connect(
    namespace: str, device: str, address: str, mtu_bytes: int, congestion_control: str, settings: dict[str, str]
) -> None:
    """Move a TUN device into a namespace and bring both up. The descriptor keeps working from here."""
    _ip("link", "set", device, "netns", namespace, "name", INTERFACE)
    link = ("-n", namespace, "link", "set", INTERFACE)
    # No IPv6 address of its own: a library that prefers IPv6 would find one that leads nowhere.
    _ip(*link, "mtu", str(mtu_bytes), "txqueuelen", str(QUEUED_PACKETS), "addrgenmode", "none")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE, "noprefixroute")
    _ip("netns", "exec", namespace, "sysctl", "-qw", *(f"net.ipv4.{key}={value}" for key, value in settings.items()))
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip(*link, "up")
    # By the route: as a namespace's default (sysctl) the kernel refuses what is not its own default or reno.
    subnet = f"{'.'.join(map(str, SUBNET))}.0/24"
    _ip("-n", namespace, "route", "add", subnet, "dev", INTERFACE, "src", address, "congctl", congestion_control)


@contextmanager
def _switch(tun_fds: list[int], counts_fd: int, delay_s: float, rate_bytes_per_s: float | None) -> Iterator[int]:
    """Run the switch and yield its process id. It ends when its standard input does, so also when we are killed."""
    command = [sys.executable, "-I", "-S", __file__, "--delay", repr(delay_s), "--counts", str(counts_fd)]
    command += ["--rate", repr(rate_bytes_per_s)] if rate_bytes_per_s is not None else []
    command += ["--tun", *map(str, tun_fds)]
    fds = (*tun_fds, counts_fd)
    # A process group of its own, so that a Ctrl-C which the hosts' programs survive does not take their link.
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds, process_group=0) as switch:
        try:
            yield switch.pid
            if switch.poll() is not None:
                raise SlowLinkError(f"The switch ended early with {switch.returncode}; its reason is on standard error")
        finally:
            switch.stdin.close()
            try:
                switch.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                switch.kill()


@dataclass(kw_only=True)
class _Sender:
    """What the switch holds of one host's packets."""

    tun_fd: int
    free_at_s: float = 0.0
    """When the packets taken so far have left at the rate."""
    waiting: deque[tuple[float, int, int, int, bytes]] = field(default_factory=deque)
    """(due_s, receiver's rank, size in bytes, size in packets, packet), the earliest first."""


class _Switch:
    """Takes packets from the TUN devices and delivers them after the delay."""

    def __init__(self, tun_fds: list[int], counts: memoryview, delay_s: float, rate_bytes_per_s: float | None) -> None:
        self._senders = [_Sender(tun_fd=tun_fd) for tun_fd in tun_fds]
        self._rank_of = {bytes(_address(rank)): rank for rank in range(len(tun_fds))}
        self._by_fd = dict(zip(tun_fds, range(len(tun_fds)), strict=True))
        self._counts = counts
        self._delay_s = delay_s
        self._rate_bytes_per_s = rate_bytes_per_s

    def run(self, stop_fd: int) -> None:
        """Forward until `stop_fd` is readable, which its end makes it."""
        fds = [*self._by_fd, stop_fd]
        while True:
            # select rather than epoll: its timeout is in microseconds, not whole milliseconds.
            readable = select.select(fds, [], [], self._pause_s())[0]
            if stop_fd in readable:
                return
            for tun_fd in readable:
                self._take(self._by_fd[tun_fd])
            for sender in self._senders:
                self._deliver(sender)

    def _pause_s(self) -> float | None:
        """Return how long no packet is due, None where none is waiting."""
        due_s = min((sender.waiting[0][0] for sender in self._senders if sender.waiting), default=None)
        return None if due_s is None else max(0.0, due_s - time.monotonic())

    def _take(self, rank: int) -> None:
        """Read what one host has sent."""
        sender = self._senders[rank]
        for _ in range(_READS_IN_A_ROW):
            try:
                packet = os.read(sender.tun_fd, _READ_BYTES)
            except BlockingIOError:
                return
            num_bytes, num_packets = _size_on_the_wire(packet)
            self._count(rank, 0, num_bytes, num_packets)
            # The destination of an IPv4 header; multicast and anything else has no receiver here.
            receiver = self._rank_of.get(packet[_VNET_BYTES + 16 : _VNET_BYTES + 20])
            sent_s = self._sent_s(sender, num_bytes)
            if receiver is not None and sent_s is not None:
                sender.waiting.append((sent_s + self._delay_s, receiver, num_bytes, num_packets, packet))

    def _sent_s(self, sender: _Sender, num_bytes: int) -> float | None:
        """Return when the sender's rate lets the packet go, None where it is lost."""
        now_s = time.monotonic()
        if self._rate_bytes_per_s is None:
            return now_s
        begins_s = max(now_s, sender.free_at_s)
        if begins_s - now_s > MAX_WAIT_S:
            return None
        sender.free_at_s = begins_s + num_bytes / self._rate_bytes_per_s
        return sender.free_at_s

    def _deliver(self, sender: _Sender) -> None:
        """Write what is due of one host's packets."""
        now_s = time.monotonic()
        while sender.waiting and sender.waiting[0][0] <= now_s:
            _, receiver, num_bytes, num_packets, packet = sender.waiting.popleft()
            try:
                os.write(self._senders[receiver].tun_fd, packet)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                continue  # The interface is down: the packet is lost, as it is on a wire.
            self._count(receiver, 1, num_bytes, num_packets)

    def _count(self, rank: int, direction: int, num_bytes: int, num_packets: int) -> None:
        self._counts[4 * rank + direction] += num_bytes
        self._counts[4 * rank + 2 + direction] += num_packets


def _size_on_the_wire(packet: bytes) -> tuple[int, int]:
    """Return (bytes, packets) that a device without segmentation offload would send for this IPv4 packet."""
    num_bytes = len(packet) - _VNET_BYTES
    gso_type, gso_size = packet[1], packet[4] | packet[5] << 8
    if gso_type == 0:
        return num_bytes, 1
    # hdr_len of the virtio header is a hint only, so: 32-bit words of the IP header, then of the TCP header.
    ip_bytes = 4 * (packet[_VNET_BYTES] & 15)
    header_bytes = ip_bytes + 4 * (packet[_VNET_BYTES + ip_bytes + 12] >> 4)
    num_packets = -(-(num_bytes - header_bytes) // gso_size)
    return num_bytes + (num_packets - 1) * header_bytes, num_packets


def _main() -> None:
    """Be the switch."""
    parser = argparse.ArgumentParser(description="The switch of slow_hosts, on descriptors that it inherits.")
    parser.add_argument("--delay", type=float, required=True)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--counts", type=int, required=True)
    parser.add_argument("--tun", type=int, nargs="+", required=True)
    chosen = parser.parse_args()
    # Before the hosts' own work on the same cores: a late switch is a slower link.
    with suppress(PermissionError):
        os.nice(-10)
    counts = _counts_of(mmap.mmap(chosen.counts, 0))
    _Switch(chosen.tun, counts, chosen.delay, chosen.rate).run(sys.stdin.fileno())


if __name__ == "__main__":
    _main()
