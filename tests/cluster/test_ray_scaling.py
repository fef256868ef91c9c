"""How many workers run: decisions over a cluster that the test describes, with a real mailbox in a real Ray."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState, SchedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.attempts import record_start, win_number
from cluster.coordination import CoordinatorSpec
from cluster.failures import Preempted, describe
from cluster.interrupts import Interrupts
from cluster.ray_fork_server import IDLE_S
from cluster.ray_machines import Machine, room
from cluster.ray_mailbox import Order, Orders, Post, start_mailbox
from cluster.ray_restart_limit import MOST_AWAY_S, MOST_RESTARTS, RestartLimit, TooManyRestartsError
from cluster.ray_restarts import Restarts
from cluster.ray_run import RayRun
from cluster.ray_scaling import PREPARE_AGAIN_S, RELEASE_S, WAIT_S, GroupSizing
from cluster.ray_session import ray_session
from cluster.ray_start_watch import StartWatch
from cluster.store import Store, StoreError
from cluster.worker_range import WorkerRange, parse_workers


def messages(mailbox) -> list[str]:
    """What is to be shown, without the events that only change what `status` knows."""
    events = [json.loads(event) for event in ray.get(mailbox.take.remote())]
    return [event["text"] for event in events if event["kind"] == "message"]


@pytest.fixture(scope="module")
def private_ray():
    with ray_session(None, 1, quiet=True):
        yield


@pytest.fixture
def mailbox(private_ray):
    actor = start_mailbox()
    yield actor
    ray.kill(actor)


def machine(name: str, cpus: float = 1, free: float | None = None, leaves_at: float | None = None) -> Machine:
    return Machine(
        id=name, host=f"10.0.0.{name}", port=1, total={"CPU": cpus}, free={"CPU": cpus if free is None else free},
        leaves_at=leaves_at,
    )  # fmt: skip


class World:
    """A cluster and a clock that the test moves."""

    def __init__(self, mailbox, least=1, most=4, asks_for_machines=False, limit=None, **times) -> None:
        self.machines: list[Machine] = []
        self.silent: set[str] = set()
        self.prepared: list[str] = []
        self.now_s, self.slept_s = 1000.0, 0.0
        self.mailbox = mailbox
        defaults = {"start_settle_s": 10, "grow_settle_s": 20, "resize_interval_s": 100, "silence_s": 5}
        self.sizing = GroupSizing(
            ScalingConfig(num_workers=most),
            WorkerRange(least=least, most=most, **{**defaults, **times}),
            mailbox,
            asks_for_machines=asks_for_machines,
            prepare=self.prepared.append,
            limit=limit,
            look=lambda: self.machines,
            probe=lambda found: {m.id for m in found} & self.silent,
            clock=lambda: self.now_s,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def idle(self, after_s: float = 0.0) -> int | None:
        """Return the size of the group that would be started now; None if none."""
        self.now_s += after_s
        decision = self.sizing.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def start(self, num_workers: int):
        return self.sizing.on_controller_start_worker_group(scaling_config=None, num_workers=num_workers)

    def running(self, *places: str, after_s: float = 0.0) -> int | None:
        """Return the size of the group that would replace the one on these machines at once; None if none."""
        self.now_s += after_s
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=place)) for place in places]
        decision = self.sizing.make_decision_for_running_worker_group(SimpleNamespace(workers=workers), None)
        if isinstance(decision, NoopDecision):
            return None
        return decision.num_workers

    def order(self) -> Order | None:
        group, _ = ray.get(self.mailbox.group.remote())
        orders = Orders(self.mailbox, group)
        ray.wait([orders._answer], timeout=0.5)
        return orders.poll()

    def next_cause(self) -> dict:
        ray.get(self.mailbox.open_group.remote())
        return ray.get(self.mailbox.group.remote())[1]

    def told(self) -> list[str]:
        self.sizing._post.flush(timeout_s=10)
        return messages(self.mailbox)


def test_4096_calls_that_wait_hold_nobody_up_and_all_are_answered(mailbox):
    group = ray.get(mailbox.open_group.remote())
    orders = [mailbox.wait_for_order.remote(group) for _ in range(2048)]
    meetings = [mailbox.rendezvous.remote(group) for _ in range(2048)]
    assert ray.wait([*orders, *meetings], timeout=1, fetch_local=False)[0] == []
    assert ray.get([mailbox.take.remote(), mailbox.group.remote()], timeout=20)[1][0] == group
    ray.get(mailbox.open_rendezvous.remote(group, "127.0.0.1", 7), timeout=20)
    assert set(ray.get(meetings, timeout=30)) == {("127.0.0.1", 7)}
    mailbox.request_stop.remote()
    assert set(ray.get(orders, timeout=30)) == {Order.STOP}


def test_the_first_group_waits_for_machines_that_come_one_after_the_other_and_not_for_more_than_the_most(mailbox):
    world = World(mailbox, least=2, most=3)
    assert world.idle() is None
    world.machines.append(machine("2"))
    assert world.idle(after_s=100) is None
    world.machines.append(machine("3"))
    assert world.idle(after_s=1) is None
    assert world.idle(after_s=9) is None
    assert world.idle(after_s=1) == 2
    world.machines.append(machine("4"))
    assert world.idle() == 3
    world.machines.append(machine("5"))
    assert world.idle() == 3
    assert world.slept_s == 4 * WAIT_S
    assert world.told() == [f"waiting for machines: room for {n} of at least 2 workers" for n in (0, 1)]


def test_machines_that_will_get_workers_are_prepared_and_others_are_left_alone(mailbox):
    world = World(mailbox, least=2, most=3, grow_settle_s=1000)
    world.machines = [machine("2"), machine("3", cpus=0), machine("4", free=0), machine("5", leaves_at=9000.0)]
    assert world.idle() is None
    assert world.prepared == ["2"], "the others have no room for a worker, or go"
    world.machines.append(machine("6"))
    world.silent = {"6"}
    assert world.idle(after_s=1) is None
    assert world.prepared == ["2"]
    world.silent = set()
    assert world.idle(after_s=8) is None
    assert world.prepared == ["2", "6"]
    assert world.idle(after_s=10) == 2
    assert world.prepared == ["2", "6"], "a group that starts now prepares its machines itself"
    world.start(2)
    world.machines = [machine("2", free=0), machine("6", free=0), machine("7")]
    assert world.running("2", "6") is None
    assert world.running("2", "6", after_s=PREPARE_AGAIN_S - 1) is None
    assert world.prepared == ["2", "6", "7"]
    assert world.running("2", "6", after_s=1) is None
    assert world.prepared == ["2", "6", "7", "7"], "its fork server would be gone before the group makes place"
    assert PREPARE_AGAIN_S + 10 < IDLE_S


def test_a_machine_that_a_full_group_does_not_need_may_become_idle(mailbox):
    world = World(mailbox, least=1, most=2)
    world.machines = [machine("2"), machine("3")]
    assert world.idle() == 2
    world.start(2)
    world.machines = [machine("2", free=0), machine("3", free=0), machine("4")]
    assert world.running("2", "3") is None
    assert world.running("2", "3", after_s=1000) is None
    assert world.prepared == []


def test_after_a_failure_the_next_group_is_as_large_as_the_machines_allow_and_starts_at_once(mailbox):
    world = World(mailbox, least=1, most=3)
    world.machines = [machine(name) for name in "234"]
    assert world.idle() == 3
    world.start(3)
    world.machines = [machine(name, free=0) for name in "234"]  # our own workers hold them
    assert world.running("2", "3", "4") is None
    world.silent = {"3"}  # the head does not know yet that it is dead
    assert world.idle() == 2
    assert world.start(2) == {"ray.io/node-id": "!in(3)"}


def test_room_that_a_group_holds_which_nobody_saw_running_is_freed_by_starting_the_next(mailbox):
    world = World(mailbox, least=2, most=2)
    world.machines = [machine(name) for name in "23"]
    assert world.idle() == 2
    world.start(2)
    world.machines = [machine(name, free=0) for name in "23"]
    assert world.idle() is None
    assert world.idle(after_s=RELEASE_S + 1) == 2
    world.start(2)
    world.sizing.after_controller_state_update(
        SchedulingState(None), ReschedulingState(training_failed_error=ControllerError(ValueError()))
    )
    assert world.idle() is None
    assert world.idle(after_s=60) is None  # now nothing of ours holds it: somebody else does


def test_a_group_leaves_once_when_a_machine_of_it_is_drained_and_the_next_keeps_off_it(mailbox):
    world = World(mailbox, most=3)
    world.machines = [machine(name) for name in "234"]
    world.start(3)
    world.machines = [machine("2", free=0), machine("3", free=0, leaves_at=0.0), machine("4", free=0)]
    assert world.running("2", "3", "4") is None
    assert world.order() is Order.LEAVE
    assert world.running("2", "3", "4", after_s=1) is None
    assert world.told() == ["machine 10.0.0.3 is about to be taken away: saving, then going on"]
    assert world.idle() == 2
    assert world.start(2) == {"ray.io/node-id": "!in(3)"}
    cause = ray.get(world.mailbox.group.remote())[1]
    assert cause["kind"] == "drain"
    assert "10.0.0.3" in cause["text"]
    assert world.order() is None


def test_machines_that_are_drained_and_not_ours_disturb_nobody(mailbox):
    world = World(mailbox, most=2)
    world.machines = [machine("2"), machine("3", leaves_at=5.0)]
    assert world.idle(after_s=0) is None
    assert world.idle(after_s=10) == 1
    world.start(1)
    assert world.running("2") is None
    assert world.running("2", after_s=1000) is None
    assert world.order() is None


def test_a_group_grows_when_there_has_been_room_for_a_while_and_not_twice_in_short_order(mailbox):
    world = World(mailbox, most=4)
    world.machines = [machine("2")]
    assert world.idle() is None
    assert world.idle(after_s=10) == 1
    world.start(1)
    world.machines = [machine("2", free=0)]
    assert world.running("2") is None
    assert world.running("2", after_s=90) is None
    world.machines.append(machine("3"))
    assert world.running("2", after_s=5) is None
    assert world.running("2", after_s=15) is None
    world.machines.append(machine("4"))  # one more: wait for it to settle again
    assert world.running("2", after_s=10) is None
    assert world.order() is None
    assert world.running("2", after_s=20) is None
    assert world.order() is Order.LEAVE
    assert world.next_cause()["text"] == "there is room for 3 workers instead of 1"
    assert world.idle() == 3
    world.start(3)
    world.machines = [*(machine(name, free=0) for name in "234"), machine("5")]
    for _ in range(9):
        assert world.running("2", "3", "4", after_s=11) is None
    assert world.order() is None
    world.running("2", "3", "4", after_s=12)
    assert world.order() is Order.LEAVE


def test_a_machine_that_does_not_answer_for_a_while_is_replaced_and_a_hiccup_is_not(mailbox):
    world = World(mailbox, least=1, most=2)
    world.machines = [machine("2", free=0), machine("3", free=0)]
    world.start(2)
    assert world.running("2", "3") is None
    world.silent = {"3"}
    assert world.running("2", "3", after_s=1) is None
    world.silent = set()
    assert world.running("2", "3", after_s=3) is None
    world.silent = {"3"}
    assert world.running("2", "3", after_s=3) is None
    assert world.running("2", "3", after_s=5) == 1
    assert world.start(1) == {"ray.io/node-id": "!in(3)"}
    assert ray.get(world.mailbox.group.remote())[1]["kind"] == "failure"


def test_a_machine_that_is_silent_leaves_no_group_of_fewer_than_the_least(mailbox):
    world = World(mailbox, least=2, most=2)
    world.machines = [machine("2", free=0), machine("3", free=0)]
    world.start(2)
    world.silent = {"3"}
    assert world.running("2", "3") is None
    assert world.running("2", "3", after_s=5) == 2  # this ends the group; there is no room for the next one yet
    world.start(2)
    world.machines = [machine("2"), machine("3")]
    assert world.idle() is None


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 3), st.booleans(), st.booleans())),
    st.integers(1, 4),
    st.integers(1, 20),
)
def test_the_room_is_what_fits_on_each_machine_that_stays(nodes, need, most):
    """Against placing workers one by one."""
    found, own, without, expected = [], {}, set(), 0
    for number, (total, free, mine, leaves, is_silent) in enumerate(nodes):
        free = min(free, total)
        mine = min(mine, (total - free) // need)
        found.append(machine(str(number), total, free, 0.0 if leaves else None))
        own[str(number)] = mine
        without |= {str(number)} if is_silent else set()
        left = free + mine * need
        while not leaves and not is_silent and left >= need:
            expected, left = expected + 1, left - need
    assert room(found, without, {"CPU": need, "GPU": 0}, own, most) == min(expected, most)
    assert room([], set(), {"CPU": 0}, {}, most) == most


@pytest.mark.parametrize(("text", "expected"), [("0", (0, 0)), ("3", (3, 3)), ("2..16", (2, 16)), (" 2..2 ", (2, 2))])
def test_numbers_of_workers_are_read(text, expected):
    assert parse_workers(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "3..2", "0..2", "2...4", "2..", "two", "1e3", "2..4..6"])
def test_what_is_no_number_of_workers_is_refused(text):
    with pytest.raises(ValueError, match="workers: found"):
        parse_workers(text)
    with pytest.raises(ValueError, match=r"expected MIN\.\.MAX"):
        WorkerRange(least=3, most=2)


def failed(mailbox, *errors, world_size=3):
    """Let ranks raise in the present group, and return what Ray Train makes of it."""
    group, _ = ray.get(mailbox.group.remote())
    for rank, error in enumerate(errors):
        if error is not None:
            ray.get(mailbox.fail.remote(group, describe(error, rank, world_size)))
    return WorkerGroupError("workers failed", dict(enumerate(errors)))


def test_only_what_may_pass_is_tried_again(mailbox, tmp_path):
    restarts = Restarts(FailureConfig(), mailbox, RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path))))

    newer = itertools.count(1)

    def decide(*errors):
        ray.get(mailbox.open_group.remote())
        ray.get(mailbox.count_restart.remote([len(errors), next(newer)]))  # each is the first in a row
        return restarts.make_decision(failed(mailbox, *errors))

    reset = StoreError("cannot write")
    reset.__cause__ = ConnectionResetError("reset")
    for error in (ConnectionError("reset"), RuntimeError("Connection closed by peer"), TimeoutError("late"), reset):
        assert decide(error) is FailureDecision.RETRY, error
    for error in (ValueError("no such field"), TypeError("a bug"), StoreError("no permission"), KeyError("x")):
        assert decide(error) is FailureDecision.RAISE, error
    # What the others saw of it does not count.
    assert decide(RuntimeError("Connection closed by peer"), ValueError("the cause")) is FailureDecision.RAISE
    assert decide(Preempted(7), Preempted(7), RuntimeError("Connection reset by peer")) is FailureDecision.RETRY
    timeout = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert restarts.make_decision(timeout) is FailureDecision.RETRY
    assert restarts.make_decision(ControllerError(ValueError("a bug"))) is FailureDecision.RAISE
    without_checkpoints = Restarts(FailureConfig(), mailbox, None)
    assert without_checkpoints.make_decision(failed(mailbox, ConnectionError("reset"))) is FailureDecision.RAISE


def test_a_run_that_restarts_without_a_new_checkpoint_ends(mailbox, tmp_path):
    store = Store(tmp_path)
    restarts = Restarts(FailureConfig(), mailbox, RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path))))

    def fails() -> FailureDecision:
        ray.get(mailbox.open_group.remote())
        return restarts.make_decision(ControllerError(WorkerGroupStartupFailedError("no room in /dev/shm")))

    def saves(step: int) -> None:
        number = win_number(store)
        record_start(store, number, None)
        store.put(f"manifests/{number:06d}-{step:012d}.json", b"{}")

    assert [fails() for _ in range(MOST_RESTARTS)] == [FailureDecision.RETRY] * MOST_RESTARTS
    saves(10)
    assert [fails() for _ in range(MOST_RESTARTS)] == [FailureDecision.RETRY] * MOST_RESTARTS
    assert fails() is FailureDecision.RAISE
    restarts._post.flush(timeout_s=10)
    told = messages(mailbox)
    assert told[-1].startswith("giving up after 3 restarts without a new checkpoint: workers could not start")
    assert "no room in /dev/shm" in told[-1]


def test_a_machine_that_falls_silent_again_and_again_without_a_new_checkpoint_ends_the_run(mailbox, tmp_path):
    limit = RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path)))
    world = World(mailbox, least=2, most=2, limit=limit)
    world.machines = [machine("1"), machine("2")]
    world.idle()

    def falls_silent() -> int | None:
        world.start(2)
        world.silent = set()
        world.running("1", "2", after_s=1)
        world.silent = {"2"}
        world.running("1", "2", after_s=1)
        return world.running("1", "2", after_s=5)

    assert [falls_silent(), falls_silent()] == [2, 2]
    store = Store(tmp_path)
    record_start(store, win_number(store), None)
    store.put("manifests/000001-000000000010.json", b"{}")
    assert [falls_silent() for _ in range(MOST_RESTARTS)] == [2] * MOST_RESTARTS
    # Whatever else ends a group counts with it.
    restarts = Restarts(FailureConfig(), mailbox, RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path))))
    failure = ControllerError(WorkerGroupStartupFailedError("no room in /dev/shm"))
    assert restarts.make_decision(failure) is FailureDecision.RAISE
    with pytest.raises(TooManyRestartsError, match=r"giving up after 3 .*no answer from machine 10\.0\.0\.2 for 5 s"):
        falls_silent()
    assert world.told()[0] == "no answer from machine 10.0.0.2 for 5 s: going on from the newest checkpoint"


def test_a_start_is_given_up_where_a_machine_of_it_does_not_answer_and_the_machine_is_named():
    told, ended, used = [], threading.Event(), threading.Event()
    watch = StartWatch(
        [machine("1"), machine("2"), machine("3")],
        silence_s=0.05,
        probe=lambda found: {m.id for m in found} & {"2", "3"},
        tell=told.append,
        starts_on=lambda ids: used.is_set() and bool(ids & {"2"}),
        give_up=ended.set,
        look_s=0.01,
    )
    assert not ended.wait(0.2), "no worker starts on machines that are silent"
    used.set()
    assert ended.wait(5)
    assert told == ["no answer from machine 10.0.0.2 and machine 10.0.0.3 for 0.05 s"]
    watch.stop()
    told.clear()
    StartWatch(
        [machine("2")], 0.05, probe=lambda found: {"2"}, tell=told.append, starts_on=lambda ids: True, look_s=0.1
    ).stop()
    time.sleep(0.3)
    assert told == [], "the start was over"


def test_a_start_that_failed_says_which_machine_or_what_error_it_was(mailbox, tmp_path):
    restarts = Restarts(FailureConfig(), mailbox, RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path))))
    text = (
        "One of the worker actors failed to initialize due to error:\nTraceback (most recent call last):\n"
        '  File "worker_group.py", line 7, in _create_workers\n'
        "ray.exceptions.ActorDiedError: The actor died because its node has died.\n\tclass_name: RayTrainWorker\n"
    )
    failed_start = ControllerError(WorkerGroupStartupFailedError(text))
    ray.get(mailbox.open_group.remote())
    assert restarts.make_decision(failed_start) is FailureDecision.RETRY
    ray.get(mailbox.open_group.remote())
    ray.get(mailbox.fell_silent.remote("no answer from machine 10.0.0.2 for 10 s"))
    assert restarts.make_decision(failed_start) is FailureDecision.RETRY
    # In the moment between the last worker's start and the first look at the group.
    ray.get(mailbox.open_group.remote())
    assert restarts.make_decision(ControllerError(RayActorError())) is FailureDecision.RETRY
    restarts._post.flush(timeout_s=10)
    told = messages(mailbox)
    assert told[0].startswith(
        "workers could not start: ActorDiedError: The actor died because its node has died.: going"
    )
    assert told[1].startswith("no answer from machine 10.0.0.2 for 10 s: going on from the newest checkpoint")
    assert "workers could not start: The actor experienced an error" in told[2]


def test_restarts_while_the_storage_is_away_do_not_count_for_an_hour(mailbox, tmp_path, monkeypatch):
    now_s = [0.0]
    limit = RestartLimit(mailbox, CoordinatorSpec(uri=str(tmp_path)), clock=lambda: now_s[0])
    answers = [StoreError("nothing answers")]

    def newest(store):
        del store
        if answers:
            raise answers[0]
        return []

    monkeypatch.setattr("cluster.ray_restart_limit.manifest_ids", newest)
    for now_s[0] in (0.0, 100.0, 1000.0, MOST_AWAY_S - 1):
        assert "does not answer: nothing answers" in limit.count("rank 1 died")
    answers.clear()
    assert [limit.count("rank 1 died") for _ in range(2)] == ["", " (restart 2 of 3 without a new one)"]
    answers.append(StoreError("nothing answers"))
    now_s[0] = 1e6
    assert "not counted" in limit.count("rank 1 died")
    now_s[0] += MOST_AWAY_S
    assert "restart 3 of 3" in limit.count("rank 1 died")
    with pytest.raises(TooManyRestartsError):
        limit.count("rank 1 died")


def test_the_mailbox_keeps_groups_apart(mailbox):
    first = ray.get(mailbox.open_group.remote())
    old_orders = Orders(mailbox, first)
    ray.get(mailbox.open_rendezvous.remote(first, "a", 1))
    second = ray.get(mailbox.open_group.remote())
    assert second == first + 1
    ray.get(mailbox.fail.remote(first, describe(ValueError("late"), 0, 2)))
    assert ray.get(mailbox.failures.remote()) == []
    with pytest.raises(LookupError):
        ray.get(mailbox.rendezvous.remote(first))
    ray.get(mailbox.open_rendezvous.remote(first, "a", 1))
    ray.get(mailbox.open_rendezvous.remote(second, "b", 2))
    assert ray.get(mailbox.rendezvous.remote(second)) == ("b", 2)
    ray.wait([old_orders._answer], timeout=5)
    assert old_orders.must_leave()
    orders = Orders(mailbox, second)
    assert orders.poll() is None
    mailbox.request_stop.remote()
    ray.wait([orders._answer], timeout=5)
    assert orders.must_stop()
    third = Orders(mailbox, ray.get(mailbox.open_group.remote()))
    ray.wait([third._answer], timeout=5)
    assert third.must_stop()  # whoever comes later is to stop, too


def test_events_of_each_sender_arrive_in_order_and_a_flush_waits_for_them(mailbox):
    posts = [Post(mailbox) for _ in range(3)]
    for number in range(200):
        for sender, post in enumerate(posts):
            post.send(json.dumps({"sender": sender, "number": number, "keep": True}))
    for post in posts:
        post.flush(timeout_s=30)
    events = [json.loads(event) for event in ray.get(mailbox.take.remote())]
    for sender in range(3):
        assert [event["number"] for event in events if event["sender"] == sender] == list(range(200))


def test_a_preemption_can_be_pickled():
    error = pickle.loads(pickle.dumps(Preempted(7)))
    assert (error.step, str(error)) == (7, str(Preempted(7)))
    assert replace(WorkerRange(least=1, most=2), most=3).most == 3


def test_a_run_that_a_signal_interrupts_ends_the_thread_that_uses_ray_first(mailbox):
    class Trainer:
        def fit(self):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)
            ended.set()
            raise RuntimeError("its controller is gone")

    ray.get(mailbox.take.remote())
    ended = threading.Event()
    with Interrupts() as interrupts:
        run = RayRun(Trainer(), mailbox, interrupts, print)
        with pytest.raises(KeyboardInterrupt):
            run.finish()
    assert ended.is_set(), "Ray would be shut down under it, which ends this process"
