"""A parallel map over the cores of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.interrupts import Interrupts
from cluster.ray_session import ray_session

_TASKS_PER_CORE = 2


@dataclass(frozen=True)
class RayMap:
    """Calls a function in tasks of the cluster at `address`: `RayMap("auto")(function, items)`."""

    address: str | None
    """host:port or "auto"; None: RAY_ADDRESS, else a Ray of our own on this machine."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield function(item) for all items, as they are done; few items are alive at a time.

        A task whose machine is lost runs again elsewhere. What the function raises ends the map. Raises
        KeyboardInterrupt at Ctrl-C.
        """
        with Interrupts(), ray_session(self.address, 1, True):
            remote = ray.remote(num_cpus=1, max_retries=-1)(function)
            left = iter(items)
            waiting: list[Any] = []
            try:
                while True:
                    # The cluster may have grown since, or lost a machine: then more tasks wait than it has cores for.
                    most = max(1, int(_TASKS_PER_CORE * ray.cluster_resources().get("CPU", 1)))
                    waiting += [remote.remote(item) for item in islice(left, max(0, most - len(waiting)))]
                    if not waiting:
                        return
                    done, waiting = ray.wait(waiting, timeout=1.0)
                    for reference in done:
                        yield _result(reference)
            finally:
                for reference in waiting:
                    ray.cancel(reference, force=True)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
