"""Every field of the configuration is read by something; one that nothing would read is refused when it is given."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import instdisc
from instdisc import recipes
from instdisc.config import TrainConfig
from instdisc.config_effects import ALWAYS, EFFECTS, idle_fields
from instdisc.config_method import ObjectiveConfig
from instdisc.config_sections import ConfigError, DataConfig
from instdisc.launch import fit
from instdisc.overrides import field_names, flatten
from instdisc.recipes import recipe
from instdisc.runs import Run, RunResult

PACKAGES = [Path(instdisc.__file__).parent, Path(instdisc.__file__).parent.parent / "dataloading"]
DECLARING = {"config.py", "config_sections.py", "config_method.py", "config_elastic.py", "config_effects.py"}

READ_WITH: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # field: (a value that is not its default, overrides with which nothing reads it, and with which something does)
    "data.root": ("/photos", {"data.kind": "demo"}, {"data.kind": "folder"}),
    "data.config": ("faces", {"data.kind": "demo", "data.root": None}, {}),
    "data.download": (True, {"data.kind": "folder"}, {"data.kind": "cifar100"}),
    "data.orientation": ("tiff", {"data.kind": "demo", "data.root": None}, {}),
    "data.deep_samples": ("clipped", {"data.kind": "demo", "data.root": None}, {}),
    "data.lanes": (3, {}, {"data.order": "block"}),
    "data.window": (3, {}, {"data.order": "block"}),
    "data.cache_dir": ("/cache", {"data.root": "/photos"}, {"data.root": "s3://bucket/photos"}),
    "data.cache_gb": (5.0, {"data.root": "/photos"}, {"data.root": "s3://bucket/photos"}),
    "augment.jitter": ((0.1, 0.1, 0.1, 0.1), {"augment.jitter_probability": 0.0}, {}),
    "augment.jitter_probability": (0.5, {"augment.jitter": (0, 0, 0, 0)}, {}),
    "augment.order": (("jitter", "grayscale"), {"augment.grayscale_probability": 0.0}, {}),
    "augment.blur_sigma": ((1.0, 2.0), {}, {"augment.blur_probability": 0.5}),
    "augment.local_size": (64, {}, {}),
    "augment.local_scale": ((0.1, 0.2), {}, {}),
    "model.stem": ("cifar", {"model.architecture": "alexnet"}, {"model.architecture": "resnet50"}),
    "model.width": (64, {"model.architecture": "resnet18"}, {"model.architecture": "convnet-small"}),
    "model.blocks": ((3, 4), {"model.architecture": "convnet-small"}, {"model.architecture": "resnet-small"}),
    "bank.mapped_dir": ("/disk", {}, {"bank.device": "mapped"}),
    "objective.num_negatives": (7, {"objective.name": "softmax"}, {"objective.name": "infonce"}),
    "objective.per_sample": (True, {"objective.name": "softmax"}, {"objective.name": "nce"}),
    "objective.hard_negatives": (7, {"objective.name": "nce"}, {"objective.name": "infonce"}),
    "objective.denominator": ("decoupled", {"objective.name": "nce"}, {"objective.name": "infonce"}),
    "objective.debias_prior": (
        0.2,
        {"objective.name": "infonce"},
        {"objective.name": "infonce", "objective.denominator": "debiased"},
    ),
    "objective.score_mib": (7, {"objective.name": "nce"}, {"objective.name": "softmax"}),
    "objective.z": ("ema", {"objective.name": "infonce"}, {"objective.name": "nce"}),
    "objective.z_decay": (0.9, {"objective.name": "softmax"}, {"objective.name": "nce"}),
    "objective.proximal_weight": (5.0, {"objective.name": "infonce"}, {"objective.name": "nce"}),
    "optim.nesterov": (True, {"optim.momentum": 0.0}, {}),
    "optim.milestones": ((3.0,), {"optim.schedule": "cosine"}, {"optim.schedule": "step"}),
    "optim.gamma": (0.5, {"optim.milestones": ()}, {"optim.schedule": "step"}),
    "optim.final_lr": (0.01, {"optim.schedule": "step"}, {"optim.schedule": "cosine"}),
    "checkpoint.every_minutes": (3.0, {"checkpoint.max_cost": 0.1}, {}),
}
NEVER_READ = {"augment.local_size", "augment.local_scale"}
"""Of other methods than this one: they share the sections of the data path."""


def test_every_condition_is_tried_below():
    assert set(READ_WITH) == {name for name, effect in EFFECTS.items() if effect is not ALWAYS}


def test_every_field_is_read_outside_of_its_declaration():
    read: set[str] = set()
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            if path.name not in DECLARING:
                tree = ast.walk(ast.parse(path.read_text()))
                read |= {node.attr for node in tree if isinstance(node, ast.Attribute)}
    through_all = {"elastic.silence_s", "elastic.start_settle_s", "elastic.grow_settle_s", "elastic.resize_interval_s"}
    unread = {name for name in field_names(TrainConfig) if name.rpartition(".")[2] not in read} - through_all
    assert not unread, f"nothing reads {sorted(unread)}"


@pytest.mark.parametrize("name", READ_WITH)
def test_a_field_that_nothing_would_read_is_refused_and_one_that_is_read_is_not(name):
    value, idle_with, read_with = READ_WITH[name]
    with pytest.raises(ConfigError, match=name):
        recipe("imagenet-npid-r18", **{"data.kind": "auto", "data.root": "/images", **idle_with, name: value})
    if name not in NEVER_READ:
        made = recipe("imagenet-npid-r18", **{"data.root": "/images", **read_with, name: value})
        assert flatten(made)[name] == value
        assert name not in idle_fields(made)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_no_recipe_is_refused_nor_its_defaults_when_they_are_given(name):
    config = recipe(name)
    defaults = flatten(TrainConfig())
    assert recipe(name, **{field: defaults[field] for field in idle_fields(config)}) is not None


def test_a_value_of_the_recipe_that_an_override_puts_out_of_use_is_not_the_override_s_fault():
    assert recipe("cifar10-nce", **{"objective.name": "infonce"}).objective.z == "ema"
    with pytest.raises(ConfigError, match=r"model\.stem: found 'cifar', .* a ResNet of torchvision"):
        recipe("cifar10-npid", **{"model.architecture": "alexnet", "model.stem": "cifar"})


def test_a_configuration_made_in_python_is_refused_before_anything_is_stored(tmp_path):
    config = TrainConfig(data=DataConfig(kind="demo"), objective=ObjectiveConfig(name="infonce", z="ema"))
    with pytest.raises(ConfigError, match=r"objective\.z: found 'ema', .* only with objective\.name=nce"):
        fit(config, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_begun_with_a_value_that_nothing_reads_goes_on(tmp_path, capsys):
    from instdisc.cli.main import main

    begun = recipe("quickstart").with_overrides({"objective.proximal_weight": 5.0})
    run = Run(str(tmp_path / "run"))
    run.agree_on_config(begun)
    run.finish(RunResult(run.uri, step=1, num_steps=1, finished=True))  # nothing is left to train
    # The very configuration, the same without the value, and the command of then with it.
    assert fit(begun, run=run.uri).finished
    assert fit(replace(begun, objective=replace(begun.objective, proximal_weight=0.0)), run=run.uri).finished
    command = ["train", "quickstart", "--workers", "0", "--objective.proximal_weight", "5", "--run"]
    assert main([*command, run.uri]) == 0
    with pytest.raises(ConfigError, match=r"objective\.z_decay"):
        fit(begun.with_overrides({"objective.z_decay": 0.5}), run=run.uri)
    assert main([*command, str(tmp_path / "new")]) == 2
    assert "objective.proximal_weight: found 5.0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
