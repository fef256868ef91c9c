"""The actor through which the driver and the workers of a Ray run talk: events, failures, the wish to stop."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.failures import Failure
from cluster.outbox import Outbox


class Mailbox:
    """Plain class of the actor (`start_mailbox`); its methods never wait, except those that say so."""

    def __init__(self):
        self._outbox = Outbox()
        self._failures: list[Failure] = []
        self._stop = asyncio.Event()
        self._rendezvous = asyncio.Event()
        self._address = ("", 0)
        self._controller: Any = None

    async def put(self, event: str) -> None:
        """A worker's event, as JSON text."""
        self._outbox.put(event)

    async def flush(self) -> None:
        """Return when everything that the caller sent before has arrived."""

    async def fail(self, failure: Failure) -> None:
        """What a worker raised."""
        self._failures.append(failure)

    async def take(self) -> tuple[list[str], list[Failure]]:
        """The events since the last call, and all failures so far."""
        return self._outbox.take_all(), self._failures

    async def controller_started(self, controller: Any) -> None:
        """The handle of the actor in which Ray Train runs its loop; Ray Train itself does not hand it out."""
        self._controller = controller

    async def controller(self) -> Any:
        """What `controller_started` was told; None before."""
        return self._controller

    async def request_stop(self) -> None:
        """The driver was asked to end the run in an orderly way."""
        self._stop.set()

    async def wait_for_stop(self) -> bool:
        """Wait until a stop is requested."""
        await self._stop.wait()
        return True

    async def open_rendezvous(self, host: str, port: int) -> None:
        """Rank 0 says where its TCP store listens."""
        self._address = (host, port)
        self._rendezvous.set()

    async def rendezvous(self) -> tuple[str, int]:
        """Wait until rank 0's TCP store listens, and return its host and port."""
        await self._rendezvous.wait()
        return self._address


def start_mailbox() -> Any:
    """Start the actor beside the driver: it must not sit on a machine that can be taken away."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(Mailbox).options(num_cpus=0, label_selector=here).remote()


class StopFlag:
    """A worker's view of `wait_for_stop`: one call is always under way, so asking costs no message."""

    def __init__(self, mailbox: Any):
        self._answer = mailbox.wait_for_stop.remote()
        self._stop = False

    def poll(self) -> bool:
        """Whether a stop is requested; does not wait."""
        if not self._stop and self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if ready:
                try:
                    self._stop = bool(ray.get(self._answer))
                except RayError:  # the driver is gone, and Ray is about to end this process
                    self._answer = None
        return self._stop
