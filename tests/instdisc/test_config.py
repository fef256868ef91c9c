"""Configuration, overrides and recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from typing import Any

import pytest

from instdisc import recipes
from instdisc.cli.overrides import parse_overrides
from instdisc.config import MAY_CHANGE_ON_RESUME, TrainConfig, flatten, resume_differences
from instdisc.config_effects import EFFECTS
from instdisc.config_sections import ConfigError, OptimConfig
from instdisc.launch import absolute
from instdisc.overrides import BEFORE, OverrideError, field_names, from_plain
from instdisc.runs import Run


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_json_unchanged(name):
    config = recipes.recipe(name)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.recipe == name


@pytest.mark.parametrize("function", recipes.RECIPES.values())
def test_a_recipe_says_how_to_run_it_on_what_how_long_and_what_to_expect(function):
    text = inspect.getdoc(function) or ""
    for word in ("Command:", "ime:", "Expected", "Source:"):
        assert word in text, f"{function.__name__}: its docstring lacks {word!r}"


def test_every_field_has_a_docstring():
    for kind in {type(getattr(TrainConfig(), f.name)) for f in dataclasses.fields(TrainConfig)}:
        if dataclasses.is_dataclass(kind):
            source = inspect.getsource(kind)
            for field in dataclasses.fields(kind):
                after = source.partition(f"\n    {field.name}: ")[2].partition("\n")[2]
                assert after.lstrip().startswith('"""'), f"{kind.__name__}.{field.name}"


def test_every_field_says_when_it_has_an_effect():
    missing, gone = set(field_names(TrainConfig)) - set(EFFECTS), set(EFFECTS) - set(field_names(TrainConfig))
    assert not missing, f"add {sorted(missing)} to EFFECTS in instdisc/config_effects.py: when are they read?"
    assert not gone


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("objective.temperature", "0.2", 0.2),
        ("optim.global_batch", "64", 64),
        ("optim.global_batch", "1e3", 1000),
        ("optim.milestones", "3,5.5", (3.0, 5.5)),
        ("augment.scale", "(0.1, 1)", (0.1, 1.0)),
        ("model.blocks", "1", (1,)),
        ("optim.nesterov", "true", True),
        ("optim.norm_group", "none", None),
        ("data.root", "/x y", "/x y"),
        ("seed", "9007199254740993", 9007199254740993),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(name, text, value):
    assert flatten(TrainConfig().with_overrides({name: text}))[name] == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("objective.temprature", "0.1", "did you mean objective.temperature"),
        ("temperature", "0.1", r"did you mean (objective|eval).temperature"),
        ("optim.global_batch", "inf", "optim.global_batch: found 'inf', expected a whole number"),
        ("optim.lr", "nan", "optim.lr: found 'nan', expected a finite number"),
        ("optim.lr", "fast", r"optim.lr: found 'fast', expected a finite number"),
        ("optim.global_batch", "1.5", "expected a whole number"),
        ("optim.global_batch", "1_0", "optim.global_batch: found '1_0', expected a whole number"),
        ("optim.lr", "1_0", "optim.lr: found '1_0', expected a finite number"),
        ("augment.scale", "0.1", "2 comma-separated values, each a finite number"),
        ("optim.nesterov", "maybe", "true or false"),
        ("qwertyuiop", "1", "--help"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_with_advice(name, text, message):
    with pytest.raises(OverrideError, match=message):
        TrainConfig().with_overrides({name: text})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective.name": "triplet"}, "objective.name: found 'triplet', expected one of softmax, nce, infonce"),
        ({"objective.name": "softmax", "objective.temperature": 0.01}, "at least 0.025 where ranks add up"),
        ({"optim.global_batch": 1}, "at least 2"),
        ({"bank.momentum": 1.0}, "0 <= momentum < 1"),
        ({"eval.crop": 300}, "1 to eval.resize"),
        ({"seed": -1}, "seed"),
        ({"augment.num_views": 2}, "one view"),
        ({"augment.num_local_views": 6}, "one view"),
        ({"augment.scale": (0.5, 0.1)}, "scale"),
        ({"data.kind": "folder", "data.order": "block"}, "data.order: found 'block', expected permutation for kind fo"),
        ({"data.kind": "demo", "data.backend": "dali"}, "data.backend: found 'dali', expected auto, memory or torch"),
    ],
)
def test_a_value_that_cannot_be_is_refused_naming_the_field(overrides, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().with_overrides(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.architecture": "alexnet", "augment.size": 62}, "augment.size: found 62, which alexnet cannot take"),
        ({"model.architecture": "vgg16", "eval.crop": 31}, "eval.crop: found 31, which vgg16 cannot take"),
    ],
)
def test_images_that_are_too_small_for_the_net_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        recipes.recipe("imagenet-npid-r18", **overrides)


def test_an_unknown_recipe_is_refused_with_the_likely_one():
    with pytest.raises(ConfigError, match=r"did you mean cifar10-npid\?"):
        recipes.recipe("cifar10-nipd")


def test_arguments_are_read_with_and_without_an_equals_sign():
    assert parse_overrides(["--a.b", "-1", "--c.d=x=y"]) == {"a.b": "-1", "c.d": "x=y"}
    with pytest.raises(OverrideError, match="no value after it"):
        parse_overrides(["--a.b"])
    with pytest.raises(OverrideError, match="found 'stray'"):
        parse_overrides(["stray"])


def test_only_the_listed_fields_may_change_when_a_run_goes_on():
    stored = TrainConfig().with_overrides({"optim.norm_group": 64})
    asked = TrainConfig().with_overrides({"data.root": "elsewhere", "eval.k": 7, "checkpoint.keep_last": 9})
    assert resume_differences(stored, asked) == []
    changed = asked.with_overrides({"objective.temperature": 0.2, "optim.lr": 0.1, "optim.norm_group": 32})
    assert resume_differences(stored, changed) == [
        "objective.temperature: the run has 0.07, asked for 0.2",
        "optim.norm_group: the run has 64, asked for 32",
        "optim.lr: the run has 0.03, asked for 0.1",
    ]


def test_the_list_of_fields_that_may_change_names_real_fields():
    assert set(field_names(TrainConfig)) >= MAY_CHANGE_ON_RESUME


def test_a_configuration_with_fields_of_a_newer_version_is_refused():
    with pytest.raises(OverrideError, match=r"optim\.sharpness"):
        TrainConfig.from_json(TrainConfig().to_json().replace('"lr":', '"sharpness": 1,\n"lr":'))


def test_a_configuration_of_an_older_version_keeps_its_digest_and_its_rules():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Newer(TrainConfig):
        rule: str = dataclasses.field(default="new", metadata={BEFORE: "old"})

    older = json.dumps(
        {name: value for name, value in json.loads(TrainConfig().to_json()).items() if name != "elastic"}
    )
    assert TrainConfig.from_json(older) == TrainConfig()
    assert from_plain(Newer, json.loads(older)).rule == "old"
    assert from_plain(Newer, {**json.loads(older), "rule": "new"}).rule == "new"


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("place", ["runs/a", "file://runs/a", "~/runs/a", "file://~/runs/a"])
def test_a_folder_means_the_same_place_in_every_process_however_it_is_written(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert absolute(place) == str(tmp_path / "runs/a")
    assert Run(absolute(place)).folder == tmp_path / "runs/a"
    assert absolute("s3://bucket") == "s3://bucket"


@pytest.mark.parametrize("value", [0, -1, 1, 2**63, 10**400])
def test_no_whole_number_in_any_field_ends_a_check_with_an_error_of_python(value):
    config = recipes.quickstart()
    for name in (field.name for field in dataclasses.fields(config)):
        section: Any = getattr(config, name)
        for field in dataclasses.fields(section) if name not in ("recipe", "seed") else ():
            if field.type in ("int", "int | None"):
                with contextlib.suppress(ValueError):
                    dataclasses.replace(section, **{field.name: value})


def test_a_cache_that_is_no_folder_of_this_machine_is_refused_without_its_password():
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .* expected a folder on a local disk") as refused:
        TrainConfig().with_overrides({"data.cache_dir": "s3://me:geheim@bucket/x"})
    assert "geheim" not in str(refused.value)
