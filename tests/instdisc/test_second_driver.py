"""A second driver of a run that is refused changes nothing of it, and what the one that trains it asked for stays."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_data import write_cifar10

from cluster.checkpoint import RunHeldError
from cluster.lease import Holder, Lease
from instdisc.config import TrainConfig
from instdisc.launch import fit
from instdisc.runs import Run


def config_of(root, **fields) -> TrainConfig:
    tiny = {"data.kind": "cifar10", "data.root": str(root), "data.download": False, "optim.global_batch": 8,
            "optim.epochs": 1, "model.architecture": "convnet-small", "model.width": 4, "eval.every_epochs": 0,
            "eval.baselines": False, "system.tensorboard": False}  # fmt: skip
    return TrainConfig().with_overrides({**tiny, **fields})


def test_a_driver_that_is_refused_leaves_the_configuration_of_the_one_that_trains(tmp_path, monkeypatch):
    root, uri = write_cifar10(tmp_path / "data", 40, 8), str(tmp_path / "run")
    run, asked = Run(uri), config_of(root)
    fit(asked, run=uri)
    run.store.delete("results.json")
    before = run.config()
    another = dataclasses.replace(Holder.of_this_process(), token="another", boot="another machine")
    held = Lease(run.checkpoints(), another)
    held.take()
    read = Lease._read

    def read_and_go_on(self: Lease):
        found = read(self)
        if self is not held:
            held.beat()
        return found

    monkeypatch.setattr(Lease, "_read", read_and_go_on)
    with pytest.raises(RunHeldError, match="is trained by process"):
        fit(config_of(root, **{"checkpoint.keep_last": 9}), run=uri)
    assert run.config() == before


def test_what_may_change_is_stored_by_the_driver_that_goes_on(tmp_path):
    root, uri = write_cifar10(tmp_path / "data", 40, 8), str(tmp_path / "run")
    fit(config_of(root), run=uri)
    Run(uri).store.delete("results.json")
    fit(config_of(root, **{"checkpoint.keep_last": 9}), run=uri)
    config = Run(uri).config()
    assert config is not None
    assert config.checkpoint.keep_last == 9


def test_the_driver_that_trains_stores_its_own_configuration_whatever_another_start_left(tmp_path, monkeypatch):
    """Two start at once on a new run, while the images are still read: the one that gets the run decides."""
    root, uri = write_cifar10(tmp_path / "data", 40, 8), str(tmp_path / "run")
    agree = Run.agree_on_config

    def then_another_starts(self: Run, asked: TrainConfig, *, workers: int = 1) -> TrainConfig:
        agreed = agree(self, asked, workers=workers)
        agree(self, config_of(root, seed=5), workers=workers)
        return agreed

    monkeypatch.setattr(Run, "agree_on_config", then_another_starts)
    fit(config_of(root, seed=1), run=uri)
    config = Run(uri).config()
    assert config is not None
    assert config.seed == 1
