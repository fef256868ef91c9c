"""What is told before a run starts: what will happen that was perhaps not meant, and what an older run keeps."""

from __future__ import annotations

import pytest

from instdisc import recipes
from instdisc.config import TrainConfig
from instdisc.config_sections import OptimConfig
from instdisc.launch import fit
from instdisc.recipes import recipe
from instdisc.runs import Run
from instdisc.schedule import learning_rate, num_steps
from instdisc.start_advice import advice, keeps, of_workers

NUM_ROWS = 50_000


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config.optim, step, NUM_ROWS) for step in range(num_steps(config.optim, NUM_ROWS))]


def advised(text: str) -> dict[str, str]:
    """Return the options that an advice says to give."""
    words = text.replace("`", "").split()
    return {word[2:]: words[place + 1] for place, word in enumerate(words) if word.startswith("--")}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_as_it_is_needs_no_advice(name):
    assert advice(recipe(name)) == []


@pytest.mark.parametrize(
    ("name", "overrides", "found"),
    [
        ("imagenet-npid-r18", {"optim.epochs": 100}, "optim.milestones 120, 160 lie beyond the 100 epochs"),
        ("imagenet-npid-r18", {"optim.epochs": 150}, "160 lie beyond the 150 epochs: .* does not fall there"),
        ("imagenet-npid-r18", {"optim.milestones": (250.0,)}, "250 lie beyond the 200 epochs"),
        ("cifar10-npid", {"optim.epochs": 10, "optim.warmup_epochs": 20, "optim.schedule": "constant"}, "rises to 50%"),
        ("quickstart", {"optim.epochs": 5}, "optim.warmup_epochs is 9, and optim.epochs 5"),
        ("quickstart", {"optim.warmup_epochs": 22}, "rises to 100% of optim.lr and never falls"),
    ],
)
def test_a_schedule_that_does_not_fit_the_epochs_is_told_and_the_advice_makes_it_fit(name, overrides, found):
    import re

    config = recipe(name, **overrides)
    (text,) = [told for told in advice(config) if re.search(found, told)]
    better = config.with_overrides(advised(text))
    assert advice(better) == []
    reached, last = max(rates(better)), rates(better)[-1]
    assert reached == pytest.approx(better.optim.lr)
    assert last < reached or better.optim.schedule == "constant"


def test_the_rate_that_is_told_is_the_rate_that_comes():
    config = recipe("cifar10-npid", **{"optim.epochs": 100})
    assert set(rates(config)) == {config.optim.lr}
    assert len(advice(config)) == 1
    assert len(set(rates(config.with_overrides(advised(advice(config)[0]))))) == 3


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        ({"augment.size": 224}, True),
        ({"eval.resize": 256, "eval.crop": 224}, True),
        ({"augment.size": 224, "eval.resize": 256, "eval.crop": 224}, False),
        ({"augment.size": 40, "eval.resize": 64, "eval.crop": 48}, False),
    ],
)
def test_images_of_another_size_in_training_than_in_evaluation_are_told_where_one_alone_was_changed(overrides, is_told):
    config = recipe("cifar10-cpu", **overrides)
    told = advice(config)
    assert len(told) == is_told
    if is_told:
        better = config.with_overrides(advised(told[0]))
        assert better.eval.crop == better.augment.size
        assert advice(better) == []


def test_a_value_of_the_recipe_that_is_put_out_of_use_is_told():
    (text,) = advice(recipe("cifar10-nce", **{"objective.name": "infonce"}))
    assert text == "objective.z=ema of the recipe has no effect: it takes objective.name=nce"


def test_defaults_in_python_are_told_alike():
    assert len(advice(TrainConfig(optim=OptimConfig(epochs=10)))) == 1


@pytest.mark.parametrize(
    ("overrides", "workers", "found"),
    [
        ({"elastic.silence_s": 5.0}, (0, 0, "ray"), ["elastic.silence_s=5.0: no effect, since Ray does not run"]),
        ({"elastic.silence_s": 5.0}, (2, 2, "local"), ["elastic.silence_s=5.0: no effect, since Ray does not run"]),
        ({"elastic.silence_s": 5.0}, (2, 2, "ray"), []),
        ({"elastic.grow_settle_s": 5.0}, (2, 2, "ray"), ["elastic.grow_settle_s=5.0: no effect, since --workers 2"]),
        ({"elastic.grow_settle_s": 5.0}, (1, 2, "ray"), []),
        ({"bank.fetch_ahead": 3}, (0, 0, "ray"), ["bank.fetch_ahead=3: no effect, since one worker"]),
        ({"bank.fetch_ahead": 3, "bank.device": "mapped"}, (1, 1, "ray"), []),
        ({"bank.fetch_ahead": 3}, (2, 2, "ray"), []),
        ({}, (0, 0, "ray"), []),
    ],
)
def test_what_the_workers_make_ineffective_is_told(overrides, workers, found):
    told = of_workers(recipe("quickstart", **overrides), *workers)
    assert len(told) == len(found)
    assert all(text.startswith(start) for text, start in zip(told, found, strict=True))


def test_what_a_run_keeps_is_told_in_one_line():
    config = recipe("quickstart")
    assert keeps(config, config) is None
    begun = config.with_overrides({"optim.norm_group": 128, "system.precision": "float32"})
    assert keeps(begun, config) == "this run keeps what its first start decided: optim.norm_group=128"


def test_everything_is_told_before_the_workers_start(tmp_path):
    told = []
    config = recipe(
        "quickstart",
        **{
            "data.max_rows": 64, "data.max_test_rows": 10, "model.width": 4, "optim.epochs": 0.5,
            "optim.global_batch": 32, "eval.every_epochs": 0, "eval.baselines": False, "eval.k": 5,
            "system.tensorboard": False, "elastic.silence_s": 5.0,
        },
    )  # fmt: skip
    fit(config, run=str(tmp_path), on_event=told.append)
    texts = [event["text"] for event in told if "text" in event]
    start = texts.index("starting in this process")
    before, after = texts[:start], texts[start + 1 :]
    assert sum(text.startswith("warning: optim.warmup_epochs is 9, and optim.epochs 0.5: ") for text in before) == 1
    assert sum(text.startswith("warning: elastic.silence_s=5.0: no effect") for text in before) == 1
    assert "BatchNorm over the whole batch of 32 images, so on one worker" in after
    assert any("on cpu in float32" in text for text in after)
    assert any("system.channels_last=on has no effect on a processor" in text for text in after)
    kept = Run(str(tmp_path)).config()
    assert kept is not None
    assert kept.system.precision == "float32", "what auto came to at the first start"
