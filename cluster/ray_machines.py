"""The machines of a Ray cluster as whoever places workers sees them: who is there, who leaves, how many workers fit."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PROBE_TIMEOUT_S = 2.0
_MOST_PROBES = 32


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of Ray that the head believes to be alive.

    total, free: its resources, and those of them that nobody uses. leaves_at: it is being drained, and will be gone at
    this time in seconds since 1970, 0 if nobody said when; None if it stays.
    """

    id: str
    host: str
    port: int
    total: Mapping[str, float]
    free: Mapping[str, float]
    leaves_at: float | None = None


def machines() -> list[Machine]:
    """Return the machines that the head believes to be alive; of one that is gone it takes a while to know."""
    free, draining = state.available_resources_per_node(), state.get_draining_nodes() or {}
    return [
        Machine(
            id=node["NodeID"],
            host=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            leaves_at=draining[node["NodeID"]] / 1000 if node["NodeID"] in draining else None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def silent(found: Sequence[Machine]) -> set[str]:
    """Return the ids of machines on which no Ray answers now: dead, or cut off from here."""
    if not found:
        return set()
    with ThreadPoolExecutor(min(_MOST_PROBES, len(found)), thread_name_prefix="probe") as pool:
        return {machine.id for machine, answers in zip(found, pool.map(_answers, found), strict=True) if not answers}


def _answers(machine: Machine) -> bool:
    try:
        socket.create_connection((machine.host, machine.port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def prepare(runtime_env: Mapping[str, Any], machine_id: str) -> None:
    """Start a process with this runtime environment on a machine, and with it the fork server; do not wait for it."""
    place = NodeAffinitySchedulingStrategy(machine_id, soft=False)
    options: Any = {"runtime_env": dict(runtime_env), "scheduling_strategy": place, "num_cpus": 0, "max_retries": 0}
    ray.remote(**options)(_nothing).remote()


def _nothing() -> None: ...


def room(
    found: Sequence[Machine], without: Collection[str], need: Mapping[str, float], own: Mapping[str, int], most: int
) -> int:
    """Return how many workers fit, at most `most`, on machines that stay.

    without: ids of machines that do not count. need: resources of one worker. own: by id of a machine, the workers
    that are there now and will end before new ones start.
    """
    needed = {name: amount for name, amount in need.items() if amount > 0}
    if not needed:
        return most
    total = 0
    for machine in found:
        if machine.leaves_at is None and machine.id not in without:
            mine = own.get(machine.id, 0)
            total += min(
                int((min(machine.free.get(name, 0.0) + mine * amount, machine.total.get(name, 0.0)) + 1e-6) // amount)
                for name, amount in needed.items()
            )
    return min(total, most)
