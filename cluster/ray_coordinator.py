"""The coordinator of a run's checkpoints as an actor of Ray, beside the driver, where no machine is taken away."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster import patience
from cluster.coordination import CoordinatorGoneError, CoordinatorService, CoordinatorSpec, packed, unpacked

GONE_TIMEOUT_S = 120.0
"""How long calls wait for an actor that is being started again."""
CALL_TIMEOUT_S = 900.0
"""For one call; the longest is the one that waits for another driver's heartbeat, and reads an unwilling store."""
CLOSE_TIMEOUT_S = 20.0
MAX_CONCURRENCY = 32
_PAUSE_S = 0.2


class CoordinatorActor:
    """Plain class of the actor (`start_coordinator`). Ray starts it again when it dies."""

    def __init__(self, spec_json: str) -> None:
        spec = CoordinatorSpec.from_json(spec_json)
        patience.expect(spec.reached)
        self._service: CoordinatorService = spec.start()

    def answer(self, request: str) -> str:
        """See `CoordinatorService.answer`."""
        return self._service.answer(request)

    def close(self) -> None:
        """Release the run."""
        self._service.close()


def start_coordinator(spec: CoordinatorSpec) -> Any:
    """Start the actor beside the driver, and return its handle."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    options: dict[str, Any] = {"num_cpus": 0, "label_selector": here, "max_restarts": -1}
    actor = ray.remote(CoordinatorActor).options(max_concurrency=MAX_CONCURRENCY, **options)
    return actor.remote(spec.to_json())


def close_coordinator(actor: Any) -> None:
    """Let the actor release the run, and end it."""
    with contextlib.suppress(RayError):  # its heartbeat stops with it
        ray.get(actor.close.remote(), timeout=CLOSE_TIMEOUT_S)
    ray.kill(actor)


class RayCoordination:
    """Calls the actor from a worker. Safe in threads; calls are repeated while the actor is started again."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, **arguments: Any) -> Any:
        """See `coordination.Coordination.call`."""
        request = packed(method, arguments)
        deadline: float | None = None
        while True:
            try:
                return unpacked(ray.get(self._actor.answer.remote(request), timeout=CALL_TIMEOUT_S))
            except RayError as error:
                # From the first failure: the call itself may have been at work for long.
                deadline = deadline or time.monotonic() + GONE_TIMEOUT_S
                if time.monotonic() > deadline or isinstance(error, GetTimeoutError):
                    raise CoordinatorGoneError(
                        f"the coordinator's actor does not answer for {GONE_TIMEOUT_S:.0f} s: {error}"
                    ) from error
                time.sleep(_PAUSE_S)
