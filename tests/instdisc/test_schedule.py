"""The learning rate and the bank momentum as pure functions of the step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import instdisc
from instdisc.config import TrainConfig, as_begun, lasting_digest
from instdisc.config_method import BankConfig
from instdisc.config_sections import OptimConfig
from instdisc.schedule import bank_momentum, learning_rate, multiples_passed, num_steps
from instdisc.train.loop import Training

typed_epochs = st.decimals(min_value="0.01", max_value=300, places=2)


def test_a_run_has_as_many_steps_as_cover_its_epochs():
    assert num_steps(OptimConfig(epochs=200, global_batch=256), 1_281_167) == math.ceil(200 * 1_281_167 / 256)
    assert num_steps(OptimConfig(epochs=1, global_batch=10), 20) == 2
    assert num_steps(OptimConfig(epochs=1, global_batch=10), 21) == 3
    assert num_steps(OptimConfig(epochs=0.001, global_batch=10), 21) == 1


@given(epochs=typed_epochs, num_rows=st.integers(2, 2000), batch=st.integers(2, 300))
def test_steps_are_counted_in_the_epochs_as_they_are_typed(epochs, num_rows, batch):
    expected = math.ceil(Fraction(str(epochs)) * num_rows / batch)
    assert num_steps(OptimConfig(epochs=float(epochs), global_batch=batch), num_rows) == max(1, expected)


@given(steps=st.integers(1, 5000), num_rows=st.integers(2, 2000), batch=st.integers(2, 300))
def test_epochs_that_were_computed_from_steps_are_so_many_steps(steps, num_rows, batch):
    assert num_steps(OptimConfig(epochs=steps * batch / num_rows, global_batch=batch), num_rows) == steps


def test_a_run_of_an_older_version_keeps_its_number_of_steps_and_its_checkpoints():
    config = instdisc.recipe("quickstart", **{"optim.epochs": 16.1, "optim.global_batch": 100})
    assert num_steps(config.optim, 1000) == 161
    document = json.loads(config.to_json())
    del document["optim"]["step_count"]
    stored = TrainConfig.from_json(json.dumps(document))
    assert num_steps(stored.optim, 1000) == 162  # what a product of floats came to
    assert as_begun(stored, config) == stored
    assert lasting_digest(stored) != lasting_digest(config)


@given(epochs=typed_epochs, num_rows=st.integers(2, 2000), batch=st.integers(2, 300))
def test_multiples_of_epochs_are_counted_exactly(epochs, num_rows, batch):
    steps = range(min(40, math.ceil(num_rows / batch * 9)))
    expected = [math.floor(Fraction(step * batch) / (Fraction(str(epochs)) * num_rows)) for step in steps]
    assert [multiples_passed(float(epochs), step, batch, num_rows) for step in steps] == expected


@pytest.mark.parametrize("every", ["0.1", "0.2", "0.3", "0.7", "1.1"])
def test_every_multiple_of_a_fraction_of_an_epoch_is_evaluated(every):
    config = instdisc.recipe("quickstart", **{"eval.every_epochs": every, "optim.global_batch": 100})

    def is_due(step):
        run = SimpleNamespace(
            config=config, state=SimpleNamespace(step=step), evaluator=1, num_steps=1000, num_rows=1000
        )
        return Training._evaluation_due(run)  # pyright: ignore[reportArgumentType]

    due = [step for step in range(1, 100) if is_due(step)]
    assert due == [step for step in range(1, 100) if Decimal(step) / 10 % Decimal(every) == 0]


def learning_rate_of_older_versions(config, step, num_rows):
    """The rates that versions before `step_count` gave, which a run that was begun then must keep to the bit."""
    epoch = step * config.global_batch / num_rows
    if epoch < config.warmup_epochs:
        return config.lr * min(1.0, (step + 1) * config.global_batch / num_rows / config.warmup_epochs)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        progress = min(1.0, (epoch - config.warmup_epochs) / max(1e-12, config.epochs - config.warmup_epochs))
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


@given(
    schedule=st.sampled_from(["constant", "step", "cosine"]),
    epochs=st.lists(typed_epochs, min_size=4, max_size=4).map(lambda drawn: [float(e) for e in sorted(drawn)]),
    num_rows=st.integers(2, 2000),
    batch=st.integers(2, 300),
)
def test_learning_rates_are_to_the_bit_those_of_older_versions(schedule, epochs, num_rows, batch):
    warmup, *milestones, end = epochs
    config = OptimConfig(
        schedule=schedule, warmup_epochs=warmup, milestones=tuple(milestones), epochs=end, global_batch=batch
    )
    borders = {round(epoch * num_rows / batch) + beside for epoch in epochs for beside in (-1, 0, 1)}
    for step in sorted(step for step in {0, *borders} if step >= 0):
        expected = learning_rate_of_older_versions(config, step, num_rows)
        assert learning_rate(config, step, num_rows) == expected
        assert learning_rate(replace(config, step_count="rounded"), step, num_rows) == expected


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
