"""The Ray nodes (raylets) that run on this machine, read from their command lines: no Ray is imported or asked."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


class NoSuchRaylet(ValueError):
    """No raylet of this machine is the one that is meant."""


class AmbiguousRaylet(NoSuchRaylet):
    """Several raylets of this machine may be meant."""


@dataclass(frozen=True)
class Raylet:
    """A running raylet. gcs_address: host:port of its cluster's head; node_id: 56 hexadecimal digits."""

    pid: int
    started: str
    """See `started_at`: with the pid it names a process for good."""
    node_id: str
    node_ip: str
    gcs_address: str

    def is_running(self) -> bool:
        """Whether this very process is still there."""
        return started_at(self.pid) == self.started

    def __str__(self) -> str:
        return f"node {self.node_id[:12]}… at {self.node_ip} of the cluster {self.gcs_address} (pid {self.pid})"


def local_raylets() -> list[Raylet]:
    """Return the raylets that run on this machine, as far as this user may look at them."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        arguments = command_line(int(folder.name))
        if not arguments or os.path.basename(arguments[0]) != "raylet":
            continue
        given = dict(argument[2:].split("=", 1) for argument in arguments[1:] if "=" in argument)
        started = started_at(int(folder.name))
        if started and "node_id" in given and "gcs-address" in given:
            address = (given["node_id"], given.get("node_ip_address", ""), given["gcs-address"])
            found.append(Raylet(int(folder.name), started, *address))
    return sorted(found, key=lambda raylet: raylet.pid)


def choose_raylet(
    raylets: list[Raylet], address: str | None, node_id: str | None = None, node_ip: str | None = None
) -> Raylet:
    """Return the one raylet that fits what is given.

    Raises:
        NoSuchRaylet: none fits; AmbiguousRaylet, one of its kinds: several do.
    """
    fitting = [
        raylet
        for raylet in raylets
        if (address is None or _same_place(raylet.gcs_address, address))
        and (node_id is None or raylet.node_id == node_id)
        and (node_ip is None or raylet.node_ip == node_ip)
    ]
    if len(fitting) == 1:
        return fitting[0]
    wanted = {"address": address, "node id": node_id, "node IP": node_ip}
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None) or "any cluster"
    if fitting:
        raise AmbiguousRaylet(
            f"{len(fitting)} Ray nodes run on this machine for {asked}, expected one: give --node-id (or --node-ip) of "
            f"one of {'; '.join(map(str, fitting))}"
        )
    there = "; ".join(map(str, raylets)) or "none at all"
    raise NoSuchRaylet(f"no Ray node of this machine fits {asked}; found {there}. Run `ray start` first")


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process, [] where it is gone or may not be looked at."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def started_at(pid: int) -> str | None:
    """Return when a process was started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _same_place(left: str, right: str) -> bool:
    if left == right:
        return True
    (left_host, _, left_port), (right_host, _, right_port) = left.rpartition(":"), right.rpartition(":")
    if left_port != right_port:
        return False
    try:
        return socket.gethostbyname(left_host) == socket.gethostbyname(right_host)
    except OSError:
        return False
