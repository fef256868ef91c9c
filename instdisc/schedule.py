"""Learning rate and bank momentum of each step: pure functions of the configuration and the step."""

from __future__ import annotations

import math

from instdisc.config_method import BankConfig
from instdisc.config_sections import OptimConfig


def num_steps(config: OptimConfig, num_rows: int) -> int:
    """Return the steps of the whole run: the epochs over N rows in batches of G, the last one filled by the stream."""
    return max(1, math.ceil(config.epochs * num_rows / config.global_batch))


def learning_rate(config: OptimConfig, step: int, num_rows: int) -> float:
    """Return the learning rate of global step `step`, from the epochs that passed before it.

    Linear warm-up, then "constant", "step" (times gamma at every milestone) or "cosine" down to final_lr
    (arXiv 1608.03983, without restarts).
    """
    epoch = step * config.global_batch / num_rows
    if epoch < config.warmup_epochs:
        # The first step does not stand still: it takes the rate that the end of the step reaches.
        return config.lr * min(1.0, (step + 1) * config.global_batch / num_rows / config.warmup_epochs)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        progress = min(1.0, (epoch - config.warmup_epochs) / max(1e-12, config.epochs - config.warmup_epochs))
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def bank_momentum(config: BankConfig, step: int, steps: int) -> float:
    """Return the weight of the OLD row in the update of global step `step` of `steps`."""
    if config.final_momentum is None:
        return config.momentum
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps - 1))))
    return config.final_momentum + (config.momentum - config.final_momentum) * left
