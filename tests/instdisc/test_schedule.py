"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

import pytest

from instdisc.config_sections import OptimConfig
from instdisc.schedule import learning_rate, num_steps


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
