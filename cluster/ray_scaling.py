"""How many workers run, and where: Ray Train's controller asks at each look; this decides.

A group of workers has a fixed size. To change it, because a machine is about to be taken away or because there is room
for more, the group is asked to leave: all ranks save after the same step and raise `Preempted`, and the next group is
as large as the machines then there allow. A group with a machine that answers no more is replaced at once.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import ScalingConfig

from cluster.ray_machines import Machine, machines, room, silent
from cluster.ray_mailbox import Post
from cluster.ray_restart_limit import RestartLimit
from cluster.ray_start_watch import StartWatch, named
from cluster.worker import Cause
from cluster.worker_range import WorkerRange

MAILBOX_TIMEOUT_S = 30.0
WAIT_S = 0.5
"""Between two looks while there is no group."""
TELL_S = 30.0
PREPARE_AGAIN_S = 40.0
"""After which a machine that still waits for its first worker is prepared again; less than a fork server's `IDLE_S`."""
RELEASE_S = 3.0
"""After which a group that nobody saw running is taken to hold the room that is missing."""


class GroupSizing(ScalingPolicy):
    """Sizes groups of workers. Lives in Ray Train's controller.

    asks_for_machines: whether to tell the cluster's autoscaler how much room `most` workers need. prepare: called with
    the ids of machines that may get workers later, so that these start sooner then. limit: counts the groups that are
    replaced because a machine is silent.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        workers: WorkerRange,
        mailbox: Any,
        *,
        asks_for_machines: bool,
        prepare: Callable[[str], None] | None = None,
        limit: RestartLimit | None = None,
        look: Callable[[], list[Machine]] = machines,
        probe: Callable[[list[Machine]], set[str]] = silent,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(scaling_config)
        self._workers, self._mailbox, self._asks = workers, mailbox, asks_for_machines
        self._look, self._probe, self._clock, self._sleep = look, probe, clock, sleep
        self._post, self._prepare = Post(mailbox), prepare
        self._limit = limit or RestartLimit(mailbox, None)
        self._prepared_s: dict[str, float] = {}
        self._own: Counter[str] = Counter()
        self._shunned: list[str] = []
        self._found: list[Machine] = []
        self._watch: StartWatch | None = None
        self._may_hold_room = self._was_started = self._is_leaving = False
        self._best_room, self._best_since_s = 0, 0.0
        self._ended_s: float | None = None
        self._group_since_s = self._told_s = -float("inf")
        self._silent_since_s: dict[str, float] = {}

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many workers as fit, once there is room for the least number of them."""
        self._end_watch()
        self._ask_for_machines()
        now_s = self._clock()
        self._ended_s = now_s if self._ended_s is None else self._ended_s
        found = self._seen()
        mute = self._probe(found)
        num_workers = room(found, mute, self._need, self._own, self._workers.most)
        if self._may_hold_room and num_workers < self._workers.least and now_s - self._ended_s > RELEASE_S:
            # What the group before holds is only free when the next one is about to start.
            return self._resize(self._workers.least, found, mute)
        self._note_room(num_workers, now_s)
        if num_workers < self._workers.least:
            self._tell_of_waiting(num_workers, now_s)
        elif (
            self._was_started
            or num_workers == self._workers.most
            or self._has_settled(now_s, self._workers.start_settle_s)
        ):
            return self._resize(num_workers, found, mute)
        self._prepare_free(found, mute, now_s)
        self._sleep(WAIT_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask the group to leave where a machine of it is about to go or where there is room for more workers.

        TooManyRestartsError where machines have fallen silent too often.
        """
        self._end_watch()
        self._ask_for_machines()
        now_s = self._clock()
        if not self._own:
            self._group_since_s = now_s
        self._own = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        size = self._own.total()
        found = self._seen()
        if not found:
            return NoopDecision()
        dead = self._dead(found, now_s)
        if dead:
            text = f"no answer from {named(found, dead)} for {self._workers.silence_s:g} s"
            more = self._limit.count(text)
            self._announce("failure", text)
            self._post.tell(f"{text}: going on from the newest checkpoint{more}")
            possible = room(found, dead, self._need, self._own, self._workers.most)
            return self._resize(max(possible, self._workers.least), found, dead)
        if self._is_leaving:
            return NoopDecision()
        leaving = {machine.id for machine in found if machine.leaves_at is not None and machine.id in self._own}
        if leaving:
            self._leave("drain", f"{named(found, leaving)} is about to be taken away")
            return NoopDecision()
        possible = room(found, self._silent_since_s.keys(), self._need, self._own, self._workers.most)
        self._note_room(possible, now_s)
        if possible > size:
            self._prepare_free(found, self._silent_since_s.keys(), now_s)
        is_old = now_s - self._group_since_s >= self._workers.resize_interval_s
        if possible > size and is_old and self._has_settled(now_s, self._workers.grow_settle_s):
            self._leave("resize", f"there is room for {possible} workers instead of {size}")
        return NoopDecision()

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """Tell the mailbox of the group that is about to start; keep it off machines that do not answer."""
        del scaling_config, num_workers
        ray.get(self._mailbox.open_group.remote(), timeout=MAILBOX_TIMEOUT_S)
        self._own.clear()
        self._silent_since_s.clear()
        self._may_hold_room = self._was_started = True
        self._is_leaving, self._ended_s = False, None
        self._end_watch()
        self._watch = StartWatch(self._found, self._workers.silence_s, probe=self._probe, tell=self._tell_of_silence)
        return {"ray.io/node-id": f"!in({','.join(self._shunned)})"} if self._shunned else None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Begin to ask for machines."""
        if self._asks:
            super().after_controller_start(train_run_context)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A group that could not be started holds nothing."""
        del previous_state
        if isinstance(current_state, ReschedulingState):
            self._may_hold_room = False

    def _get_num_workers_for_resource_request(self) -> int:
        return self._workers.most

    def _ask_for_machines(self) -> None:
        if self._asks:
            self._maybe_send_resource_request()

    def _seen(self) -> list[Machine]:
        """Return the machines; none where the head does not say now."""
        try:
            return self._look()
        except (RayError, RuntimeError, OSError):
            return []

    @property
    def _need(self) -> dict[str, float]:
        return dict(self.scaling_config._resources_per_worker_not_none)  # pyright: ignore[reportReturnType]

    def _resize(self, num_workers: int, found: list[Machine], mute: set[str]) -> ResizeDecision:
        self._found = [machine for machine in found if machine.id not in mute]
        self._shunned = sorted(machine.id for machine in found if machine.id in mute or machine.leaves_at is not None)
        return ResizeDecision(num_workers=num_workers, resources_per_worker=self._need)

    def _note_room(self, num_workers: int, now_s: float) -> None:
        if num_workers != self._best_room:
            self._best_room, self._best_since_s = num_workers, now_s

    def _prepare_free(self, found: list[Machine], mute: Collection[str], now_s: float) -> None:
        """Prepare machines that have room for a worker now and none of ours: the next group will use them."""
        if self._prepare is None:
            return
        for machine in found:
            is_free = machine.id not in self._own and room([machine], mute, self._need, {}, 1) > 0
            if is_free and now_s - self._prepared_s.get(machine.id, -float("inf")) >= PREPARE_AGAIN_S:
                self._prepared_s[machine.id] = now_s
                self._prepare(machine.id)

    def _has_settled(self, now_s: float, settle_s: float) -> bool:
        return now_s - self._best_since_s >= settle_s

    def _dead(self, found: list[Machine], now_s: float) -> set[str]:
        """Return the machines of the group that have not answered for `silence_s`."""
        own = [machine for machine in found if machine.id in self._own]
        mute = self._probe(own)
        self._silent_since_s = {id: self._silent_since_s.get(id, now_s) for id in mute}
        return {id for id, since_s in self._silent_since_s.items() if now_s - since_s >= self._workers.silence_s}

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _tell_of_silence(self, text: str) -> None:
        ray.get(self._mailbox.fell_silent.remote(text), timeout=MAILBOX_TIMEOUT_S)

    def _leave(self, kind: str, text: str) -> None:
        self._is_leaving = True
        self._announce(kind, text)
        self._mailbox.request_leave.remote()
        self._post.tell(f"{text}: saving, then going on")

    def _announce(self, kind: str, text: str) -> None:
        cause = Cause(kind=kind, text=text, since=time.time())
        ray.get(self._mailbox.announce.remote(asdict(cause)), timeout=MAILBOX_TIMEOUT_S)

    def _tell_of_waiting(self, num_workers: int, now_s: float) -> None:
        if now_s - self._told_s >= TELL_S:
            self._told_s = now_s
            text = f"waiting for machines: room for {num_workers} of at least {self._workers.least} workers"
            self._post.tell(text)
            self._post.send(json.dumps({"kind": "waiting", "text": text, "keep": True}))
