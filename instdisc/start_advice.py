"""What a person should know of a configuration before it trains: what will happen that they may not have meant."""

from __future__ import annotations

from typing import Any

from instdisc.config import DECIDED_AT_FIRST_START, TrainConfig, rules_kept
from instdisc.config_effects import EFFECTS, idle_fields
from instdisc.overrides import as_typed, flatten
from instdisc.recipes import starting_point

_PAPERS_MILESTONES = (0.6, 0.8)
"""Falls as shares of all epochs (arXiv 1805.01978: 120 and 160 of 200)."""


def advice(config: TrainConfig) -> list[str]:
    """Return what the configuration will do that its overrides may not have meant, a sentence each."""
    return [*_of_the_schedule(config), *_of_image_sizes(config), *_of_idle_values(config)]


def _of_the_schedule(config: TrainConfig) -> list[str]:
    optim, made = config.optim, starting_point(config).optim
    epochs, found = optim.epochs, []
    beyond = [milestone for milestone in optim.milestones if milestone >= epochs]
    if optim.schedule == "step" and beyond:
        never = "never falls" if len(beyond) == len(optim.milestones) else "does not fall there"
        shares = ",".join(f"{share * epochs:.4g}" for share in _PAPERS_MILESTONES)
        found.append(
            f"optim.milestones {_listed(beyond)} lie beyond the {epochs:g} epochs: the learning rate {never}. "
            f"--optim.milestones {shares} has the paper's shares of the epochs"
        )
    decays = optim.schedule != "constant"
    if optim.warmup_epochs > epochs or (decays and optim.warmup_epochs == epochs):
        share = made.warmup_epochs / made.epochs if 0 < made.warmup_epochs < made.epochs else 0.1
        reached = min(1.0, epochs / optim.warmup_epochs)
        found.append(
            f"optim.warmup_epochs is {optim.warmup_epochs:g}, and optim.epochs {epochs:g}: the learning rate rises to "
            f"{reached:.0%} of optim.lr and never falls. --optim.warmup_epochs {share * epochs:.3g} has time for both"
        )
    return found


def _of_image_sizes(config: TrainConfig) -> list[str]:
    made = starting_point(config)
    size, crop = config.augment.size, config.eval.crop
    is_half_changed = (size != made.augment.size) != (crop != made.eval.crop)
    if size == crop or not is_half_changed:
        return []
    resize = max(size, round(size * made.eval.resize / made.eval.crop))
    return [
        f"trains on images of {size} pixels (augment.size) and evaluates, embeds and searches on {crop} (eval.crop). "
        f"--eval.resize {resize} --eval.crop {size} makes them alike"
    ]


def _of_idle_values(config: TrainConfig) -> list[str]:
    """Tell of values of the recipe that its overrides put out of use."""
    made = starting_point(config)
    values, defaults = flatten(config), flatten(TrainConfig())
    return [
        f"{name}={as_typed(values[name])} of the recipe has no effect: it takes {EFFECTS[name].where}"
        for name in sorted(idle_fields(config) - idle_fields(made))
        if values[name] not in (None, defaults[name])
    ]


def of_workers(config: TrainConfig, least: int, most: int, launcher: str) -> list[str]:
    """Return which fields have no effect with these workers though they were given, a sentence each."""
    values, defaults = flatten(config), flatten(TrainConfig())
    given = {name for name in values if values[name] != defaults[name]}
    if most == 0 or launcher != "ray":
        idle, why = {name for name in given if name.startswith("elastic.")}, "Ray does not run the workers"
    elif least == most:
        ranged = ("start_settle_s", "grow_settle_s", "resize_interval_s")
        idle, why = given & {f"elastic.{name}" for name in ranged}, f"--workers {most} is one number, not MIN..MAX"
    else:
        idle, why = set(), ""
    found = [f"{_named(values, idle)}: no effect, since {why}"] if idle else []
    if most <= 1 and "bank.fetch_ahead" in given and config.bank.device == "auto":
        found.append(f"{_named(values, {'bank.fetch_ahead'})}: no effect, since one worker has all rows at hand")
    return found


def keeps(config: TrainConfig, asked: TrainConfig | None = None) -> str | None:
    """Return in one line what a run keeps from its beginning, and what of `asked` it does not take; None: nothing."""
    values, now = flatten(config), flatten(asked or config)
    parts = []
    rules = rules_kept(config)
    if rules:
        parts.append(f"the rules of the version that it began with: {_named(values, set(rules))}")
    decided = {name for name in DECIDED_AT_FIRST_START if now[name] not in (None, "auto", values[name])}
    if decided:
        parts.append(f"what its first start decided: {_named(values, decided)}")
    return f"this run keeps {', and '.join(parts)}" if parts else None


def _named(values: dict[str, Any], names: set[str]) -> str:
    return ", ".join(f"{name}={as_typed(values[name])}" for name in values if name in names)


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
