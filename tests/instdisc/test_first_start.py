"""What the first start of a run decides: normalisation groups, of which every worker has one, and the precision."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worker import Worker
from instdisc.config import TrainConfig
from instdisc.config_sections import ConfigError, OptimConfig
from instdisc.launch import fit
from instdisc.recipes import RECIPES, recipe
from instdisc.runs import DIGEST, Run, usable_workers
from instdisc.train.plan import BatchPlan
from instdisc.train.state import autocast_dtype, decide_precision


@settings(deadline=None)
@given(batch=st.integers(2, 300), workers=st.integers(1, 64))
def test_at_a_first_start_every_worker_has_a_group_where_the_batch_suffices(batch, workers):
    config = TrainConfig(optim=OptimConfig(global_batch=batch))
    run = Run("memory://first-start")
    size = run.agreed_config(config, workers=workers).optim.norm_group
    assert size is not None
    plan = BatchPlan(batch, size, workers)
    assert batch % size != 1
    sizes = [s for s in range(2, batch + 1) if batch % s != 1 and -(-batch // s) >= workers]
    if sizes:
        assert min(plan.counts_W) >= 2
        assert size <= -(-batch // workers)
        if batch % workers == 0:
            assert set(plan.counts_W) == {size}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("workers", [1, 2, 8, 9])
def test_two_fresh_runs_of_a_recipe_have_the_same_groups_on_any_number_of_workers(name, workers, tmp_path):
    agreed = Run(str(tmp_path)).agree_on_config(recipe(name), workers=workers)
    assert agreed.optim.norm_group == recipe(name).optim.norm_group
    expected = {"quickstart": 64, "cifar10-cpu": 64, "imagenet-npid-r18": 32, "imagenet-npid-r50": 32}
    assert agreed.optim.norm_group == expected.get(name, agreed.optim.global_batch)


def test_another_batch_than_the_recipe_s_leaves_the_groups_to_the_first_start():
    assert recipe("quickstart", **{"optim.global_batch": "32"}).optim.norm_group is None
    assert recipe("quickstart", **{"optim.global_batch": "128"}).optim.norm_group == 64
    assert recipe("quickstart", **{"optim.global_batch": 32, "optim.norm_group": 8}).optim.norm_group == 8
    assert recipe("quickstart", **{"optim.global_batch": 65}).optim.norm_group is None, "65 = 64 + 1"


def begun(uri: str, workers: int) -> Run:
    """Return a run that was started on so many workers, its images seen."""
    run = Run(uri)
    run.agree_on_config(TrainConfig(), workers=workers)
    run.store.put(DIGEST, b"{}")
    return run


@pytest.mark.parametrize(("first", "later"), [(2, 8), (1, 4), (3, 8)])
def test_more_workers_than_groups_are_refused_with_advice_before_anything_starts(first, later, tmp_path):
    run = begun(str(tmp_path), first)
    with pytest.raises(ConfigError, match=rf"workers: found {later}, but .* has {first} group.*give --workers {first}"):
        fit(TrainConfig(), run=run.uri, workers=later)


def test_the_advice_for_a_new_run_suffices():
    config = recipe("quickstart")
    with pytest.raises(ConfigError, match=r"--optim\.norm_group 32"):
        usable_workers(config, 4, 4)
    assert usable_workers(config.with_overrides({"optim.norm_group": 32}), 4, 4) == (4, "")
    tiny = TrainConfig(optim=OptimConfig(global_batch=4, norm_group=2))
    with pytest.raises(ConfigError, match=r"--workers 2, or .* a larger --optim\.global_batch"):
        usable_workers(tiny, 3, 3)


def test_a_refused_first_start_stores_nothing(tmp_path):
    with pytest.raises(ConfigError, match="--workers 2"):
        fit(recipe("quickstart"), run=str(tmp_path / "run"), workers=3)
    assert not (tmp_path / "run").exists()


def test_a_run_grows_to_as_many_workers_as_it_has_groups():
    most, why = usable_workers(recipe("imagenet-npid-r18"), 1, 16)
    assert most == 8
    assert why.startswith("at most 8 of 16 workers have work: a batch of 256 images has 8 groups")
    assert usable_workers(recipe("imagenet-npid-r18"), 1, 8) == (8, "")
    assert usable_workers(recipe("imagenet-npid-r18"), 0, 0) == (0, "")


class Gathering:
    """A rank among others that answer as told."""

    def __init__(self, device: str, others: list[bool]) -> None:
        self.device, self.others = torch.device(device), others

    def all_gather_object(self, own: bool) -> list[bool]:
        return [own, *self.others]


@pytest.mark.parametrize(
    ("major", "others", "expected"),
    [(8, [True], "bfloat16"), (8, [True, False], "float32"), (7, [True], "float32"), (9, [], "bfloat16")],
)
def test_auto_is_bfloat16_where_all_gpus_compute_in_it_and_stays_so(major, others, expected, monkeypatch):
    """The GPU is pretended: torch would emulate bfloat16 on a T4 (sm_75) and says that it is supported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    worker: Worker = Gathering("cuda:0", others)  # pyright: ignore[reportAssignmentType]
    decided = decide_precision(worker, TrainConfig())
    assert decided.system.precision == expected
    assert autocast_dtype(TrainConfig(), worker.device) == (torch.bfloat16 if major >= 8 else None)
    # It goes on elsewhere, as it began.
    elsewhere: Worker = Gathering("cpu", [])  # pyright: ignore[reportAssignmentType]
    assert decide_precision(elsewhere, decided) == decided
    assert autocast_dtype(decided, elsewhere.device) == (torch.bfloat16 if expected == "bfloat16" else None)
    assert decide_precision(elsewhere, TrainConfig()).system.precision == "float32"


def test_a_place_for_workers_that_would_not_be_used_is_refused(tmp_path):
    for workers, launcher in ((0, "ray"), (2, "local")):
        with pytest.raises(ConfigError, match="address: found 'head:6379' with"):
            fit(
                recipe("quickstart"), run=str(tmp_path / "run"), workers=workers, launcher=launcher, address="head:6379"
            )
    assert not (tmp_path / "run").exists()
