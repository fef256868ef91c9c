"""The configuration of a run: sections of `config_sections`, stored as JSON with the run.

Neither of the two imports torch or Ray, so that commands which only look at a run answer at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataloading.augment import AugmentConfig
from instdisc.config_elastic import ElasticConfig
from instdisc.config_method import BankConfig, ObjectiveConfig
from instdisc.config_sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SystemConfig,
    check,
)
from instdisc.overrides import apply_overrides, from_plain, values_before


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


def lasting_digest(config: TrainConfig) -> str:
    """Return a digest of the fields that may not change when a run goes on, SHA-256 (hex).

    A field that was added later and has the value that stands for its absence is left out, so that the checkpoints of
    older versions keep their digest.
    """
    before = values_before(TrainConfig)
    lasting = {
        name: value
        for name, value in flatten(config).items()
        if name not in MAY_CHANGE_ON_RESUME and not (name in before and before[name] == value)
    }
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def as_begun(stored: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """Return `asked` with what the first start decided: the normalisation group, and the rules of an older version.

    A field that was added after the run began, and that `asked` leaves at its default, keeps the value that reproduces
    what the run did so far.
    """
    before, now, default = flatten(stored), flatten(asked), flatten(TrainConfig())
    kept = {
        name: value
        for name, value in values_before(TrainConfig).items()
        if before[name] == value and now[name] == default[name] and name not in MAY_CHANGE_ON_RESUME
    }
    if now["optim.norm_group"] is None:
        kept["optim.norm_group"] = before["optim.norm_group"]
    return asked.with_overrides(kept)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return every field by its dotted name."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[name] = value
    return flat


def resume_differences(stored: TrainConfig, asked: TrainConfig) -> list[str]:
    """Return a line per field that differs and may not change when a run goes on, after `as_begun`."""
    before, now = flatten(stored), flatten(as_begun(stored, asked))
    return [
        f"{name}: the run has {before[name]!r}, asked for {now[name]!r}"
        for name in before
        if name not in MAY_CHANGE_ON_RESUME and before[name] != now[name]
    ]
