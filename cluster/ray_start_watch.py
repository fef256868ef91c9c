"""Watches the machines on which workers are being started: Ray itself waits for one that lost its power for 40 s."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray._private.state import state
from ray._private.worker import global_worker
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError

from cluster.ray_machines import Machine

LOOK_S = 1.0
_WORKER = "RayTrainWorker"


class StartWatch:
    """A thread that gives a start up where a machine on which a worker starts has not answered for `silence_s`.

    found: the machines that may be used. probe: returns those that do not answer. give_up: ends what starts on machines
    of these ids, and returns whether there was anything. tell: is called before with the machines' names.
    """

    def __init__(
        self,
        found: Sequence[Machine],
        silence_s: float,
        *,
        probe: Callable[[list[Machine]], set[str]],
        tell: Callable[[str], None],
        starts_on: Callable[[Collection[str]], bool] | None = None,
        give_up: Callable[[], None] | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        self._found, self._silence_s, self._probe, self._tell = list(found), silence_s, probe, tell
        self._starts_on, self._give_up = starts_on or starts_on_any, give_up or end_own_workers
        self._look_s = look_s
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="start-watch", daemon=True).start()

    def stop(self) -> None:
        """The start is over."""
        self._over.set()

    def _watch(self) -> None:
        since_s: dict[str, float] = {}
        while not self._over.wait(self._look_s):
            mute, now_s = self._probe(self._found), time.monotonic()
            since_s = {id: since_s.get(id, now_s) for id in mute}
            silent = {id for id, first_s in since_s.items() if now_s - first_s >= self._silence_s}
            try:
                if silent and self._starts_on(silent) and not self._over.is_set():
                    self._tell(f"no answer from {named(self._found, silent)} for {self._silence_s:g} s")
                    self._give_up()
                    return
            except (RayError, RuntimeError, OSError):
                continue  # the head does not say now


def named(found: Sequence[Machine], ids: Collection[str]) -> str:
    """Return the machines of these ids for a person."""
    return " and ".join(sorted(f"machine {machine.host}" for machine in found if machine.id in ids))


def starts_on_any(machine_ids: Collection[str]) -> bool:
    """Whether a worker of this process, Ray Train's controller, lives or is being started on one of these machines."""
    return any(actor.address.node_id.hex() in machine_ids for actor in _own_workers())


def end_own_workers() -> None:
    """End the workers that this process has started: what waits for them fails at once."""
    core: Any = global_worker
    for actor in _own_workers():
        core.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


def _own_workers() -> list[Any]:
    """Return the head's records of this process's workers that are not dead."""
    core: Any = global_worker
    own = core.core_worker.get_worker_id().binary()
    records = state._connect_and_get_accessor().get_actor_table(core.current_job_id, None)
    kind: Any = gcs_pb2.ActorTableData  # pyright: ignore[reportAttributeAccessIssue] - generated
    actors = [kind.FromString(record) for record in records]
    return [
        actor
        for actor in actors
        if actor.owner_address.worker_id == own and actor.state != kind.DEAD and _WORKER in actor.class_name
    ]
