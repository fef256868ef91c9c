"""The actor through which the driver, Ray Train's controller and the workers of a run talk.

Events, failures, where the ranks of a group of workers find each other, the wish to stop, and that a group shall leave.
Workers come in groups: when one is gone, Ray Train starts another; what belongs to one is forgotten with it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterable
from dataclasses import asdict
from enum import Enum
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from cluster.failures import Failure
from cluster.outbox import Outbox
from cluster.worker import BEGAN, Cause

MOST_EARLY = 256
MOST_CALLS = 1_000_000
"""At the same time. Each worker has a call waiting for as long as it lives; Ray's own limit is 1,000, beyond which
nobody would be answered any more."""


class Order(Enum):
    """What workers are asked for: each saves a checkpoint first."""

    STOP = "return"
    LEAVE = "raise Preempted: another group goes on"


class _Group:
    """What is known of one group of workers."""

    def __init__(self, number: int, cause: Cause) -> None:
        self.number, self.cause = number, cause
        self.failures: list[Failure] = []
        self.silence = ""
        self.found = asyncio.Event()
        self.address: tuple[str, int] = ("", 0)
        self.order: Order | None = None
        self.ordered = asyncio.Event()


class _InOrder:
    """A sender's events: Ray hands messages to an actor in any order."""

    def __init__(self) -> None:
        self.next = 0
        self._early: dict[int, str] = {}

    def put(self, number: int, event: str, outbox: Outbox) -> None:
        self._early[number] = event
        if len(self._early) > MOST_EARLY:
            self.next = min(self._early)  # the ones before were lost with a connection
        while self.next in self._early:
            outbox.put(self._early.pop(self.next))
            self.next += 1


class Mailbox:
    """Plain class of the actor (`start_mailbox`); its methods never wait, except those that say so."""

    def __init__(self):
        self._outbox = Outbox()
        self._posted: dict[str, _InOrder] = {}
        self._arrived = asyncio.Condition()
        self._group = _Group(0, Cause())
        self._next_cause = Cause()
        self._is_stopping = False
        self._controller: Any = None
        self._newest: list[int] | None = None
        self._num_fruitless = 0
        self._reached: set[str] = set()

    async def put(self, sender: str, number: int, event: str) -> None:
        """A sender's event number 0, 1, … for the driver, as JSON text; see `Post`."""
        self._posted.setdefault(sender, _InOrder()).put(number, event, self._outbox)
        async with self._arrived:
            self._arrived.notify_all()

    async def flush(self, sender: str, num_sent: int) -> None:
        """Wait until so many events of a sender have arrived."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: num_sent == 0 or self._num_arrived(sender) >= num_sent)

    def _num_arrived(self, sender: str) -> int:
        return self._posted[sender].next if sender in self._posted else 0

    async def take(self) -> list[str]:
        """The events since the last call."""
        return self._outbox.take_all()

    async def open_group(self) -> int:
        """A group of workers is about to be started, for the cause that was announced last; returns its number."""
        self._group.order = self._group.order or Order.LEAVE  # one that still lives, cut off, need not go on
        self._group.ordered.set()
        self._group = _Group(self._group.number + 1, self._next_cause)
        self._next_cause = Cause()
        self._outbox.put(json.dumps({"kind": BEGAN, "has_begun": False, "keep": True}))
        if self._is_stopping:
            self._give(Order.STOP)
        return self._group.number

    async def group(self) -> tuple[int, dict[str, Any]]:
        """A worker asks for the number of the group that is being started and for its `Cause`."""
        return self._group.number, asdict(self._group.cause)

    async def announce(self, cause: dict[str, Any]) -> None:
        """Why the next group will be started, a `Cause`."""
        self._next_cause = Cause(**cause)

    async def reach(self, kinds: Iterable[str]) -> None:
        """Storages of these kinds answered the driver or a worker of this run; see `patience.expect`."""
        self._reached.update(kinds)

    async def reached(self) -> list[str]:
        """What `reach` was told so far."""
        return sorted(self._reached)

    async def count_restart(self, newest: list[int] | None) -> int:
        """A restart, when this is the newest checkpoint (None: none, or not known); return the number of restarts in a
        row without a newer one.
        """
        has_newer = newest is not None and newest != self._newest
        self._num_fruitless = 1 if has_newer else self._num_fruitless + 1
        self._newest = newest or self._newest
        return self._num_fruitless

    async def fail(self, group: int, failure: Failure) -> None:
        """What a worker of a group raised."""
        if group == self._group.number:
            self._group.failures.append(failure)

    async def failures(self) -> list[Failure]:
        """What workers of the present group raised so far, in order of arrival."""
        return self._group.failures

    async def fell_silent(self, text: str) -> None:
        """A machine on which the present group is being started does not answer: which one, in words."""
        self._group.silence = text

    async def silence(self) -> str:
        """What `fell_silent` was told of the present group, "" if nothing."""
        return self._group.silence

    async def controller_started(self, controller: Any) -> None:
        """The handle of the actor in which Ray Train runs its loop; Ray Train itself does not hand it out."""
        self._controller = controller

    async def controller(self) -> Any:
        """What `controller_started` was told; None before."""
        return self._controller

    async def request_stop(self) -> None:
        """The driver was asked to end the run in an orderly way."""
        self._is_stopping = True
        self._give(Order.STOP)

    async def request_leave(self) -> None:
        """The present group shall leave."""
        self._give(Order.LEAVE)

    async def wait_for_order(self, group: int) -> Order:
        """Wait until a group gets an order, and return it."""
        if group != self._group.number:
            return Order.LEAVE
        waiting = self._group
        await waiting.ordered.wait()
        assert waiting.order is not None
        return waiting.order

    async def open_rendezvous(self, group: int, host: str, port: int) -> None:
        """A group's rank 0 says where its TCP store listens."""
        if group == self._group.number:
            self._group.address = (host, port)
            self._group.found.set()

    async def rendezvous(self, group: int) -> tuple[str, int]:
        """Wait until a group's TCP store listens, and return its host and port."""
        waiting = self._group
        if group != waiting.number:
            raise LookupError(f"the group {group} of workers was replaced by group {waiting.number}")
        await waiting.found.wait()
        return waiting.address

    def _give(self, order: Order) -> None:
        if self._group.order is None:
            self._group.order = order
            self._group.ordered.set()


def start_mailbox() -> Any:
    """Start the actor beside the driver: it must not sit on a machine that can be taken away."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(Mailbox).options(num_cpus=0, label_selector=here, max_concurrency=MOST_CALLS).remote()


class Post:
    """Sends events to the driver without waiting, from any thread; they arrive in order."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._sender, self._num_sent = uuid4().hex, 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Post], tuple[Any]]:
        return Post, (self._mailbox,)

    def send(self, event: str) -> None:
        """Send an event, as JSON text."""
        with self._lock:
            self._mailbox.put.remote(self._sender, self._num_sent, event)
            self._num_sent += 1

    def tell(self, text: str) -> None:
        """Send a message for a person."""
        self.send(json.dumps({"kind": "message", "text": text, "keep": True}))

    def flush(self, timeout_s: float) -> None:
        """Wait until everything that was sent has arrived."""
        ray.get(self._mailbox.flush.remote(self._sender, self._num_sent), timeout=timeout_s)


class Orders:
    """A worker's view of `wait_for_order`: one call is always under way, so asking costs no message."""

    def __init__(self, mailbox: Any, group: int):
        self._answer = mailbox.wait_for_order.remote(group)
        self._order: Order | None = None

    def poll(self) -> Order | None:
        """The order that was given, if there is one; does not wait."""
        if self._order is None and self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if ready:
                try:
                    self._order = ray.get(self._answer)
                except RayError:  # the driver is gone, and Ray is about to end this process
                    self._answer = None
        return self._order

    def must_stop(self) -> bool:
        """Whether the run is to end in an orderly way."""
        return self.poll() is Order.STOP

    def must_leave(self) -> bool:
        """Whether this group of workers is to leave."""
        return self.poll() is Order.LEAVE
