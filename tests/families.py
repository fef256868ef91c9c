"""The processes that a process started, and the workers that the fork servers of its Ray forked for it."""

from __future__ import annotations

import contextlib

import psutil

from cluster.open_ports import environment_of
from cluster.ray_fork_server import NAME


def fork_servers(raylets: set[int]) -> list[psutil.Process]:
    """Return the fork servers of these raylets."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            raylet = environment_of(process.pid, "RAY_RAYLET_PID") if process.name() == NAME else None
            if raylet is not None and int(raylet) in raylets:
                found.append(process)
    return found


def family(pid: int) -> list[psutil.Process]:
    """Return all descendants of a process, without the process; none where it is gone."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for server in fork_servers({child.pid for child in children}):
        with contextlib.suppress(psutil.NoSuchProcess):
            children += [server, *server.children(recursive=True)]
    return children
