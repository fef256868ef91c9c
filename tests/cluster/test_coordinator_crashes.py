"""A coordinator that dies between any two store operations, and two that start at once, in every order: nothing is lost.

Where `test_coordinator_model` draws what happens, these tests go through all of it for a small run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gated_store import Fate
from model_processes import Driver, Group
from reference_bank import World

from cluster.attempts import read_history
from cluster.manifest import ManifestId

ROUNDS = 20


@pytest.fixture
def world() -> Iterator[World]:
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
    while zombie.working and zombie.working.next != ("delete", ManifestId(1, 1).key):
        zombie.step(zombie.working)
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
