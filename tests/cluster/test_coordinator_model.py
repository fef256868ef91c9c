"""Two drivers, their coordinators, zombie workers and a reader, with any order and any loss: what always holds.

Messages are lost, doubled and late; processes die, and storage fails, before and after each operation is applied; two
attempts run at once, interleaved at each store operation; objects are damaged. Whatever happens, an outside reader sees

- nothing torn: every object of every valid manifest is there and is what was written, unless damaged from outside;
- nothing mixed: each row of each valid checkpoint is the one that its attempt's lineage has after that step, as
  `reference_bank` computes it without the code under test;
- nothing regressed: the newest started attempt goes on from every checkpoint that any rank was told is committed (it is
  that attempt's own, or not later than what it or its ancestors started from), and the newest valid one is no older;
- fencing: what is told to be committed was written before anybody won a higher number;
- retention: nobody deletes one of the newest `last` valid checkpoints;
- one answer: no rank is told that a save failed of which another is told that it is committed;
- an end: when nothing fails any more, every rank that waits for an answer gets one.

Not promised: where the newest `last` are all damaged, an attempt may start from one that an older attempt is still
about to delete. What it saves is whole, for it adds to nothing; until then the run has no checkpoint but a clear error.
Nor that a save told to have failed left no manifest, where storage refuses for good after it was written.
"""

from __future__ import annotations

import pytest
from gated_store import Call, Fate, GatedStore
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_processes import Driver, Group
from reference_bank import World

import cluster.coordinator
from cluster.checkpoint_reader import read_latest

MAX_HARM, MAX_ATTEMPTS = 2, 6
LIVELY_ROUNDS = 40
picks = st.integers(0, 5)
few = st.integers(1, 4)


class CoordinatorMachine(RuleBasedStateMachine):
    """The rules are what processes, the network and the storage may do; the invariants are in `World`."""

    @initialize(last=st.integers(1, 3), world_size=st.integers(1, 3), num_saves=st.integers(0, 3))
    def begin_world(self, last: int, world_size: int, num_saves: int) -> None:
        self.world = World(last)
        self.drivers = [Driver(self.world), Driver(self.world)]
        self.reading: tuple[Call, set] | None = None
        self.num_harmed = 0
        self.take_over(0, world_size)
        self.save_in_peace(0, num_saves, True)

    def driver(self, pick: int) -> Driver:
        return self.drivers[pick % 2]

    def group(self, pick: int, *phases: str) -> Group | None:
        groups = [group for driver in self.drivers for group in reversed(driver.groups) if group.phase in phases]
        return groups[pick % len(groups)] if groups else None

    def call(self, pick: int) -> tuple[Driver, Call] | None:
        calls = [(driver, call) for driver in self.drivers for call in driver.calls]
        return calls[pick % len(calls)] if calls else None

    @property
    def has_call(self) -> bool:
        return any(driver.calls for driver in self.drivers)

    @property
    def num_attempts(self) -> int:
        return len(self.world.given)

    @property
    def can_upload(self) -> bool:
        return any(g.phase == "train" and g.is_saving for driver in self.drivers for g in driver.groups)

    @property
    def is_training(self) -> bool:
        return self.group(0, "train") is not None

    # What a driver does.

    @precondition(lambda self: self.num_attempts < MAX_ATTEMPTS)
    @rule(pick=picks, world_size=st.integers(1, 3))
    def begin(self, pick: int, world_size: int) -> None:
        driver = self.driver(pick)
        if driver.coordinator is not None and driver.request is None:
            driver.begin(world_size)

    @precondition(lambda self: self.group(0, "verify"))
    @rule(pick=picks)
    def restore(self, pick: int) -> None:
        group = self.group(pick, "verify")
        assert group is not None
        group.restore()

    @precondition(lambda self: self.group(0, "start"))
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        group = self.group(pick, "start")
        assert group is not None
        if group.driver.coordinator is not None and group.driver.request is None:
            group.driver.start(group)

    @precondition(lambda self: self.num_attempts < MAX_ATTEMPTS)
    @rule(pick=picks, world_size=st.integers(1, 3))
    def take_over(self, pick: int, world_size: int) -> None:
        """A new group begins, restores and starts, and nothing else happens meanwhile."""
        driver = self.driver(pick)
        if driver.coordinator is None or driver.calls:
            return
        driver.begin(world_size)
        driver.finish_calls()
        group = driver.groups[-1]
        if group.phase == "verify":
            group.restore()
        if group.phase == "start":
            driver.start(group)
            driver.finish_calls()

    @rule(pick=picks)
    def lose_the_coordinator(self, pick: int) -> None:
        self.driver(pick).lose()

    @precondition(lambda self: any(driver.coordinator is None for driver in self.drivers))
    @rule()
    def revive_the_coordinators(self) -> None:
        for driver in self.drivers:
            driver.revive()

    # What a coordinator does, store operation by store operation.

    @rule(pick=picks, num_steps=st.integers(0, 40))
    def work(self, pick: int, num_steps: int) -> None:
        """The thread that commits wakes up, and comes that far before something else happens."""
        driver = self.driver(pick)
        if driver.coordinator is not None and driver.working is None:
            driver.work()
        for _ in range(num_steps):
            if driver.working is not None:
                driver.step(driver.working)
                self.world.check()

    @rule(pick=picks, num_steps=st.integers(0, 20))
    def remove(self, pick: int, num_steps: int) -> None:
        """The thread that removes wakes up, and comes that far before something else happens."""
        driver = self.driver(pick)
        driver.remove()
        for _ in range(num_steps):
            if driver.removing is not None:
                driver.step(driver.removing)
                self.world.check()

    @precondition(lambda self: self.has_call)
    @rule(pick=picks, num_steps=st.integers(1, 10))
    def advance(self, pick: int, num_steps: int) -> None:
        chosen = self.call(pick)
        assert chosen is not None
        driver, call = chosen
        for _ in range(num_steps):
            if not call.has_ended:
                driver.step(call)
                self.world.check()

    @precondition(lambda self: self.has_call)
    @rule(pick=picks, num_steps=st.integers(0, 8), fate=st.sampled_from([fate for fate in Fate if fate != Fate.DONE]))
    def strike(self, pick: int, num_steps: int, fate: Fate) -> None:
        chosen = self.call(pick)
        assert chosen is not None
        driver, call = chosen
        for _ in range(num_steps):
            if not call.has_ended:
                driver.step(call)
                self.world.check()
        if not call.has_ended:
            driver.step(call, fate)

    # What workers and the network do.

    @precondition(lambda self: self.is_training)
    @rule(pick=picks, num_steps=st.integers(0, 2), incremental=st.booleans())
    def save(self, pick: int, num_steps: int, incremental: bool) -> None:
        group = self.group(pick, "train")
        assert group is not None
        if not group.is_saving:
            group.train(num_steps)
            group.start_save(incremental)

    @precondition(lambda self: self.can_upload)
    @rule(pick=picks, rank=picks, num_objects=st.integers(1, 9))
    def upload(self, pick: int, rank: int, num_objects: int) -> None:
        group = self.group(pick, "train")
        if group is not None and group.is_saving:
            group.upload(rank % group.world_size, num_objects)

    @precondition(lambda self: self.can_upload)
    @rule(pick=picks, rank=picks)
    def fail_to_upload(self, pick: int, rank: int) -> None:
        group = self.group(pick, "train")
        if group is not None and group.is_saving and group.saving[rank % group.world_size].puts:
            group.fail(rank % group.world_size)

    @precondition(lambda self: self.can_upload)
    @rule(pick=picks, ranks=st.lists(picks, min_size=1, max_size=3), whole=st.booleans())
    def say(self, pick: int, ranks: list[int], whole: bool) -> None:
        group = self.group(pick, "train")
        for rank in ranks if group is not None and group.is_saving else ():
            save = group.saving[rank % group.world_size]
            if whole:
                group.upload(rank % group.world_size, len(save.puts))
            if save.outcome is None and not save.puts:
                group.say(rank % group.world_size)

    @precondition(lambda self: any(driver.bag for driver in self.drivers))
    @rule(picks=st.lists(st.tuples(st.integers(0, 1), picks, st.booleans(), st.booleans()), min_size=1, max_size=3))
    def deliver(self, picks: list[tuple[int, int, bool, bool]]) -> None:
        for pick, index, is_last, answer_arrives in picks:
            driver = self.driver(pick)
            if driver.bag:
                driver.deliver(index % len(driver.bag), is_last, answer_arrives)

    @precondition(lambda self: self.can_upload)
    @rule(pick=picks, deliveries=st.lists(st.tuples(picks, st.booleans(), st.booleans()), min_size=1, max_size=6))
    def exchange(self, pick: int, deliveries: list[tuple[int, bool, bool]]) -> None:
        """Ranks of a group upload what is left, and say so without the messages' being kept up."""
        group = self.group(pick, "train")
        for rank, is_last, answer_arrives in deliveries:
            save = None if group is None else group.saving.get(rank % group.world_size)
            if save is not None and save.outcome is None and group.phase == "train":
                group.upload(rank % group.world_size, len(save.puts))
                group.say(rank % group.world_size)
                group.driver.deliver(len(group.driver.bag) - 1, is_last, answer_arrives)

    @precondition(lambda self: any(driver.bag for driver in self.drivers))
    @rule(pick=picks)
    def lose_the_messages(self, pick: int) -> None:
        self.driver(pick).bag.clear()

    @precondition(lambda self: self.is_training)
    @rule(pick=picks, num_saves=st.integers(1, 3), incremental=st.booleans())
    def save_in_peace(self, pick: int, num_saves: int, incremental: bool) -> None:
        """Save after save by one group, and nothing else happens meanwhile."""
        group = self.group(pick, "train")
        assert group is not None
        for _ in range(num_saves):
            if group.driver.calls or group.phase != "train" or group.is_saving:
                return
            group.train(1)
            group.start_save(incremental)
            for _ in range(2):  # to say it, and to hear what became of it
                group.driver.talk(group)
                self.world.check()

    @precondition(lambda self: self.is_training)
    @rule(pick=picks)
    def kill_the_group(self, pick: int) -> None:
        group = self.group(pick, "train", "verify", "start")
        assert group is not None
        group.phase = "dead"

    # What a reader and the storage do.

    @rule(num_steps=st.integers(1, 6))
    def read(self, num_steps: int) -> None:
        if self.reading is None:
            store = GatedStore(self.world.uri)
            self.reading = Call(lambda: read_latest(store)), set(self.world.promised)
        call, promised = self.reading
        for _ in range(num_steps):
            if not call.has_ended:
                call.step()
        if call.has_ended:
            self.world.check_read(call.result, call.error, promised)
            self.reading = None

    @precondition(lambda self: self.num_harmed < MAX_HARM and self.world.promised)
    @rule(pick=picks, age=st.integers(0, 2), vanish=st.booleans())
    def harm(self, pick: int, age: int, vanish: bool) -> None:
        there = [id for id in sorted(self.world.promised) if self.world.reader.exists(id.key)]
        if not there:
            return
        id = there[-1 - age % len(there)]
        keys = [id.key, *sorted(key for key in self.world.needs[id] if self.world.reader.exists(key))]
        self.world.harm(keys[pick % len(keys)], vanish)
        self.num_harmed += 1

    @invariant()
    def the_store_shows_only_whole_checkpoints_and_the_newest_promised(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """When nothing fails any more, whoever still trains gets an answer."""
        if not hasattr(self, "world"):
            return
        try:
            if self.reading is not None:
                self.reading[0].kill()
            for driver in self.drivers:
                driver.finish_calls()
            self.world.check()
            for group in [group for driver in self.drivers for group in driver.groups if group.phase == "train"]:
                for _ in range(LIVELY_ROUNDS):
                    if group.driver.talk(group) or group.phase == "dead":
                        break
                    self.world.check()
                assert not group.is_saving or group.phase == "dead", f"ranks of attempt {group.attempt} wait for ever"
            self.world.check()
        finally:
            for driver in self.drivers:
                driver.lose()
            self.world.clean_up()


def run_machine(max_examples: int, *, is_random: bool) -> None:
    run_state_machine_as_test(
        CoordinatorMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=50,
            derandomize=not is_random,
            print_blob=is_random,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch) -> None:
    monkeypatch.setattr(cluster.coordinator, "DOUBT_REPEATS", 6)


def test_no_order_of_events_shows_a_torn_mixed_or_regressed_checkpoint():
    run_machine(60, is_random=False)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thousands_of_orders_of_events_show_no_torn_mixed_or_regressed_checkpoint():
    run_machine(10_000, is_random=True)
