"""Which TCP ports the processes of Ray and of our runs listen on, on this machine: read from /proc."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.local_raylets import command_line

_LISTEN = "0A"
_RAY_PARTS = re.compile(r"/ray/(dashboard|_private|autoscaler|core|util)/|ray\.util\.client\.server")
_OURS = re.compile(r"^(instdisc|rank-\d+|fork-server)$")  # as they call themselves: see process_name.py


@dataclass(frozen=True)
class OpenPort:
    """A TCP port on which a process listens. role: what the process is for; host: an address, IPv4 where it is one."""

    pid: int
    role: str
    host: str
    port: int

    def is_loopback(self) -> bool:
        """Whether only processes of this machine reach it."""
        return ipaddress.ip_address(self.host).is_loopback


def ray_processes() -> dict[int, str]:
    """Return the processes of Ray and of our runs by pid, with what each is for."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            role = _role(command_line(int(folder.name)), _text(folder / "comm").strip())
            if role:
                found[int(folder.name)] = role
    return found


def open_ports(processes: dict[int, str]) -> list[OpenPort]:
    """Return the ports on which these processes listen, as far as this user may look at them; one of a socket each."""
    found = {}
    for pid, role in sorted(processes.items()):
        listening = dict(_listening(pid))
        for inode in _sockets(pid):
            if inode in listening:
                found.setdefault(inode, OpenPort(pid, role, *listening[inode]))  # forked children hold it as well
    return sorted(found.values(), key=lambda port: (port.port, port.host))


def environment_of(pid: int, name: str) -> str | None:
    """Return one environment variable that a process was started with; None where it is not set, or not to be seen."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{name}=".encode()
    return next((e[len(prefix) :].decode(errors="replace") for e in entries if e.startswith(prefix)), None)


def _role(arguments: list[str], comm: str) -> str | None:
    if not arguments:
        return None
    first = os.path.basename(arguments[0].split(" ")[0])
    if first in ("raylet", "gcs_server"):
        return first
    if arguments[0].startswith(("ray::", "ray-dashboard")):
        return arguments[0].split("(")[0].strip()
    if _OURS.match(comm):
        return comm
    line = " ".join(arguments[:4])  # further arguments of others may name anything
    if _RAY_PARTS.search(line):
        script = next((a for a in arguments[1:4] if a.endswith(".py") or "." in a), arguments[0])
        return os.path.basename(script)
    return None


def _listening(pid: int) -> Iterator[tuple[str, tuple[str, int]]]:
    """Socket inode and (host, port) of everything that listens in the network namespace of a process."""
    for name in ("tcp", "tcp6"):
        for line in _text(Path(f"/proc/{pid}/net/{name}")).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN:
                host, _, port = fields[1].partition(":")
                yield fields[9], (_host(host), int(port, 16))


def _host(digits: str) -> str:
    """An address as /proc shows it: words of 32 bits in the machine's byte order."""
    address = ipaddress.ip_address(b"".join(bytes.fromhex(digits[n : n + 8])[::-1] for n in range(0, len(digits), 8)))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _sockets(pid: int) -> Iterator[str]:
    try:
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return
    for entry in entries:
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
