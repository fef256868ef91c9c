"""A coordinator that dies between any two store operations, two that start at once, in every order: nothing is lost.

Where `test_coordinator_model` draws what happens, these tests go through all of it for a small run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from gated_store import Fate
from model_processes import Driver, Group
from reference_bank import World

import cluster.coordinator
from cluster.attempts import read_history
from cluster.manifest import ManifestId

ROUNDS = 20
REPEATS = 5
MOST_OPERATIONS = 24


@pytest.fixture
def world(monkeypatch) -> Iterator[World]:
    monkeypatch.setattr(cluster.coordinator, "DOUBT_REPEATS", REPEATS)
    world = World(last=2)
    yield world
    world.clean_up()


def trains(driver: Driver, world_size: int = 2) -> Group:
    """A new group begins, restores and starts."""
    driver.begin(world_size)
    driver.finish_calls()
    group = driver.groups[-1]
    group.restore()
    driver.start(group)
    driver.finish_calls()
    assert group.phase == "train"
    return group


def saves(group: Group, num_steps: int = 1, incremental: bool = True) -> None:
    """One save that nothing happens to."""
    group.train(num_steps)
    group.start_save(incremental)
    answered(group)


def answered(group: Group) -> None:
    """Every rank of a group hears what became of its save, for nothing fails any more."""
    for _ in range(ROUNDS):
        if group.driver.talk(group) or group.phase == "dead":
            break
        group.world.check()
    assert group.phase == "dead" or not group.is_saving, "a rank waits for ever"
    group.world.check()


def said(group: Group, *ranks: int) -> None:
    """Ranks upload what they have, say so, and hear the answer."""
    for rank in ranks:
        group.upload(rank, len(group.saving[rank].puts))
        group.say(rank)
        group.driver.deliver(len(group.driver.bag) - 1, is_last=True, answer_arrives=True)


def outcomes(group: Group) -> list[str]:
    return [(save.outcome or {"state": "none"})["state"] for _, save in sorted(group.saving.items())]


def test_a_rank_that_missed_the_answer_gets_it_from_a_coordinator_that_was_started_again(world):
    driver = Driver(world)
    group = trains(driver)
    group.train(1)
    group.start_save(False)
    said(group, 0, 1)
    driver.work()
    driver.finish_calls()
    said(group, 0)
    driver.lose()
    answered(group)
    assert outcomes(group) == ["committed", "committed"]


def test_a_rank_that_missed_the_failure_of_another_hears_of_it_from_a_coordinator_that_was_started_again(world):
    driver = Driver(world)
    group = trains(driver)
    group.train(1)
    group.start_save(False)
    group.fail(0)
    said(group, 0)
    driver.work()
    driver.finish_calls()
    said(group, 0)
    driver.lose()
    answered(group)
    assert outcomes(group) == ["failed", "failed"]
    saves(group)
    assert outcomes(group) == ["committed", "committed"]


@pytest.mark.parametrize("operation", ["create", "list"])
def test_ranks_are_told_the_same_where_the_answer_to_the_commit_was_lost_and_the_coordinator_too(world, operation):
    driver = Driver(world)
    group = trains(driver)
    saves(group)
    group.train(1)
    group.start_save(True)
    said(group, 0, 1)
    driver.work()
    seen = []
    while driver.working is not None and not (seen[-1:] == ["create"] and operation == "list"):
        assert driver.working.next is not None
        seen.append(driver.working.next[0])
        driver.step(driver.working, Fate.FAILED_AFTER if seen[-1] == operation == "create" else Fate.DONE)
    if driver.working is not None:
        driver.step(driver.working, Fate.FAILED_BEFORE)
        driver.finish_calls()
    said(group, 0)
    driver.lose()
    answered(group)
    assert len(set(outcomes(group))) == 1
    saves(group)
    assert outcomes(group) == ["committed", "committed"]


def test_what_a_zombie_still_deletes_tears_no_checkpoint_of_an_attempt_that_started_from_it():
    world = World(last=1)
    zombie, driver = Driver(world), Driver(world)
    old = trains(zombie)
    saves(old)
    old.train(1)
    old.start_save(False)
    said(old, 0, 1)
    zombie.work()
    zombie.finish_calls()
    zombie.remove()
    while zombie.removing and zombie.removing.next != ("delete", ManifestId(1, 1).key):
        zombie.step(zombie.removing)
    assert zombie.removing
    world.harm(sorted(world.needs[ManifestId(1, 2)])[0], vanish=False)
    group = trains(driver)
    assert group.parent == (1, 1)
    zombie.finish_calls()
    world.check()
    saves(group)
    world.clean_up()


def test_an_attempt_is_not_confused_by_a_commit_of_the_one_before_it_that_ends_late():
    world = World(last=3)
    driver = Driver(world)
    old = trains(driver)
    saves(old)
    old.train(3)
    old.start_save(False)
    said(old, 0, 1)
    driver.work()
    while driver.working and driver.working.num_steps < 4:
        driver.step(driver.working)
    world.harm(sorted(world.needs[ManifestId(1, 4)])[0], vanish=False)
    driver.begin(2)
    request = driver.request
    assert request is not None
    while driver.request is not None:
        driver.step(request[0])
    group = driver.groups[-1]
    group.restore()
    driver.start(group)
    request = driver.request
    assert request is not None
    while driver.request is not None:
        driver.step(request[0])
    assert (group.phase, group.parent) == ("train", (1, 1))
    driver.finish_calls()
    saves(group)
    assert outcomes(group) == ["committed", "committed"]
    assert read_history(world.reader).chain == [(1, 1), (2, 2)]
    world.clean_up()


class Script:
    """A small run, operation by operation of its coordinators, of which one has a fate of its own."""

    def __init__(self, world: World, struck: int | None, fate: Fate) -> None:
        self.world, self.struck, self.fate = world, struck, fate
        self.num_operations = 0

    def run(self, driver: Driver) -> None:
        while driver.calls:
            fate = self.fate if self.num_operations == self.struck else Fate.DONE
            self.num_operations += 1
            driver.step(driver.calls[0], fate)
            self.world.check()
        driver.revive()

    def group(self, driver: Driver) -> Group:
        """A new group trains, whatever becomes of its first try."""
        for _ in range(2):
            driver.begin(2)
            group = driver.groups[-1]
            self.run(driver)
            if group.phase != "verify":
                continue
            group.restore()
            for _ in range(2):
                if group.phase == "start":
                    driver.start(group)
                    self.run(driver)
            if group.phase == "train":
                return group
        raise AssertionError("no attempt starts")

    def save(self, group: Group, incremental: bool, *, first: int = 0) -> list[str]:
        """Save, with one rank that asks for its answer before the other; return what they are told."""
        group.train(1)
        group.start_save(incremental)
        for _ in range(4 * REPEATS):
            for rank in (first, 1 - first):
                if group.phase == "train" and group.saving[rank].outcome is None:
                    said(group, rank)
                    group.driver.work()
                    self.run(group.driver)
                    group.driver.remove()
                    self.run(group.driver)
        assert group.phase == "dead" or not group.is_saving, "a rank waits for ever"
        return outcomes(group)


def a_takeover(world: World, struck: int | None = None, fate: Fate = Fate.DONE) -> int:
    """Two ranks save three times, another driver takes over, its coordinator is started again; return the operations.

    Where one operation has a fate of its own, a save may fail or be told late, and the next one is committed.
    """
    script = Script(world, struck, fate)
    first, second = Driver(world), Driver(world)
    old = script.group(first)
    told = [script.save(old, incremental) for incremental in (False, True, True)]
    new = script.group(second)
    assert new.parent is not None
    if script.save(old, True) == ["failed", "failed"] and struck is not None:
        # The operation was refused that would have said that the group was left behind: the next save hears so.
        script.save(old, True)
    assert old.phase == "dead"
    assert new.parent.step >= max(id.step for id in world.promised)
    told.append(script.save(new, True))
    second.lose()
    second.revive()
    told += [script.save(new, True, first=1), script.save(new, False)]
    if told[-1] == ["failed", "failed"]:
        told.append(script.save(new, False))
    assert all(len(set(states)) == 1 for states in told), told
    assert sum(states == ["failed", "failed"] for states in told) <= (struck is not None), told
    assert read_history(world.reader).chain[-1].step == new.step
    return script.num_operations


def strike_each(monkeypatch, fates: list[Fate]) -> None:
    monkeypatch.setattr(cluster.coordinator, "DOUBT_REPEATS", REPEATS)
    world = World(last=2)
    num_operations = a_takeover(world)
    world.clean_up()
    assert num_operations > 100
    for struck, fate in product(range(num_operations), fates):
        world = World(last=2)
        try:
            a_takeover(world, struck, fate)
        except BaseException as error:
            error.add_note(f"operation {struck} of {num_operations}: {fate.value}")
            raise
        finally:
            world.clean_up()


def test_a_coordinator_may_die_at_any_operation(monkeypatch):
    # After an operation is before the next one; the last of a call and its answer are a place of their own.
    strike_each(monkeypatch, [Fate.KILLED_AFTER])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_coordinator_may_die_or_be_refused_or_lose_an_answer_at_any_operation(monkeypatch):
    strike_each(monkeypatch, [fate for fate in Fate if fate != Fate.DONE])


def life(world: World, driver: Driver) -> Iterator[None]:
    """A driver takes over and saves once; it stops before each operation that others can tell from their own view."""
    driver.begin(1)
    yield from visible_steps(world, driver)
    group = driver.groups[-1]
    if group.phase == "verify":
        group.restore()
        if group.phase == "start":
            driver.start(group)
            yield from visible_steps(world, driver)
    if group.phase == "train":
        yield from saving(world, group)


def saving(world: World, group: Group) -> Iterator[None]:
    group.train(1)
    group.start_save(True)
    said(group, 0)
    group.driver.work()
    yield from visible_steps(world, group.driver)
    said(group, 0)
    group.driver.remove()
    yield from visible_steps(world, group.driver)


def visible_steps(world: World, driver: Driver) -> Iterator[None]:
    while driver.calls:
        call = driver.calls[0]
        assert call.next is not None
        # What is read has one content for ever: it does not matter when, only listings and changes do.
        if call.next[0] not in ("get", "read_into"):
            yield
        driver.step(call)
        world.check()


def interleaved(world: World, lives: list[Iterator[None]], turns: tuple[int, ...]) -> None:
    """Let each in turn go so many operations, then the second to its end, then the first."""
    for place, num_steps in enumerate(turns):
        for _ in range(num_steps):
            next(lives[place % 2], None)
    for running in reversed(lives):
        for _ in running:
            pass
    world.check()


def start_together(turns: tuple[int, ...], with_zombie: bool, last: int) -> int:
    """After two checkpoints of an attempt, two more drivers start at once, or one while the attempt saves again."""
    world = World(last=last)
    try:
        zombie = Driver(world)
        old = trains(zombie, 1)
        saves(old)
        saves(old)
        lives = [saving(world, old) if with_zombie else life(world, Driver(world)), life(world, Driver(world))]
        interleaved(world, lives, turns)
        committed = {id for id in world.promised if id.attempt > 1}
        assert len(committed) <= 2
        # Nobody was killed: whoever won the highest number got through, and goes on from all that was promised.
        assert max(world.given) == max(id.attempt for id in committed)
        assert read_history(world.reader).chain[-1] == max(committed)
        return len(committed)
    except BaseException as error:
        error.add_note(f"turns of {turns} operations, with_zombie={with_zombie}, last={last}")
        raise
    finally:
        world.clean_up()


@pytest.mark.parametrize("with_zombie", [True, False])
def test_two_that_start_at_once_lose_nothing(with_zombie):
    for turns in product(range(MOST_OPERATIONS), (3, 9, MOST_OPERATIONS)):
        start_together(turns, with_zombie, last=1 + sum(turns) % 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("with_zombie", [True, False])
def test_two_that_start_at_once_and_take_turns_in_any_order_lose_nothing(with_zombie):
    for turns in product(range(MOST_OPERATIONS), range(1, MOST_OPERATIONS), (0, 1, 4)):
        start_together(turns, with_zombie, last=1 + sum(turns) % 2)
