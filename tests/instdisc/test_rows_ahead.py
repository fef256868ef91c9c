"""Rows that are fetched ahead are to the bit those that a fetch at the last moment brings, whatever the timing.

200 steps on small banks, whose rows are written and wanted again at once, on 1 to 4 processes, with random delays on
every rank; and the public training function.

Shapes: N rows, G samples, B samples of a rank, K negatives, D feature numbers.
"""

from __future__ import annotations

import functools
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_data import write_cifar10

import instdisc.train.step
from cluster.checkpoint import read_latest
from cluster.collectives import start_all_gather_rows
from cluster.worker import Worker, run_local
from dataloading import stream
from instdisc.bank_storage import start_rows
from instdisc.config import TrainConfig
from instdisc.launch import train_worker
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.negatives import negative_indices
from instdisc.recipes import recipe
from instdisc.rows_ahead import RowsAhead
from instdisc.runs import Run

NUM_ROWS, DIM, GLOBAL_BATCH, NUM_NEGATIVES, SEED, STEPS = 41, 12, 9, 30, 5, 200
COUNTS = {1: [9], 2: [4, 5], 3: [2, 0, 7], 4: [3, 1, 1, 4]}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AHEAD = (0, 1, 4)
OF_16_BITS = ("float16", "bfloat16")


def rows_of_step(step: int) -> np.ndarray:
    return stream.rows(stream.positions(step, GLOBAL_BATCH), NUM_ROWS, SEED)


def noise(step: int) -> np.ndarray:
    """What a step adds to its features, (G, D); one of them is not finite now and then."""
    found_GD = np.random.default_rng([1, step]).standard_normal((GLOBAL_BATCH, DIM)).astype(np.float32)
    if step % 31 == 7:
        found_GD[step % GLOBAL_BATCH, 3] = np.nan
    return found_GD


def valid(step: int) -> np.ndarray:
    found_G = np.ones(GLOBAL_BATCH, dtype=bool)
    if step % 5 == 2:
        found_G[(step * 3) % GLOBAL_BATCH] = False
    return found_G


def features_of(rows_GD: torch.Tensor, negatives_KD: torch.Tensor, step: int) -> torch.Tensor:
    """Features that depend on what a step reads, by elementwise arithmetic alone; now and then all are the same."""
    if step % 50 == 49:
        return torch.full_like(rows_GD, 0.25)
    seen_D = negatives_KD[step % NUM_NEGATIVES] - negatives_KD[0]
    return 0.5 * rows_GD + 0.25 * seen_D + 0.125 * torch.from_numpy(noise(step))[: len(rows_GD)]


def run_on_every_world_size(worker: Worker, delay_s: float) -> dict:
    chance = random.Random(worker.rank)
    found = {}
    for world_size, counts in COUNTS.items():
        group = dist.new_group(list(range(world_size)))
        if worker.rank < world_size:
            cases = [("float32", ahead) for ahead in AHEAD]
            if world_size in (1, 3):
                cases += [(dtype, ahead) for dtype in OF_16_BITS for ahead in (0, 1)]
            for dtype, ahead in cases:
                pause = functools.partial(sometimes_sleep, chance, delay_s) if ahead else int
                found[world_size, dtype, ahead] = run_steps(worker.rank, counts, group, dtype, ahead, pause)
    return found


def sometimes_sleep(chance: random.Random, delay_s: float) -> None:
    if chance.random() < 0.02:
        time.sleep(chance.random() * delay_s)


def run_steps(rank, counts, group, dtype, ahead, pause) -> dict:
    bank = ShardedMemoryBank(NUM_ROWS, DIM, seed=3, group=group, dtype=DTYPES[dtype])
    rows_ahead = RowsAhead(
        bank,
        rows_of_step,
        global_batch=GLOBAL_BATCH,
        num_negatives=NUM_NEGATIVES,
        negatives_seed=SEED,
        ahead=ahead,
    )
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    read = []
    for step in range(STEPS):
        pause()
        validity = start_all_gather_rows(torch.from_numpy(valid(step))[own], counts, group)
        rows_ahead.start(step)
        pause()
        rows = rows_ahead.take(step)
        assert torch.equal(rows.indices_K, negative_indices(SEED, step, NUM_NEGATIVES, NUM_ROWS))
        read.append(torch.cat([rows.positives_GD, rows.negatives_KD]).double().sum().item())
        features_BD = features_of(rows.positives_GD, rows.negatives_KD, step)[own]
        pause()
        rows_ahead.will_write(bank.start_update(rows.indices_G, counts, validity, features_BD, step))
        if step % 17 == 3:  # a look, an evaluation, a checkpoint
            rows_ahead.settle()
    rows_ahead.settle()
    return {"read": read, "rows": bank.rows.float(), "last_step": bank.last_step, "written": int(bank.num_written)}


@pytest.fixture(scope="module")
def by_rank():
    return run_local(run_on_every_world_size, 4, 0.03)


@pytest.fixture(scope="module")
def reference():
    """The same 200 steps in float64 on one bank, one after the other."""
    bank_ND = start_rows(NUM_ROWS, DIM, 3, 0, NUM_ROWS).double()
    last_step_N = np.full(NUM_ROWS, -1)
    for step in range(STEPS):
        indices_G, valid_G = rows_of_step(step), valid(step)
        negatives_K = negative_indices(SEED, step, NUM_NEGATIVES, NUM_ROWS)
        features_GD = features_of(bank_ND[indices_G], bank_ND[negatives_K], step)
        before_ND = bank_ND.clone()
        if step % 50 == 49:
            continue
        for index, feature_D, counts in zip(indices_G, features_GD, valid_G, strict=True):
            if counts and feature_D.isfinite().all():
                mixed_D = 0.5 * before_ND[index] + 0.5 * feature_D
                bank_ND[index], last_step_N[index] = mixed_D / mixed_D.norm(), step
    return bank_ND, last_step_N


def whole(by_rank, world_size, dtype, ahead, what):
    return torch.cat([by_rank[rank][world_size, dtype, ahead][what] for rank in range(world_size)])


@pytest.mark.parametrize("world_size", COUNTS)
@pytest.mark.parametrize("ahead", AHEAD)
def test_what_is_read_and_left_is_to_the_bit_that_of_one_process_without_fetching_ahead(by_rank, world_size, ahead):
    expected = by_rank[0][1, "float32", 0]
    for rank in range(world_size):
        assert by_rank[rank][world_size, "float32", ahead]["read"] == expected["read"]
    assert torch.equal(whole(by_rank, world_size, "float32", ahead, "rows"), expected["rows"])
    assert torch.equal(whole(by_rank, world_size, "float32", ahead, "last_step"), expected["last_step"])


@pytest.mark.parametrize("dtype", OF_16_BITS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_of_16_bits_are_brought_up_to_date_with_their_rounding(by_rank, world_size, dtype):
    expected = by_rank[0][1, dtype, 0]
    for rank in range(world_size):
        assert by_rank[rank][world_size, dtype, 1]["read"] == expected["read"]
    assert torch.equal(whole(by_rank, world_size, dtype, 1, "rows"), expected["rows"])


def test_200_steps_equal_the_float64_reference(by_rank, reference):
    found = by_rank[0][1, "float32", 0]
    bank_ND, last_step_N = reference
    np.testing.assert_array_equal(found["last_step"].numpy(), last_step_N)
    np.testing.assert_allclose(found["rows"].numpy(), bank_ND.numpy(), atol=2e-5)
    assert found["written"] == int((last_step_N >= 0).sum())


def config_for(root: str, ahead: int, objective: str) -> TrainConfig:
    return recipe(
        "cifar10-cpu",
        **{
            "data.root": root,
            "data.max_rows": None,
            "model.architecture": "resnet-small",
            "model.width": 8,
            "model.blocks": (1, 1),
            "model.feature_dim": 16,
            "objective.name": objective,
            **({} if objective == "softmax" else {"objective.num_negatives": 60}),
            **({"objective.z": "ema"} if objective == "nce" else {}),
            "bank.fetch_ahead": ahead,
            "optim.epochs": 25 * 14 / 103,
            "optim.global_batch": 14,
            "optim.norm_group": 4,
            "optim.warmup_epochs": 1,
            "eval.every_epochs": 0,
            "eval.k": 5,
            "eval.baselines": False,
            "system.tensorboard": False,
            "system.log_every": 7,
        },
    )


def train_with_delays(worker: Worker, configs: list[str], uris: list[str]) -> None:
    chance = random.Random(100 + worker.rank)
    embed = instdisc.train.step.Stepper._embed

    def late(*args, **kwargs):
        sometimes_sleep(chance, 0.5)
        return embed(*args, **kwargs)

    instdisc.train.step.Stepper._embed = late
    for config, uri in zip(configs, uris, strict=True):
        Run(uri).agree_on_config(TrainConfig.from_json(config))
        train_worker(worker, config, uri)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_run_ends_with_the_same_bits_however_far_ahead_it_fetches(tmp_path, workers):
    root = str(write_cifar10(tmp_path / "data", 103, 20))
    cases = [("nce", 0), ("nce", 1), ("nce", 3), ("softmax", 0), ("softmax", 1)]
    uris = [str(tmp_path / f"{objective}-{ahead}") for objective, ahead in cases]
    configs = [config_for(root, ahead, objective).to_json() for objective, ahead in cases]
    run_local(train_with_delays, workers, configs, uris, preload=["instdisc.train.loop"])
    ends = {case: read_latest(Run(uri).checkpoints()) for case, uri in zip(cases, uris, strict=True)}
    for objective, ahead in cases:
        expected, found = ends[objective, 0], ends[objective, ahead]
        assert found is not None
        assert found.step == 25
        assert found.state["normalizer"] == expected.state["normalizer"]
        assert torch.equal(found.rows("bank"), expected.rows("bank"))
        tensors = found.tensors()
        assert all(torch.equal(tensors[name], value) for name, value in expected.tensors().items())
