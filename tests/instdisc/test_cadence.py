"""When a save is due by the clock."""

from __future__ import annotations

import math

import pytest

from instdisc.config_sections import CheckpointConfig
from instdisc.train.cadence import FIRST_SAVE_S, LONGEST_S, SHORTEST_S, Cadence


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def cadence(**fields) -> tuple[Cadence, Clock]:
    clock = Clock()
    made = Cadence(CheckpointConfig(**fields), clock)
    made.start(0)
    return made, clock


def test_minutes_count_from_the_moment_when_the_last_save_was_taken():
    made, clock = cadence(every_minutes=2.0)
    clock.now_s += 119
    assert not made.is_due()
    clock.now_s += 1
    assert made.is_due()
    made.saved()
    assert not made.is_due()


def test_without_minutes_the_clock_decides_nothing():
    made, clock = cadence(every_minutes=None, every_steps=3)
    clock.now_s += 1e9
    assert not made.is_due()
    assert made.interval_s == math.inf


def train(
    made: Cadence, clock: Clock, seconds: float, *, step_s: float, slowed_s: float, write_s: float, stall_s: float
):
    """Train for some time as the loop does, with looks each 2 s; return (seconds that saves cost, all seconds)."""
    started_s, step, saving_until_s, cost_s = clock.now_s, 0, -1.0, 0.0
    while clock.now_s - started_s < seconds:
        look_s = clock.now_s + 2.0
        while clock.now_s < look_s:
            beside = clock.now_s < saving_until_s
            clock.now_s += slowed_s if beside else step_s
            cost_s += slowed_s - step_s if beside else 0.0
            step += 1
        is_saving = clock.now_s < saving_until_s
        made.look(step, is_saving)
        if saving_until_s >= 0 and not is_saving:
            made.committed(stall_s, write_s)
            saving_until_s = -1.0
        if made.is_due() and saving_until_s < 0:
            clock.now_s += stall_s
            cost_s += stall_s
            saving_until_s = clock.now_s + write_s
            made.saved()
    return cost_s, clock.now_s - started_s


@pytest.mark.parametrize(("slowed_s", "write_s", "stall_s"), [(0.15, 20.0, 0.05), (0.1, 30.0, 1.0), (0.12, 8.0, 0.0)])
def test_saves_cost_no_more_than_the_share_that_was_asked_for(slowed_s, write_s, stall_s):
    made, clock = cadence(max_cost=0.03)
    train(made, clock, 1000, step_s=0.1, slowed_s=slowed_s, write_s=write_s, stall_s=stall_s)  # it measures
    cost_s, all_s = train(made, clock, 20_000, step_s=0.1, slowed_s=slowed_s, write_s=write_s, stall_s=stall_s)
    assert cost_s / all_s <= 0.035
    assert cost_s / all_s >= 0.01, "and they are not much rarer than they may be"


def test_the_tuned_interval_stays_within_bounds_and_starts_somewhere():
    made, _clock = cadence(max_cost=0.03)
    assert made.interval_s == FIRST_SAVE_S
    made.committed(0.0, 1.0)
    assert made.interval_s == SHORTEST_S
    for _ in range(20):
        made.committed(1e6, 1.0)
    assert made.interval_s == LONGEST_S


def test_what_is_not_training_is_not_measured():
    made, clock = cadence(max_cost=0.03)
    for step in range(1, 11):
        clock.now_s += 1.0
        made.look(10 * step, False)
    made.look(110, True)
    clock.now_s += 500  # an evaluation
    made.pause()
    clock.now_s += 1.0
    made.look(120, True)
    made.committed(0.0, 100.0)
    assert made.interval_s == SHORTEST_S, "the steps beside the save were as fast as the others"
