"""Recipes: functions whose docstring states the command, the hardware, the time, the expected figure and its source.

A recipe's name is its function's name with dashes; `recipe(name, **overrides)` makes its configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from dataloading.augment import AugmentConfig
from instdisc.config import DECIDED_AT_FIRST_START, TrainConfig, require_fitting_images
from instdisc.config_effects import idle_fields, refuse_idle
from instdisc.config_method import ObjectiveConfig
from instdisc.config_sections import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SystemConfig,
)
from instdisc.overrides import as_typed, flatten

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
# lemniscate's cifar.py: crop, jitter, then grayscale; its flip is commented out.
CIFAR_AUGMENT = AugmentConfig(
    size=32,
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.4),
    grayscale_probability=0.2,
    flip_probability=0.0,
    order=("jitter", "grayscale"),
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
)


def quickstart() -> TrainConfig:
    """The embedded demo images and a small convolutional net with the exact softmax: the whole product in minutes.

    Command: `instdisc train`. Hardware and time: two CPU cores, 2 min with the start of Ray. Expected: 59.7, 63.0 and
    51.9 % kNN with seeds 0, 1, 2 (k=50, images re-encoded); raw pixels 14.8 %, untrained encoder 16.4 to 17.9 %, the
    same net trained with labels 99.4 to 99.8 % (tests/benchmarks/measure_supervised.py).
    Source: our own. Three things differ from the paper's recipes. The learning rate rises over 9 of the 22 epochs: the
    bank's rows are random, then an epoch old, and a network that moves fast leaves them behind (24 epochs at 0.012,
    seeds 0 and 1: warm-up over 3 epochs 49.7 and 52.5 %, over 6 53.5 and 60.2 %, over 10 55.8 and 68.7 %). The head's
    output is normalised ("linear-norm"; 20 epochs, one seed, 1 epoch of warm-up: 34.5 %, without 29.2 %). And hue turns
    over the full circle, since colour would be learned first.
    """
    return TrainConfig(
        recipe="quickstart",
        data=DataConfig(kind="demo"),
        augment=AugmentConfig(
            size=32,
            scale=(0.25, 1.0),
            jitter=(0.4, 0.4, 0.4, 0.5),
            grayscale_probability=0.3,
            flip_probability=0.5,
            order=("jitter", "grayscale"),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        model=ModelConfig(architecture="convnet-small", width=24, head="linear-norm"),
        objective=ObjectiveConfig(name="softmax", temperature=0.2),
        optim=OptimConfig(
            epochs=22,
            global_batch=128,
            norm_group=64,
            lr=0.02,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_epochs=9,
        ),
        eval=EvalConfig(every_epochs=11, baselines=True, k=50, resize=32, crop=32),
        checkpoint=CheckpointConfig(every_minutes=0.5),
        system=SystemConfig(log_every=20, channels_last="on"),
    )


def cifar10_npid() -> TrainConfig:
    """The paper's CIFAR-10 model with the exact non-parametric softmax.

    Command: `instdisc train cifar10-npid` (fetches CIFAR-10; `--data.root DIR`: it is in DIR, binary or parquet form).
    Hardware and time: one GPU; not measured here. Expected: 80.8 % kNN (k=200) after 200 epochs, one view, τ = 0.1;
    the paper's table 2 has 80.8 % for the non-parametric softmax, an independent run 80.64 % (leftthomas/NPID).
    Source: arXiv 1805.01978, section 4.1, and its released cifar.py (batch 128, lr 0.03, weight decay 5e-4, momentum
    0.9, falls at epochs 120 and 160, bank momentum 0.5, ResNet-18 with a 3x3 stem).
    """
    return TrainConfig(
        recipe="cifar10-npid",
        data=DataConfig(kind="cifar10", root="data/cifar10", download=True),
        augment=CIFAR_AUGMENT,
        model=ModelConfig(architecture="resnet18", stem="cifar"),
        objective=ObjectiveConfig(name="softmax", temperature=0.1),
        optim=OptimConfig(
            epochs=200, global_batch=128, norm_group=128, lr=0.03, weight_decay=5e-4, milestones=(120.0, 160.0)
        ),
        eval=EvalConfig(every_epochs=5, k=200, temperature=0.1, resize=32, crop=32),
    )


def cifar10_nce() -> TrainConfig:
    """The paper's CIFAR-10 model with NCE and 4,096 negatives.

    Command: `instdisc train cifar10-nce`. Hardware and time: one GPU; not measured here. Expected:
    80.4 % kNN (paper, table 2, m = 4096). With the paper's constant Z training diverges on data sets this small
    (measured on 10,000 images), so Z is followed by a running mean here; `--objective.z constant` is the paper's.
    Source: arXiv 1805.01978, section 4.1; the running mean: github.com/HobbitLong/CMC/issues/23.
    """
    return cifar10_npid().with_overrides(
        {
            "recipe": "cifar10-nce",
            "objective.name": "nce",
            "objective.num_negatives": 4096,
            "objective.z": "ema",
        }
    )


def cifar10_cpu() -> TrainConfig:
    """CIFAR-10's first 10,000 training images with a small net, for a laptop's processor.

    Command: `instdisc train cifar10-cpu`. Hardware and time: two CPU cores, 6 min 10 s. Expected:
    50.1 % kNN (k=200, τ=0.1, all 10,000 test images re-encoded; bank 48.6 %, raw pixels 35.3 %, untrained encoder
    34.0 %; one seed), 43.1 % after 8 epochs and 46.8 % after 16.
    Source: the paper's CIFAR-10 augmentation with flips, and the method of `quickstart`.
    """
    return cifar10_npid().with_overrides(
        {
            "recipe": "cifar10-cpu",
            "data.max_rows": 10_000,
            "augment.flip_probability": 0.5,
            "model.architecture": "convnet-small",
            "model.width": 24,
            "model.head": "linear-norm",
            "objective.temperature": 0.2,
            "optim.epochs": 32,
            "optim.norm_group": 64,
            "optim.lr": 0.02,
            "optim.schedule": "cosine",
            "optim.warmup_epochs": 12,
            "eval.every_epochs": 8,
            "eval.baselines": True,
            "checkpoint.every_minutes": 1.0,
            "system.channels_last": "on",
        }
    )


def imagenet_npid_r18() -> TrainConfig:
    """The paper's ImageNet model, ResNet-18, NCE with 4,096 negatives.

    Command: `instdisc train imagenet-npid-r18 --data.root DIR --workers 8`; DIR holds train/<class>/, val/<class>/.
    Hardware and time: GPUs; not measured here. Expected: kNN 41.0 % (released model, repository's README), linear
    probe on the last block 44.5 %. Source: arXiv 1805.01978, section 4.2, and its released main.py (batch 256, lr 0.03,
    weight decay 1e-4, falls at epochs 120 and 160, τ = 0.07, bank momentum 0.5, constant Z).
    """
    return TrainConfig(
        recipe="imagenet-npid-r18",
        data=DataConfig(kind="folder", root="data/imagenet"),
        augment=AugmentConfig(),
        model=ModelConfig(architecture="resnet18", stem="imagenet"),
        objective=ObjectiveConfig(name="nce", temperature=0.07, num_negatives=4096, z="constant"),
        optim=OptimConfig(
            epochs=200, global_batch=256, norm_group=32, lr=0.03, weight_decay=1e-4, milestones=(120.0, 160.0)
        ),
        eval=EvalConfig(every_epochs=10, k=200, temperature=0.07, resize=256, crop=224),
    )


def imagenet_npid_r50() -> TrainConfig:
    """The paper's ImageNet model, ResNet-50, NCE with 4,096 negatives.

    Command: `instdisc train imagenet-npid-r50 --data.root DIR --workers 8`. Hardware and time: GPUs; not measured here.
    Expected: kNN 46.5 % (46.8 % for the released model), linear probe 54.0 %. Source: as `imagenet_npid_r18`.
    """
    return imagenet_npid_r18().with_overrides({"recipe": "imagenet-npid-r50", "model.architecture": "resnet50"})


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    function.__name__.replace("_", "-"): function
    for function in (quickstart, cifar10_npid, cifar10_nce, cifar10_cpu, imagenet_npid_r18, imagenet_npid_r50)
}


def recipe(name: str, **overrides: Any) -> TrainConfig:
    """Return a recipe's configuration with dotted overrides: recipe("cifar10-cpu", **{"optim.epochs": 5}).

    As `made_from`. Raises ConfigError as well for an override that nothing would read.
    """
    config = made_from(name, overrides)
    refuse_idle(config, overrides)
    require_fitting_images(config)
    return config


def made_from(name: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return a recipe's configuration with dotted overrides.

    Who names a `data.root` has images there: with one among the overrides nothing is downloaded, and what it holds is
    found out, unless they say otherwise. A normalisation group belongs to its batch: with another one among the
    overrides it is left open. Raises ConfigError for an unknown recipe or field, naming the likely one.
    """
    if name not in RECIPES:
        likely = difflib.get_close_matches(name, RECIPES, n=1)
        advice = f"did you mean {likely[0]}? " if likely else ""
        raise ConfigError(f"unknown recipe {name!r}: {advice}expected one of {', '.join(RECIPES)}")
    config = RECIPES[name]()
    if "data.root" in overrides and config.data.root is not None:
        overrides = {"data.kind": "auto", "data.download": False, **overrides}
    made = config.with_overrides({"optim.norm_group": None, **overrides})
    if "optim.norm_group" in overrides or made.optim.global_batch != config.optim.global_batch:
        return made
    return made.with_overrides({"optim.norm_group": config.optim.norm_group})


def starting_point(config: TrainConfig) -> TrainConfig:
    """Return the configuration that one was made from: that of its recipe, or the defaults."""
    return RECIPES.get(config.recipe, TrainConfig)()


def left_open(config: TrainConfig) -> frozenset[str]:
    """Return the fields that a run's first start decided and that the configuration leaves at its recipe's values."""
    made, asked = flatten(starting_point(config)), flatten(config)
    return frozenset(name for name in DECIDED_AT_FIRST_START if asked[name] == made[name])


def overrides_of(config: TrainConfig) -> dict[str, str] | None:
    """Return the overrides, as typed, that make a configuration from its recipe; None where it is none of ours.

    Left out are fields that nothing reads, and what a run decided at its first start where the recipe leaves it open:
    a run that goes on keeps it.
    """
    if config.recipe not in RECIPES:
        return None
    asked = flatten(config)
    overrides: dict[str, str] = {}
    for _ in range(2):  # a root or a batch of one's own changes what the recipe says of other fields
        made = flatten(made_from(config.recipe, overrides))
        open_fields = {name for name in DECIDED_AT_FIRST_START if made[name] in (None, "auto")}
        overrides |= {
            name: as_typed(value)
            for name, value in asked.items()
            if made[name] != value and name not in open_fields | idle_fields(config)
        }
    return overrides
