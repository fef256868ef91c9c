"""The sections of a run's configuration: frozen dataclasses that check their fields at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cluster.credentials import without_credentials
from dataloading.choices import BACKENDS, DEEP_SAMPLES, ORDERS, ORIENTATIONS, SOURCE_KINDS
from dataloading.layout import RULE
from dataloading.order import OrderConfig
from dataloading.pixel_rules import BEFORE_RULES, PixelRules
from instdisc.overrides import BEFORE

ARCHITECTURES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "alexnet", "vgg16"),
    *("resnet-small", "convnet-small"),
)
HEADS = ("linear", "linear-norm")
SCHEDULES = ("constant", "step", "cosine")
METRICS = {"knn_top1": "higher", "knn_bank_top1": "higher"}
"""What evaluations measure, and which values of it are better."""
STEP_COUNTS = ("exact", "rounded")
OVERLAPS = ("skip", "wait")
_LONGEST_SIDE = 65_536


class ConfigError(ValueError):
    """A value of the configuration that cannot be: names the field, what was found and what is expected."""


def check(section: str, *checks: tuple[str, Any, bool, str]) -> None:
    for name, found, good, expected in checks:
        if not good:
            raise ConfigError(f"{section}.{name}: found {found!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are."""

    kind: str = "auto"
    """One of `SOURCE_KINDS`; "auto" recognises packed images, a folder of images, WebDataset tars, CIFAR's binary files
    and parquet files."""
    root: str | None = None
    """Folder or URI (s3://…) that holds the data; not used by the embedded demo data."""
    download: bool = False
    """For the kinds "cifar10" and "cifar100": fetch the images where `root` is missing or empty."""
    train_split: str = "train"
    """Split that is trained on and that the gallery of kNN is made of: a word such as train, a name of your own, a path
    below the root such as ./train, or "." for all images of the root with its folders as classes."""
    test_split: str = "test"
    """Split whose images are the queries of kNN: named as `train_split` is; "test" means val where there is none."""
    config: str | None = None
    """Configuration, where the root holds several data sets: a folder or a word of their names; "." for all of them."""
    layout_rule: int = field(default=RULE, metadata={BEFORE: 1})
    """Version of the rule by which splits, configurations and classes are found (dataloading/README.md). A run keeps
    that of its start."""
    max_rows: int | None = None
    """Train on so many images only, spread over the list (of CIFAR's files and the demo, and by layout rule 1, on the
    first)."""
    max_test_rows: int | None = None
    """Query with so many test images only, chosen in the same way."""
    backend: str = "auto"
    """"auto": batched torch for small images; for encoded ones DALI on a GPU and nvImageCodec, DALI's decoders, on a
    CPU. "dali", "nvimgcodec" or "torch" (torchvision reference) choose."""
    orientation: str = field(default="exif", metadata={BEFORE: BEFORE_RULES.orientation})
    """"exif": images are turned as their EXIF data say, in all formats and decoders. "tiff": TIFF files only, as
    versions without this field did. A new run on packed images takes what their manifest states."""
    deep_samples: str = field(default="scaled", metadata={BEFORE: BEFORE_RULES.deep_samples})
    """Samples of more than 8 bits. "scaled": the range that the format states becomes 0 to 255, and images that state
    none (32-bit and signed values) are damaged. "clipped": some formats are clipped at 255, as versions without this
    field did. A new run on packed images takes what their manifest states."""
    max_bad_share: float = 0.1
    """Damaged images are replaced and reported; more than this share of the training images ends the run."""
    order: str = "permutation"
    """Order of the images in an epoch, fixed at a run's first start: "permutation", or "block" for packed images beyond
    what the disk of a node holds, where a node downloads its share of the shards only."""
    lanes: int = 16
    """Block order: parts into which the shards are divided, each supplying a fixed part of every batch; at least as
    many as nodes. Fixed at the first start."""
    window: int = 4
    """Block order: shards of a lane whose images are mixed at a time. Fixed at the first start."""
    cache_dir: str | None = None
    """Where shards of remote images are kept on every machine; None: $INSTDISC_CACHE, else ~/.cache/instdisc."""
    cache_gb: float | None = None
    """Most bytes (10^9) of shards kept there, 0 for none; None: all of the disk but 5 %."""

    def __post_init__(self) -> None:
        check(
            "data",
            ("kind", self.kind, self.kind in SOURCE_KINDS, f"one of {', '.join(SOURCE_KINDS)}"),
            ("root", self.root, self.root is None or bool(self.root.strip()), "a folder (an empty text is none)"),
            (
                "root",
                None if self.root is None else without_credentials(self.root),
                self.root is None or without_credentials(self.root) == self.root,
                "a URI without a user name, password or signature: it is stored with the run. Set them in the "
                "environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, …)",
            ),
            ("train_split", self.train_split, bool(self.train_split.strip()), "the name of a split"),
            ("test_split", self.test_split, bool(self.test_split.strip()), "the name of a split"),
            ("config", self.config, self.config is None or bool(self.config.strip()), "a name, or none"),
            ("layout_rule", self.layout_rule, self.layout_rule in (1, RULE), f"1 or {RULE}"),
            ("backend", self.backend, self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            ("orientation", self.orientation, self.orientation in ORIENTATIONS, f"one of {', '.join(ORIENTATIONS)}"),
            ("deep_samples", self.deep_samples, self.deep_samples in DEEP_SAMPLES, f"one of {', '.join(DEEP_SAMPLES)}"),
            ("order", self.order, self.order in ORDERS, f"one of {', '.join(ORDERS)}"),
            (
                "order",
                self.order,
                self.order == "permutation" or self.kind in ("auto", "packed"),
                f"permutation for kind {self.kind}: packed images alone have shards to go by",
            ),
            (
                "backend",
                self.backend,
                self.kind != "demo" or self.backend in ("auto", "memory", "torch"),
                "auto, memory or torch for kind demo, whose images are not encoded",
            ),
            ("lanes", self.lanes, self.lanes >= 1, "at least 1"),
            ("window", self.window, self.window >= 1, "at least 1"),
            (
                "cache_dir",
                None if self.cache_dir is None else without_credentials(self.cache_dir),
                self.cache_dir is None or "://" not in self.cache_dir,
                "a folder on a local disk, or none",
            ),
            ("cache_gb", self.cache_gb, self.cache_gb is None or self.cache_gb >= 0, "at least 0, or none"),
            ("max_bad_share", self.max_bad_share, 0 <= self.max_bad_share < 1, "0 <= share < 1"),
            ("max_rows", self.max_rows, self.max_rows is None or self.max_rows >= 2, "at least 2"),
            ("max_test_rows", self.max_test_rows, self.max_test_rows is None or self.max_test_rows >= 1, "at least 1"),
        )

    @property
    def order_config(self) -> OrderConfig:
        """The order as the data path takes it."""
        return OrderConfig(self.order, self.lanes, self.window)

    @property
    def pixel_rules(self) -> PixelRules:
        """How pixels are made of the images' bytes."""
        return PixelRules(self.orientation, self.deep_samples)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder: image to a unit vector."""

    architecture: str = "resnet18"
    """One of `ARCHITECTURES`; for CPUs "resnet-small", a basic-block ResNet of `width` and `blocks`, and
    "convnet-small", four convolutions that start at `width` channels."""
    stem: str = "imagenet"
    """"imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no pooling); ResNets only."""
    feature_dim: int = 128
    """D, length of the feature (arXiv 1805.01978: 128)."""
    head: str = "linear"
    """"linear" (the paper's) or "linear-norm": BatchNorm without affine parameters after it, which takes the part away
    that all features share. A young network's features are nearly all alike; without that part its bank is worth
    comparing with from the first epoch on."""
    width: int = 16
    """Channels of the first stage of "resnet-small" and of "convnet-small"."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Basic blocks per stage of "resnet-small"; channels double from stage to stage."""

    @property
    def min_side(self) -> int:
        """Side in pixels of the smallest images that the architecture takes."""
        return {"alexnet": 63, "vgg16": 32, "convnet-small": 7}.get(self.architecture, 1)

    @property
    def min_channels(self) -> int:
        """Channels of the narrowest layer."""
        return self.width if self.architecture in ("resnet-small", "convnet-small") else 64

    def __post_init__(self) -> None:
        known = f"one of {', '.join(ARCHITECTURES)}"
        check(
            "model",
            ("architecture", self.architecture, self.architecture in ARCHITECTURES, known),
            ("stem", self.stem, self.stem in ("imagenet", "cifar"), "imagenet or cifar"),
            ("head", self.head, self.head in HEADS, f"one of {', '.join(HEADS)}"),
            ("feature_dim", self.feature_dim, self.feature_dim >= 2, "at least 2"),
            ("width", self.width, self.width >= 1, "at least 1"),
            ("blocks", self.blocks, bool(self.blocks) and min(self.blocks) >= 1, "at least one block in each stage"),
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD, its schedule, and the batch."""

    epochs: float = 200
    """Passes over the training images."""
    step_count: str = field(default="exact", metadata={BEFORE: "rounded"})
    """How many steps `epochs` are: "exact", the number as it is typed times the images, or "rounded", a product of
    floats, which may be a step more; runs that were begun with it keep it."""
    global_batch: int = 256
    """G, images per step over all workers; constant whatever the number of workers."""
    norm_group: int | None = None
    """Consecutive positions of the global batch that share BatchNorm statistics; None: G / the largest number of
    workers of the first start, rounded up. Fixed from then on, so that training does not depend on the workers. Each
    worker needs a group of its own."""
    lr: float = 0.03
    """Learning rate for the global batch as configured (not scaled by it)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on all weights."""
    nesterov: bool = False
    """Nesterov momentum."""
    schedule: str = "step"
    """"constant", "step" (times `gamma` at each of `milestones`) or "cosine" (to `final_lr`)."""
    milestones: tuple[float, ...] = (120.0, 160.0)
    """Epochs at which the step schedule falls."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""

    def __post_init__(self) -> None:
        check(
            "optim",
            ("epochs", self.epochs, self.epochs > 0 and math.isfinite(self.epochs), "more than 0"),
            ("step_count", self.step_count, self.step_count in STEP_COUNTS, f"one of {', '.join(STEP_COUNTS)}"),
            ("global_batch", self.global_batch, self.global_batch >= 2, "at least 2"),
            ("norm_group", self.norm_group, self.norm_group is None or self.norm_group >= 2, "at least 2, or none"),
            (
                "norm_group",
                self.norm_group,
                not self.norm_group or self.global_batch % self.norm_group != 1,
                f"one that does not leave a last group of one of {self.global_batch} images: it has no variance",
            ),
            ("lr", self.lr, self.lr > 0, "more than 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "0 <= momentum < 1"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "false where momentum is 0"),
            ("warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "at least 0"),
            ("final_lr", self.final_lr, self.final_lr >= 0, "at least 0"),
            ("gamma", self.gamma, self.gamma > 0, "more than 0"),
            ("milestones", self.milestones, list(self.milestones) == sorted(self.milestones), "rising epochs"),
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Weighted kNN (arXiv 1805.01978, section 3.4) during training."""

    every_epochs: float = 10
    """Evaluate every so many epochs, and at the end; 0: only at the end."""
    baselines: bool = False
    """Evaluate raw pixels and the untrained encoder as well, before the first step."""
    k: int = 200
    """Neighbours that vote."""
    temperature: float = 0.1
    """τ of the votes' weights exp(s/τ)."""
    resize: int = 256
    """Shorter side after resizing, before the centre crop."""
    crop: int = 224
    """Side of the centre crop."""
    batch: int = 128
    """Images per forward pass."""

    def __post_init__(self) -> None:
        check(
            "eval",
            ("every_epochs", self.every_epochs, self.every_epochs >= 0, "at least 0"),
            ("k", self.k, self.k >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature > 0, "more than 0"),
            ("resize", self.resize, 1 <= self.resize <= _LONGEST_SIDE, f"1 to {_LONGEST_SIDE:,} pixels"),
            ("crop", self.crop, 1 <= self.crop <= self.resize, "1 to eval.resize"),
            ("batch", self.batch, self.batch >= 1, "at least 1"),
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how, and what is kept. A save is taken between two steps and written while training goes on."""

    every_steps: int | None = None
    """Save every so many steps."""
    every_minutes: float | None = 10.0
    """Save when so many minutes have passed since the last save."""
    max_cost: float | None = None
    """Save as often as this share of the training time allows, such as 0.03: the time that training waits for saves,
    and is slower beside them, is measured. Takes the place of `every_minutes`."""
    overlap: str = "skip"
    """What happens where a save is due while the one before is still being written: "skip" it, or "wait"."""
    bandwidth_share: float = 0.5
    """Share of the time for which each of a worker's upload threads sends, the rest of the link is training's; at the
    end of a run, and where a stop was asked for, they send all the time."""
    incremental: bool = True
    """Between whole copies of the memory bank save only the rows written since the save before."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: int | None = None
    """Keep the first checkpoint at or after each multiple of so many steps as well."""
    keep_best: str | None = None
    """Keep the checkpoint with the best value of this metric as well, one of `METRICS`. An evaluation that finds a
    value as good as the best so far is followed by a save."""

    def __post_init__(self) -> None:
        check(
            "checkpoint",
            ("every_steps", self.every_steps, self.every_steps is None or self.every_steps >= 1, "at least 1, or none"),
            (
                "every_minutes",
                self.every_minutes,
                self.every_minutes is None or self.every_minutes > 0,
                "more than 0, or none",
            ),
            ("max_cost", self.max_cost, self.max_cost is None or 0 < self.max_cost < 1, "0 < share < 1, or none"),
            ("overlap", self.overlap, self.overlap in OVERLAPS, f"one of {', '.join(OVERLAPS)}"),
            ("bandwidth_share", self.bandwidth_share, 0 < self.bandwidth_share <= 1, "0 < share <= 1"),
            ("keep_last", self.keep_last, self.keep_last >= 1, "at least 1"),
            (
                "keep_every_steps",
                self.keep_every_steps,
                self.keep_every_steps is None or self.keep_every_steps >= 1,
                "at least 1, or none",
            ),
            (
                "keep_best",
                self.keep_best,
                self.keep_best is None or self.keep_best in METRICS,
                f"one of {', '.join(METRICS)}, or none",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """How it runs on the machine; nothing here is part of the method."""

    precision: str = "auto"
    """"float32", "bfloat16" (autocast) or "auto": bfloat16 where all workers of the first start have a GPU with units
    for it (not emulated), else float32. Fixed from then on."""
    channels_last: str = "auto"
    """"on", "off" or "auto": on for GPUs. On CPUs it is a quarter faster, but sums in an order that depends on the
    threads, so that runs on different numbers of workers agree to fewer digits; nets of fewer than 16 channels stay
    channels first there, because torch's backward pass corrupts memory."""
    log_every: int = 20
    """Most steps between reads of the metrics, the only moments at which the host waits for the device; slow steps
    are read every few seconds."""
    tensorboard: bool = True
    """Write TensorBoard events into the run."""
    bank_checks: str = "error"
    """What happens where the memory bank shows that training is pointless (collapse, rows of a wrong length, rows that
    are never written, a Z far from its estimate): "error" ends the run, "warn" tells."""

    def __post_init__(self) -> None:
        check(
            "system",
            (
                "precision",
                self.precision,
                self.precision in ("auto", "float32", "bfloat16"),
                "auto, float32 or bfloat16",
            ),
            ("channels_last", self.channels_last, self.channels_last in ("auto", "on", "off"), "auto, on or off"),
            ("log_every", self.log_every, self.log_every >= 1, "at least 1"),
            ("bank_checks", self.bank_checks, self.bank_checks in ("error", "warn"), "error or warn"),
        )
