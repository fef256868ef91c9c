"""What epochs are in steps, and the learning rate and bank momentum of each step: pure functions of the configuration.

Epochs are what was typed: 16.1 of them over 1,000 rows are 16,100 positions of the stream, not the product of floats,
which is a little more. Step t stands at position t*G.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

from instdisc.config_method import BankConfig
from instdisc.config_sections import OptimConfig

_ROUNDING = Fraction(1, 10**13)
"""Relative error of a few operations on floats of 64 bits."""


def num_steps(config: OptimConfig, num_rows: int) -> int:
    """Return the steps of the whole run: the epochs over N rows in batches of G, the last one filled by the stream."""
    if config.step_count == "rounded":
        return max(1, math.ceil(config.epochs * num_rows / config.global_batch))
    return max(1, first_step_at(config.epochs, config.global_batch, num_rows))


@lru_cache
def first_step_at(epochs: float, global_batch: int, num_rows: int) -> int:
    """Return the first step before which so many epochs have passed."""
    return math.ceil(_positions(epochs, num_rows) / global_batch)


def multiples_passed(every_epochs: float, step: int, global_batch: int, num_rows: int) -> int:
    """Return how many multiples of so many epochs have passed before step `step`."""
    apart = _positions(every_epochs, num_rows)
    return step * global_batch * apart.denominator // apart.numerator


@lru_cache
def _positions(epochs: float, num_rows: int) -> Fraction:
    """Return how many positions so many epochs are: of the number that a person writes for the float.

    A float that was computed (20 * 14 / 103 epochs of 103 rows) misses a whole position by its last bits: it is meant.
    """
    exact = Fraction(repr(float(epochs))) * num_rows
    nearest = round(exact)
    return Fraction(nearest) if abs(exact - nearest) <= exact * _ROUNDING else exact


def learning_rate(config: OptimConfig, step: int, num_rows: int) -> float:
    """Return the learning rate of global step `step`, from the epochs that passed before it.

    Linear warm-up, then "constant", "step" (times gamma at every milestone) or "cosine" down to final_lr
    (arXiv 1608.03983, without restarts).
    """
    batch = config.global_batch
    if step < first_step_at(config.warmup_epochs, batch, num_rows):
        # The first step does not stand still: it takes the rate that the end of the step reaches.
        return config.lr * min(1.0, (step + 1) * batch / num_rows / config.warmup_epochs)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= first_step_at(m, batch, num_rows) for m in config.milestones)
    if config.schedule == "cosine":
        epoch = step * batch / num_rows
        progress = min(1.0, (epoch - config.warmup_epochs) / max(1e-12, config.epochs - config.warmup_epochs))
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def bank_momentum(config: BankConfig, step: int, steps: int) -> float:
    """Return the weight of the OLD row in the update of global step `step` of `steps`."""
    if config.final_momentum is None:
        return config.momentum
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps - 1))))
    return config.final_momentum + (config.momentum - config.final_momentum) * left
