"""When a field of the configuration has an effect: what nothing would read is refused, not accepted and ignored.

Every field stands in `EFFECTS`, so that a new one has to say when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataloading.augment import AugmentConfig
from dataloading.storage import is_remote
from instdisc.config_sections import ConfigError
from instdisc.overrides import flatten

if TYPE_CHECKING:
    from instdisc.config import TrainConfig


@dataclass(frozen=True)
class Effect:
    """Where a field is read. where: in words that follow "has an effect only with"."""

    where: str
    holds: Callable[[TrainConfig], bool]


ALWAYS = Effect("any configuration", lambda config: True)

_TORCHVISION_RESNET = re.compile(r"resnet\d+")
_NCE = Effect("objective.name=nce", lambda config: config.objective.name == "nce")
_SAMPLED = Effect("objective.name=nce or infonce", lambda config: config.objective.name != "softmax")
_INFONCE = Effect("objective.name=infonce", lambda config: config.objective.name == "infonce")
_DEBIASED = Effect("objective.denominator=debiased", lambda config: config.objective.denominator == "debiased")
_SOFTMAX = Effect("objective.name=softmax", lambda config: config.objective.name == "softmax")
_STEPS = Effect("optim.schedule=step", lambda config: config.optim.schedule == "step")
_FALLS = Effect(
    "optim.schedule=step and some optim.milestones",
    lambda config: config.optim.schedule == "step" and bool(config.optim.milestones),
)
_COSINE = Effect("optim.schedule=cosine", lambda config: config.optim.schedule == "cosine")
_MOMENTUM = Effect("optim.momentum above 0", lambda config: config.optim.momentum > 0)
_MAPPED = Effect("bank.device=mapped", lambda config: config.bank.device == "mapped")
_BLOCK = Effect("data.order=block", lambda config: config.data.order == "block")
_READ_FROM_ROOT = Effect(
    "another data.kind than demo, since code makes those images (auto recognises what the root holds)",
    lambda config: config.data.kind != "demo",
)
_DECODED = Effect(
    "another data.kind than demo, whose images are not decoded", lambda config: config.data.kind != "demo"
)
_FETCHED = Effect("data.kind=cifar10 or cifar100", lambda config: config.data.kind in ("cifar10", "cifar100"))
_CACHED = Effect("remote images (data.root s3://…)", lambda config: _fills_cache(config))
_CACHE_ON = Effect(
    "remote images (data.root s3://…) and data.cache_gb other than 0",
    lambda config: _fills_cache(config) and config.data.cache_gb != 0,
)
_TORCHVISION = Effect(
    "a ResNet of torchvision (resnet18 … resnet152)",
    lambda config: _TORCHVISION_RESNET.fullmatch(config.model.architecture) is not None,
)
_SMALL = Effect(
    "model.architecture=resnet-small or convnet-small", lambda config: config.model.architecture.endswith("-small")
)
_SMALL_RESNET = Effect("model.architecture=resnet-small", lambda config: config.model.architecture == "resnet-small")
_JITTER = Effect("an augment.jitter above 0", lambda config: max(config.augment.jitter) > 0)
_JITTERED = Effect("augment.jitter_probability above 0", lambda config: config.augment.jitter_probability > 0)
_TWO_COLOURINGS = Effect(
    "augment.grayscale_probability and augment.jitter_probability above 0",
    lambda config: config.augment.grayscale_probability > 0 and _jitters(config.augment),
)
_BLURRED = Effect("augment.blur_probability above 0", lambda config: config.augment.blur_probability > 0)
_LOCAL = Effect("augment.num_local_views above 0", lambda config: config.augment.num_local_views > 0)
_BY_TIME = Effect("checkpoint.max_cost=none", lambda config: config.checkpoint.max_cost is None)


def _fills_cache(config: TrainConfig) -> bool:
    # The demo images are kept there as well.
    makes_images = config.data.kind == "demo" or (config.data.kind == "auto" and config.data.root is None)
    return makes_images or is_remote(config.data.root)


def _jitters(augment: AugmentConfig) -> bool:
    return augment.jitter_probability > 0 and max(augment.jitter) > 0


EFFECTS: dict[str, Effect] = {
    "recipe": ALWAYS,
    "seed": ALWAYS,
    "data.kind": ALWAYS,
    "data.root": _READ_FROM_ROOT,
    "data.download": _FETCHED,
    "data.train_split": ALWAYS,
    "data.test_split": ALWAYS,
    "data.config": _READ_FROM_ROOT,
    "data.layout_rule": ALWAYS,
    "data.max_rows": ALWAYS,
    "data.max_test_rows": ALWAYS,
    "data.backend": ALWAYS,
    "data.max_bad_share": ALWAYS,
    "data.order": ALWAYS,
    "data.orientation": _DECODED,
    "data.deep_samples": _DECODED,
    "data.lanes": _BLOCK,
    "data.window": _BLOCK,
    "data.cache_dir": _CACHE_ON,
    "data.cache_gb": _CACHED,
    "augment.size": ALWAYS,
    "augment.scale": ALWAYS,
    "augment.ratio": ALWAYS,
    "augment.jitter": _JITTERED,
    "augment.jitter_probability": _JITTER,
    "augment.grayscale_probability": ALWAYS,
    "augment.flip_probability": ALWAYS,
    "augment.order": _TWO_COLOURINGS,
    "augment.blur_probability": ALWAYS,
    "augment.blur_sigma": _BLURRED,
    "augment.solarize_probability": ALWAYS,
    "augment.mean": ALWAYS,
    "augment.std": ALWAYS,
    "augment.num_views": ALWAYS,
    "augment.num_local_views": ALWAYS,
    "augment.local_size": _LOCAL,
    "augment.local_scale": _LOCAL,
    "model.architecture": ALWAYS,
    "model.stem": _TORCHVISION,
    "model.feature_dim": ALWAYS,
    "model.head": ALWAYS,
    "model.width": _SMALL,
    "model.blocks": _SMALL_RESNET,
    "bank.momentum": ALWAYS,
    "bank.final_momentum": ALWAYS,
    "bank.dtype": ALWAYS,
    "bank.device": ALWAYS,
    "bank.mapped_dir": _MAPPED,
    "bank.fetch_ahead": ALWAYS,
    "objective.name": ALWAYS,
    "objective.temperature": ALWAYS,
    "objective.num_negatives": _SAMPLED,
    "objective.per_sample": _SAMPLED,
    "objective.hard_negatives": _INFONCE,
    "objective.denominator": _INFONCE,
    "objective.debias_prior": _DEBIASED,
    "objective.score_mib": _SOFTMAX,
    "objective.z": _NCE,
    "objective.z_decay": _NCE,
    "objective.proximal_weight": _NCE,
    "optim.epochs": ALWAYS,
    "optim.global_batch": ALWAYS,
    "optim.norm_group": ALWAYS,
    "optim.lr": ALWAYS,
    "optim.momentum": ALWAYS,
    "optim.weight_decay": ALWAYS,
    "optim.nesterov": _MOMENTUM,
    "optim.schedule": ALWAYS,
    "optim.milestones": _STEPS,
    "optim.gamma": _FALLS,
    "optim.warmup_epochs": ALWAYS,
    "optim.final_lr": _COSINE,
    "optim.step_count": ALWAYS,
    "eval.every_epochs": ALWAYS,
    "eval.baselines": ALWAYS,
    "eval.k": ALWAYS,
    "eval.temperature": ALWAYS,
    "eval.resize": ALWAYS,
    "eval.crop": ALWAYS,
    "eval.batch": ALWAYS,
    "checkpoint.every_steps": ALWAYS,
    "checkpoint.every_minutes": _BY_TIME,
    "checkpoint.max_cost": ALWAYS,
    "checkpoint.overlap": ALWAYS,
    "checkpoint.bandwidth_share": ALWAYS,
    "checkpoint.incremental": ALWAYS,
    "checkpoint.keep_last": ALWAYS,
    "checkpoint.keep_every_steps": ALWAYS,
    "checkpoint.keep_best": ALWAYS,
    "elastic.start_settle_s": ALWAYS,
    "elastic.grow_settle_s": ALWAYS,
    "elastic.resize_interval_s": ALWAYS,
    "elastic.silence_s": ALWAYS,
    "system.precision": ALWAYS,
    "system.channels_last": ALWAYS,
    "system.log_every": ALWAYS,
    "system.tensorboard": ALWAYS,
    "system.bank_checks": ALWAYS,
}
"""Of each field the configurations in which it is read. What depends on the machines as well is told by
`start_advice`."""


def idle_fields(config: TrainConfig) -> frozenset[str]:
    """Return the fields that nothing reads in this configuration."""
    return frozenset(name for name, effect in EFFECTS.items() if effect is not ALWAYS and not effect.holds(config))


def refuse_idle(config: TrainConfig, asked: Collection[str]) -> None:
    """Raise ConfigError where one of the fields that were asked for is not read and is not at its default."""
    values, defaults = flatten(config), flatten(type(config)())
    idle = [name for name in values if name in idle_fields(config).intersection(asked)]
    found = [name for name in idle if values[name] not in (None, defaults[name])]  # None asks for nothing
    if found:
        reasons = [
            f"{name}: found {values[name]!r}, which has an effect only with {EFFECTS[name].where}" for name in found
        ]
        raise ConfigError(f"{'; '.join(reasons)}. Give that, or leave {' and '.join(found)} out")
