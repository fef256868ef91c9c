"""The learning rate and the bank momentum as pure functions of the step."""

from __future__ import annotations

import math

import pytest

from instdisc.config_method import BankConfig
from instdisc.config_sections import OptimConfig
from instdisc.schedule import bank_momentum, learning_rate, num_steps


def test_a_run_has_as_many_steps_as_cover_its_epochs():
    assert num_steps(OptimConfig(epochs=200, global_batch=256), 1_281_167) == math.ceil(200 * 1_281_167 / 256)
    assert num_steps(OptimConfig(epochs=1, global_batch=10), 20) == 2
    assert num_steps(OptimConfig(epochs=1, global_batch=10), 21) == 3
    assert num_steps(OptimConfig(epochs=0.001, global_batch=10), 21) == 1


def test_the_step_schedule_falls_at_its_epochs():
    config = OptimConfig(epochs=200, global_batch=100, lr=0.03, schedule="step", milestones=(120.0, 160.0))
    rates = [learning_rate(config, step, 1000) for step in (0, 1199, 1200, 1599, 1600, 1999)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_the_cosine_falls_from_the_full_rate_to_the_final_one():
    config = OptimConfig(epochs=10, global_batch=10, lr=0.5, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == 0.5
    assert rates[50] == pytest.approx(0.3)
    assert rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


def test_warm_up_rises_to_the_full_rate_and_never_stands_at_zero():
    config = OptimConfig(epochs=10, global_batch=10, lr=0.4, schedule="cosine", warmup_epochs=2)
    rates = [learning_rate(config, step, 100) for step in range(21)]
    assert rates[:20] == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(0.4)


def test_a_constant_rate_is_constant():
    config = OptimConfig(lr=0.2, schedule="constant")
    assert {learning_rate(config, step, 77) for step in range(0, 9999, 111)} == {0.2}


@pytest.mark.parametrize(("first", "last"), [(0.5, 0.9), (0.9, 0.0), (0.0, 0.99), (0.4, 0.4)])
def test_the_bank_momentum_goes_from_its_first_value_to_its_last_one_along_half_a_cosine(first, last):
    config, steps = BankConfig(momentum=first, final_momentum=last), 101
    found = [bank_momentum(config, step, steps) for step in range(steps)]
    assert found[0] == first
    assert found[-1] == pytest.approx(last, abs=1e-15)
    assert found == sorted(found, reverse=first > last)
    assert found[50] == pytest.approx((first + last) / 2)
    assert found[25] == pytest.approx(last + (first - last) * (1 + math.cos(math.pi / 4)) / 2)
    assert all(min(first, last) <= value <= max(first, last) < 1 for value in found)


def test_without_a_last_value_the_bank_momentum_stays():
    assert {bank_momentum(BankConfig(momentum=0.3), step, 50) for step in range(60)} == {0.3}


def test_the_bank_momentum_of_a_run_of_one_step_is_the_first_and_beyond_the_end_the_last():
    config = BankConfig(momentum=0.5, final_momentum=0.9)
    assert bank_momentum(config, 0, 1) == 0.5
    assert bank_momentum(config, 70, 50) == pytest.approx(0.9)
