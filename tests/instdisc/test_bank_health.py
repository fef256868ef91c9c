"""A dead bank is told, with rank and step, before anything of it is saved: what is measured, what it is judged by, runs
that collapse or meet numbers that are not finite, and updates in which one rank brings what does not fit.

Shapes: S rows, R rows of a rank, B samples of a rank, D feature numbers.
"""

from __future__ import annotations

import dataclasses
import math
import re

import npid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_training_across_workers import config_for
from tiny_data import write_cifar10

import instdisc.train.loop
from cluster.checkpoint import read_latest
from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.config import TrainConfig
from instdisc.launch import train_worker
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.runs import Run
from instdisc.train.bank_health import BankHealth, DeadBankError, effective_rank, measure, problems
from instdisc.train.metrics import NonFiniteError
from instdisc.train.step import Stepper


def unit_rows(num_rows, dim, directions, noise, seed=0):
    """Unit rows in the span of some directions, with noise in all."""
    generator = np.random.default_rng(seed)
    rows_SD = generator.standard_normal((num_rows, directions)) @ generator.standard_normal((directions, dim))
    return reference.unit(rows_SD + noise * generator.standard_normal((num_rows, dim)))


@pytest.mark.parametrize(("num_rows", "dim"), [(1000, 32), (64, 128), (200, 8)])
@pytest.mark.parametrize(("directions", "noise"), [(200, 0), (3, 0), (3, 0.01), (1, 1e-3)])
def test_the_effective_rank_is_that_of_the_singular_values(num_rows, dim, directions, noise):
    rows_SD = torch.from_numpy(unit_rows(num_rows, dim, directions, noise)).float()
    assert effective_rank(rows_SD) == pytest.approx(reference.effective_rank(rows_SD.double().numpy()), rel=1e-4)


def test_the_effective_rank_is_1_of_copies_and_d_of_all_directions():
    assert effective_rank(start_rows(1, 64, 0, 0, 1).expand(500, -1)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.eye(16).repeat(9, 1)) == pytest.approx(16)
    assert math.isnan(effective_rank(torch.full((9, 9), math.nan)))


def trained_bank(rows_of, *, num_rows=500, dim=16, steps=5):
    """A bank of which every row was written with the momentum 0, in so many steps."""
    bank = ShardedMemoryBank(num_rows, dim, momentum=0.0)
    rows_ND = torch.from_numpy(rows_of(num_rows, dim)).float()
    for step, indices_B in enumerate(torch.arange(num_rows).chunk(steps)):
        bank.update(indices_B, rows_ND[indices_B], step)
    return bank


def judged(bank, *, step=5, epoch=1.0, num_bad=0, log_z_drift=None):
    return problems([measure(bank, step)], step=step, epoch=epoch, num_bad=num_bad, log_z_drift=log_z_drift)


def test_a_bank_that_trains_has_no_problems():
    bank = trained_bank(lambda num_rows, dim: unit_rows(num_rows, dim, dim, 0.1))
    assert judged(bank, log_z_drift=0.5) == ([], [])
    assert judged(ShardedMemoryBank(500, 16), step=1, epoch=0.1) == ([], [])
    health = measure(bank, 5)
    assert health.norm_min == pytest.approx(1, abs=1e-5)
    assert health.num_written == health.num_rows == 500
    assert health.staleness_mean == pytest.approx(2)  # 100 rows each of 0 to 4 steps ago
    assert health.effective_rank == pytest.approx(reference.effective_rank(bank.rows.double().numpy()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_no_problem(dtype):
    bank = ShardedMemoryBank(4000, 16, dtype=dtype)
    assert judged(bank, step=1, epoch=0.1) == ([], [])


@pytest.mark.parametrize("length", [0.0, 0.9, 1.1, math.nan, math.inf])
def test_a_row_of_another_length_is_told(length):
    bank = ShardedMemoryBank(500, 16)
    bank.rows[77] *= length
    (told,), doubtful = judged(bank, step=9, epoch=0.5)
    assert told.startswith("rank 0, step 9: found bank rows of length ")
    assert doubtful == []


def test_collapsed_rows_are_told_and_nearly_collapsed_ones_are_doubtful():
    (told,), _ = judged(trained_bank(lambda num_rows, dim: unit_rows(num_rows, dim, dim, 0) * 1e-4 + 1))
    assert told.startswith("rank 0, step 5: found an effective rank of 1 of")
    bank = trained_bank(lambda num_rows, dim: reference.unit(unit_rows(num_rows, dim, dim, 0) * 0.1 + 1))
    pointless, (doubt,) = judged(bank)
    assert pointless == []
    assert doubt.startswith("rank 0, step 5: the bank's rows have an effective rank of 1.")


def test_rows_that_are_never_written_are_told_after_an_epoch_but_not_those_of_damaged_images():
    bank = ShardedMemoryBank(500, 16)
    bank.update(torch.arange(100), start_rows(100, 16, 5, 0, 100), 0)
    assert judged(bank, step=7, epoch=0.99) == ([], [])
    (told,), doubtful = judged(bank, step=7, epoch=1.0)
    assert told.startswith("rank 0, step 7: found 400 of 500 bank rows that were never written after 1.0 epochs")
    assert doubtful == []
    pointless, (doubt,) = judged(bank, step=7, epoch=1.0, num_bad=390)
    assert pointless == []
    assert doubt.startswith("rank 0, step 7: 10 bank rows were never written")
    assert judged(bank, step=7, epoch=1.0, num_bad=400) == ([], [])


@pytest.mark.parametrize("drift", [6.5, -6.5, math.nan, math.inf])
def test_a_z_that_no_longer_fits_is_told_after_an_epoch(drift):
    bank = trained_bank(lambda num_rows, dim: unit_rows(num_rows, dim, dim, 0))
    assert judged(bank, epoch=0.9, log_z_drift=drift) == ([], [])
    (told,), _ = judged(bank, log_z_drift=drift)
    assert told.startswith("step 5: found a running estimate of log Z")


def test_problems_name_the_rank_that_has_them():
    healthy = BankHealth(0.999, 1.0, 1.001, 50, 50, 1.0, 12.0)
    empty = BankHealth(None, None, None, 0, 0, None, None)
    sick = [
        dataclasses.replace(healthy, norm_max=1.2),
        dataclasses.replace(healthy, effective_rank=1.05),
        dataclasses.replace(healthy, num_written=3),
    ]
    pointless, doubtful = problems([empty, healthy, *sick], step=40, epoch=2.0, num_bad=0, log_z_drift=0.0)
    assert [told.split(":")[0] for told in pointless] == [f"rank {rank}, step 40" for rank in (2, 3, 4)]
    assert doubtful == []


# What a rank does with the features of a step, from outside of the encoder: (from step, on rank or on all, how).
FAULTS = {
    "one feature": (5, None, "constant"),
    "nearly one feature": (0, None, "nearly constant"),
    "not a number": (5, 1, "nan"),
    "infinite": (2, 2, "inf"),
}


def spoil(features_BD: torch.Tensor, how: str) -> torch.Tensor:
    constant_D = torch.ones(features_BD.shape[1]) / features_BD.shape[1] ** 0.5
    if how == "constant":
        return features_BD * 0 + constant_D
    if how == "nearly constant":
        return F.normalize(features_BD * 1e-4 + constant_D, dim=1)
    return features_BD * {"nan": math.nan, "inf": math.inf}[how]


def train_with_faults(worker: Worker, configs: list[str], uris: list[str]) -> list[tuple[str, str]]:
    """What each run ends with, on every rank."""
    instdisc.train.loop.LOOK_S = 1e9  # when one looks does not depend on this machine's speed
    embed = Stepper._embed
    ends = []
    for (first, rank, how), config, uri in zip(FAULTS.values(), configs, uris, strict=True):

        def faulty(stepper, *args, _fault=(first, rank, how), **kwargs):
            first, rank, how = _fault
            features_BD = embed(stepper, *args, **kwargs)
            hit = stepper.state.step >= first and rank in (None, worker.rank)
            return spoil(features_BD, how) if hit else features_BD

        Stepper._embed = faulty
        Run(uri).agree_on_config(TrainConfig.from_json(config))
        try:
            train_worker(worker, config, uri)
        except (DeadBankError, NonFiniteError) as error:
            ends.append((type(error).__name__, str(error)))
        else:
            ends.append(("", "finished"))
    return ends


@pytest.fixture(scope="module")
def faulty_runs(tmp_path_factory):
    """By fault: how the run ended on each of three ranks, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("faults")
    root = str(write_cifar10(folder / "data", 210, 20))
    config = config_for("infonce", root).with_overrides(
        {"checkpoint.every_steps": 4, "bank.momentum": 0.0, "eval.every_epochs": 0, "optim.epochs": 2}
    )
    uris = [str(folder / name.replace(" ", "-")) for name in FAULTS]
    by_rank = run_local(train_with_faults, 3, [config.to_json()] * len(FAULTS), uris, preload=["instdisc.train.loop"])
    last = [read_latest(Run(uri).checkpoints()) for uri in uris]
    return dict(zip(FAULTS, zip(zip(*by_rank, strict=True), last, strict=True), strict=True))


def test_a_run_whose_features_are_one_ends_before_it_is_saved(faulty_runs):
    ends, last = faulty_runs["one feature"]
    assert {kind for kind, _ in ends} == {"DeadBankError"}
    assert {text.split(":")[0] for _, text in ends} == {"rank 0, step 5"}
    assert last.step == 4


def test_a_run_whose_rows_become_alike_ends_before_it_is_saved(faulty_runs):
    """The rows show it at the first look after 64 of a rank's 70 were written: 210 images, 14 a step, a look each 4."""
    ends, last = faulty_runs["nearly one feature"]
    assert {kind for kind, _ in ends} == {"DeadBankError"}
    assert {text.split(" of the bank")[0] for _, text in ends} == {"rank 0, step 16: found an effective rank of 1"}
    assert "rank 2, step 16" in ends[0][1]
    assert last.step == 12


@pytest.mark.parametrize(("fault", "where", "saved"), [("not a number", (1, 5), 4), ("infinite", (2, 2), None)])
def test_a_run_with_features_that_are_not_finite_names_where_they_came_from(faulty_runs, fault, where, saved):
    """By the next look all ranks have them, through the gradients: the first of them counts."""
    ends, last = faulty_runs[fault]
    assert {kind for kind, _ in ends} == {"NonFiniteError"}
    assert {text.split(":")[0] for _, text in ends} == {"rank {}, step {}".format(*where)}
    assert saved == (last and last.step)


GOOD = [0, 1, 2, 3], start_rows(4, 6, 50, 0, 4)
NAN_DD = GOOD[1].clone()
NAN_DD[2, 3] = math.nan
NOTHING = torch.empty(0, dtype=torch.int64), torch.empty(0, 6)
CONSTANT = torch.full((4, 6), 6**-0.5)
# What each of three ranks brings to an update, and what is said of it.
BROUGHT = {
    "nan": ([GOOD, ([7, 8, 9, 10], NAN_DD), GOOD], r"rank 1 brought a feature that is not finite for row 9"),
    "width": ([GOOD, GOOD, ([7, 8, 9, 10], torch.ones(4, 5))], r"rank 2 brought features of shape \(4, 5\)"),
    "one dimension": ([GOOD, GOOD, ([7], torch.ones(6))], r"rank 2 brought features of shape \(6, -1\)"),
    "too few": ([GOOD, ([7, 8, 9], GOOD[1]), GOOD], r"rank 1 brought features of shape \(4, 6\).* for 3 indices"),
    "too high": ([([0, 20], GOOD[1][:2]), NOTHING, GOOD], r"rank 0 brought indices from 0 to 20, expected 0 to 19"),
    "no int64": (
        [GOOD, (torch.tensor([], dtype=torch.float32), NOTHING[1]), GOOD],
        r"rank 1 brought indices that are not int64",
    ),
    "negative": ([GOOD, NOTHING, ([5, -2], GOOD[1][:2])], r"rank 2 brought indices from -2 to 5"),
    "one feature of all": (
        [([r, r + 3, r + 6, r + 9], CONSTANT) for r in range(3)],
        r"ranks 0, 1, 2 brought one feature for all 12 images",
    ),
    "one feature of one": ([NOTHING, ([4, 5, 6, 7], CONSTANT), NOTHING], r"rank 1 brought one feature for all 4"),
}


def bring(worker: Worker) -> list[tuple[str, bool, bool]]:
    """After each update: what was said, whether this rank's shard stayed as it was, and whether the next one worked."""
    found = []
    for step, (brought, _) in enumerate(BROUGHT.values()):
        bank = ShardedMemoryBank(20, 6, seed=1)
        indices, features_BD = brought[worker.rank]
        before_RD = bank.rows.clone()
        said = ""
        try:
            bank.update(torch.as_tensor(indices), features_BD, 30 + step)
        except ValueError as error:
            said = str(error)
        stayed = torch.equal(bank.rows, before_RD) and not (bank.last_step >= 0).any() and not bank.num_written
        own = torch.tensor([worker.rank, 17 + worker.rank])
        bank.update(own, start_rows(2, 6, 60 + worker.rank, 0, 2), 99)
        written = torch.zeros(1, dtype=torch.int64) + (bank.last_step == 99).sum()
        dist.all_reduce(written)
        found.append((said, bool(stayed), int(written) == 6))
    return found


@pytest.fixture(scope="module")
def brought_by_rank():
    return run_local(bring, 3)


@pytest.mark.parametrize("number", range(len(BROUGHT)), ids=BROUGHT)
def test_what_one_rank_brings_is_refused_on_every_rank_and_the_next_update_works(brought_by_rank, number):
    expected = list(BROUGHT.values())[number][1]
    said = {found[number][0] for found in brought_by_rank}
    assert len(said) == 1
    assert said.pop().startswith(f"memory bank update at step {30 + number}: ")
    for found in brought_by_rank:
        text, stayed, went_on = found[number]
        assert re.search(expected, text)
        assert "nothing was written" in text
        assert stayed
        assert went_on
