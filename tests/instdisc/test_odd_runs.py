"""Runs that are odd in ways that users will meet: batches of damaged images alone, fewer images than processes, a bank
that is moved to another place when the run goes on.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_training_across_workers import config_for, difference
from tiny_data import write_cifar10

import instdisc.train.loop
from cluster.checkpoint import read_latest
from cluster.worker import Worker, run_local
from instdisc.config import TrainConfig
from instdisc.launch import train_worker
from instdisc.runs import Run
from instdisc.train.step import Stepper

STEPS = 4
DAMAGED_STEPS = (0, 2)
DAMAGED = {
    "nce": {},
    "nce, per sample": {"objective.per_sample": True},
}
TWO_IMAGES = {
    "nce, per sample": {"objective.per_sample": True},
    "infonce, decoupled": {"objective.hard_negatives": 3, "objective.denominator": "decoupled"},
}


def train_all(worker: Worker, runs: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """Train configurations at URIs, all images being damaged in some steps."""
    step = Stepper.step
    for config, uri, damaged_steps in runs:

        def with_damage(stepper, batch, _damaged_steps=damaged_steps):
            if stepper.state.step in _damaged_steps:
                batch = dataclasses.replace(batch, valid_B=torch.zeros_like(batch.valid_B))
            step(stepper, batch)

        Stepper.step = with_damage
        try:
            Run(uri).agree_on_config(TrainConfig.from_json(config))
            train_worker(worker, config, uri)
        finally:
            Stepper.step = step


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The last checkpoint of each run on one process and on three."""
    folder = tmp_path_factory.mktemp("odd")
    root = str(write_cifar10(folder / "data", 103, 20))
    size = {
        "data.max_rows": 2,
        "optim.global_batch": 4,
        "optim.norm_group": 2,
        "optim.epochs": 4 * STEPS / 2,
        "eval.k": 1,
    }
    cases = {("damaged", name): (options, DAMAGED_STEPS) for name, options in DAMAGED.items()}
    cases |= {("two images", name): ({**size, **options}, ()) for name, options in TWO_IMAGES.items()}
    found = {}
    for workers in (0, 3):
        runs = []
        for number, ((_, name), (options, damaged_steps)) in enumerate(cases.items()):
            config = config_for(name.split(",")[0], root, STEPS).with_overrides(options)
            runs.append((config.to_json(), str(folder / f"{workers}-{number}"), damaged_steps))
        run_local(train_all, workers, runs, preload=["instdisc.train.loop"])
        for case, (_, uri, _) in zip(cases, runs, strict=True):
            found[workers, *case] = read_latest(Run(uri).checkpoints())
    return found


@pytest.mark.parametrize("name", DAMAGED)
def test_batches_of_damaged_images_alone_teach_nothing_on_any_number_of_processes(ends, name):
    """The first batch is one of them: there is no Z yet, and what is computed without must not reach the weights."""
    one, many = ends[0, "damaged", name], ends[3, "damaged", name]
    assert all(tensor.isfinite().all() for tensor in one.tensors().values())
    assert sorted(set(one.rows("bank_last_step").tolist())) == [-1, 1, 3]
    # Of a single seed: a jump at a ReLU's corner is let pass (see test_training_across_workers).
    of_model, of_momenta, of_rows = difference(one, many, STEPS)
    assert of_model < 1e-2
    assert of_momenta < 1e-1
    assert of_rows < 1e-3
    assert many.state["normalizer"]["started"] == name.startswith("nce")


@pytest.mark.parametrize("name", TWO_IMAGES)
def test_a_run_of_fewer_images_than_processes_equals_that_of_one_process(ends, name):
    one, many = ends[0, "two images", name], ends[3, "two images", name]
    assert all(tensor.isfinite().all() for tensor in one.tensors().values())
    assert one.step == many.step == STEPS
    torch.testing.assert_close(one.rows("bank"), many.rows("bank"), atol=1e-3, rtol=0)


class CutOffError(Exception):
    pass


def test_a_run_goes_on_to_the_bit_with_its_bank_in_another_place_and_fetched_further_ahead(tmp_path, monkeypatch):
    root = str(write_cifar10(tmp_path / "data", 103, 20))
    config = config_for("nce", root, 12).with_overrides({"bank.dtype": "float16", "checkpoint.every_steps": 5})
    moves = [
        {},
        {"bank.device": "mapped", "bank.mapped_dir": str(tmp_path), "bank.fetch_ahead": 3},
        {"bank.device": "cpu", "bank.fetch_ahead": 0},
    ]
    monkeypatch.setattr(instdisc.train.loop, "LOOK_S", 1e9)
    whole_uri = str(tmp_path / "whole")
    run_local(train_all, 0, [(config.to_json(), whole_uri, ())])
    whole = read_latest(Run(whole_uri).checkpoints())
    step = Stepper.step
    ends = []
    for first, second in itertools.pairwise(moves):
        uri = str(tmp_path / f"moved-{len(ends)}")

        def cut_off(stepper, batch):
            if stepper.state.step == 8:
                raise CutOffError
            step(stepper, batch)

        Run(uri).agree_on_config(config.with_overrides(first))
        monkeypatch.setattr(Stepper, "step", cut_off)
        with pytest.raises(CutOffError):
            run_local(train_worker, 0, config.with_overrides(first).to_json(), uri)
        monkeypatch.setattr(Stepper, "step", step)
        assert read_latest(Run(uri).checkpoints()).step == 5
        agreed = Run(uri).agree_on_config(config.with_overrides(second))
        run_local(train_worker, 0, agreed.to_json(), uri)
        ends.append(read_latest(Run(uri).checkpoints()))
    for end in ends:
        assert end.step == 12
        assert torch.equal(end.rows("bank"), whole.rows("bank"))
        assert end.state["normalizer"] == whole.state["normalizer"]
        tensors = end.tensors()
        assert all(torch.equal(tensors[name], value) for name, value in whole.tensors().items())
