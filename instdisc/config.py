"""The configuration of a run: sections of `config_sections`, stored as JSON with the run.

Neither of the two imports torch or Ray, so that commands which only look at a run answer at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataloading.augment import AugmentConfig
from instdisc.config_effects import idle_fields
from instdisc.config_elastic import ElasticConfig
from instdisc.config_method import BankConfig, ObjectiveConfig
from instdisc.config_sections import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SystemConfig,
    check,
)
from instdisc.overrides import apply_overrides, as_annotated, flatten, from_plain, values_before


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes."""

    recipe: str = "custom"
    """Name of the recipe that it was made from."""
    seed: int = 0
    """Seed of weights, bank, order, augmentation and negatives."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        check(
            "config",
            ("seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
            (
                "augment.num_views",
                self.augment.num_views,
                self.augment.num_views == 1,
                "1: these objectives use one view",
            ),
            (
                "augment.num_local_views",
                self.augment.num_local_views,
                self.augment.num_local_views == 0,
                "0: these objectives use one view",
            ),
        )

    def with_overrides(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration with dotted overrides applied, such as {"objective.temperature": 0.1}.

        Values are of the field's type or text that reads as it. Raises ConfigError naming the likely field.
        """
        return apply_overrides(self, overrides)

    def to_json(self) -> str:
        """Return the configuration as JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Return the configuration that `to_json` wrote, in this version or an older one.

        Raises OverrideError on fields that this version lacks. A field that the text lacks takes the value that
        reproduces what its version did (`overrides.BEFORE`).
        """
        return from_plain(cls, json.loads(text))


# What may differ when a run goes on: where the same images are (their digest decides), how often one looks and saves,
# and how it runs.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "recipe",
        "data.kind",
        "data.root",
        "data.config",
        "data.download",
        "data.max_bad_share",
        "data.backend",
        "data.cache_dir",
        "data.cache_gb",
        "data.test_split",
        "data.max_test_rows",
        "bank.device",
        "bank.mapped_dir",
        "bank.fetch_ahead",
        "objective.score_mib",
        *(f"eval.{f.name}" for f in dataclasses.fields(EvalConfig)),
        *(f"checkpoint.{f.name}" for f in dataclasses.fields(CheckpointConfig)),
        *(f"elastic.{f.name}" for f in dataclasses.fields(ElasticConfig)),
        *(f"system.{f.name}" for f in dataclasses.fields(SystemConfig)),
    }
) - {"system.precision"}


def require_fitting_images(config: TrainConfig) -> None:
    """Raise ConfigError where the net cannot take images of the size that training or evaluation gives it."""
    architecture, least = config.model.architecture, config.model.min_side
    for name, side in (("augment.size", config.augment.size), ("eval.crop", config.eval.crop)):
        if side < least:
            raise ConfigError(
                f"{name}: found {side}, which {architecture} cannot take; expected at least {least} pixels, 224 for "
                "the nets of ImageNet"
            )


DECIDED_AT_FIRST_START = ("optim.norm_group", "system.precision")
"""Fields whose value is found out at a run's first start where the configuration leaves it open, and kept."""


def lasting_digest(config: TrainConfig) -> str:
    """Return a digest of the fields that may not change when a run goes on, SHA-256 (hex).

    A field that was added later and has the value that stands for its absence is left out, so that the checkpoints of
    older versions keep their digest.
    """
    before = values_before(TrainConfig)
    lasting = {
        name: value
        for name, value in flatten(as_annotated(config)).items()
        if name not in MAY_CHANGE_ON_RESUME and not (name in before and before[name] == value)
    }
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def undecided_digest(config: TrainConfig) -> str:
    """Return the digest that older versions gave a run whose precision they found out at each start."""
    return lasting_digest(config.with_overrides({"system.precision": "auto"}))


def as_begun(stored: TrainConfig, asked: TrainConfig, left_open: Collection[str] = ()) -> TrainConfig:
    """Return `asked` with what the run keeps from its beginning.

    That is what the first start decided of what `asked` leaves open (`left_open`: by its recipe, beside None and
    "auto"); the rules of an older version, where a field was added after the run began and `asked` leaves it at its
    default; and fields that nothing reads, whatever was asked for.
    """
    before, now, default = (flatten(as_annotated(config)) for config in (stored, asked, TrainConfig()))
    kept = {
        name: value
        for name, value in values_before(TrainConfig).items()
        if before[name] == value and now[name] == default[name]
    }
    kept |= {
        name: before[name]
        for name in DECIDED_AT_FIRST_START
        if now[name] == default[name] or (name in left_open and before[name] != default[name])
    }
    kept |= {name: before[name] for name in idle_fields(asked) & idle_fields(stored)}
    return asked.with_overrides({name: value for name, value in kept.items() if name not in MAY_CHANGE_ON_RESUME})


def rules_kept(config: TrainConfig) -> dict[str, Any]:
    """Return the fields, with their values, in which a run keeps the rules of the older version that it began with."""
    values, defaults = flatten(config), flatten(type(config)())
    return {
        name: value
        for name, value in values_before(type(config)).items()
        if values[name] == value != defaults[name] and name not in MAY_CHANGE_ON_RESUME | idle_fields(config)
    }


def resume_differences(stored: TrainConfig, asked: TrainConfig, left_open: Collection[str] = ()) -> list[str]:
    """Return a line per field that differs and may not change when a run goes on, after `as_begun`."""
    before, now = (flatten(as_annotated(config)) for config in (stored, as_begun(stored, asked, left_open)))
    return [
        f"{name}: the run has {before[name]!r}, asked for {now[name]!r}"
        for name in before
        if name not in MAY_CHANGE_ON_RESUME and before[name] != now[name]
    ]
