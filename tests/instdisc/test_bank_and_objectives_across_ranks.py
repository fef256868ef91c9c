"""The sharded bank and every objective on 1 to 4 processes against the float64 reference, in one group of processes.

Shapes: N rows, G samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import npid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.negatives import negative_indices
from instdisc.objectives import infonce_loss, nce_loss, softmax_loss

NUM_ROWS, DIM, GLOBAL_BATCH, NUM_NEGATIVES = 103, 16, 13, 50
TEMPERATURE, Z, PROXIMAL = 0.1, 250.0, 0.7
WORLD_SIZES = (1, 2, 3, 4)
STEPS = 3
# What each rank brings of the 13 samples, uneven and once nothing at all.
COUNTS = {1: [13], 2: [9, 4], 3: [6, 0, 7], 4: [1, 5, 4, 3]}


def samples(step):
    """Features, indices (one row stands twice) and validity of one global step."""
    generator = np.random.default_rng(100 + step)
    features_GD = reference.unit(generator.standard_normal((GLOBAL_BATCH, DIM)))
    indices_G = generator.permutation(NUM_ROWS)[:GLOBAL_BATCH]
    indices_G[11] = indices_G[2]
    valid_G = np.ones(GLOBAL_BATCH, dtype=bool)
    valid_G[5] = False
    return features_GD, indices_G, valid_G


def run_on_every_world_size(worker: Worker) -> dict:
    found = {}
    for world_size in WORLD_SIZES:
        group = dist.new_group(list(range(world_size)))
        if worker.rank < world_size:
            found[world_size] = run_steps(worker.rank, COUNTS[world_size], group)
    return found


def run_steps(rank, counts, group) -> dict:
    bank = ShardedMemoryBank(NUM_ROWS, DIM, seed=3, group=group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    steps = []
    for step in range(STEPS):
        features_GD, indices_G, valid_G = samples(step)
        indices_B = torch.from_numpy(indices_G[own])
        positives_BD = bank.lookup(indices_B)
        negatives_KD, indices_K = bank.gather_negatives(step, NUM_NEGATIVES)
        excluded_BK = indices_B[:, None] == indices_K[None, :]
        scored = {}
        for name in ("softmax", "nce", "infonce"):
            features_BD = torch.from_numpy(features_GD[own]).float().requires_grad_()
            if name == "softmax":
                loss = softmax_loss(features_BD, indices_B, bank, temperature=TEMPERATURE, score_bytes=13 * 4 * 7)
            elif name == "nce":
                loss = nce_loss(
                    features_BD,
                    positives_BD,
                    negatives_KD,
                    temperature=TEMPERATURE,
                    log_z=np.log(Z),
                    num_rows=NUM_ROWS,
                    proximal_weight=PROXIMAL,
                )
            else:
                loss = infonce_loss(
                    features_BD, positives_BD, negatives_KD, temperature=TEMPERATURE, excluded_BK=excluded_BK
                )
            loss.backward()
            assert features_BD.grad is not None
            scored[name] = (loss.item(), features_BD.grad.tolist())
        valid_B = torch.from_numpy(valid_G[own])
        bank.update(indices_B, torch.from_numpy(features_GD[own]), step, valid_B)
        steps.append({"scored": scored, "negatives": negatives_KD.tolist()})
    return {"steps": steps, "rows": bank.rows.tolist(), "last_step": bank.last_step.tolist(), "start": bank.start}


@pytest.fixture(scope="module")
def by_rank():
    return run_local(run_on_every_world_size, 4)


@pytest.fixture(scope="module")
def expected():
    """The same steps in float64 on one bank."""
    bank_ND = start_rows(NUM_ROWS, DIM, 3, 0, NUM_ROWS).double().numpy()
    last_step_N = np.full(NUM_ROWS, -1)
    steps = []
    for step in range(STEPS):
        features_GD, indices_G, valid_G = samples(step)
        negatives_K = negative_indices(3, step, NUM_NEGATIVES, NUM_ROWS).numpy()
        steps.append(
            {
                "softmax": reference.softmax_losses(features_GD, indices_G, bank_ND, TEMPERATURE),
                "nce": reference.nce_losses(features_GD, indices_G, negatives_K, bank_ND, TEMPERATURE, Z, PROXIMAL),
                "infonce": reference.infonce_losses(features_GD, indices_G, negatives_K, bank_ND, TEMPERATURE),
                "negatives": bank_ND[negatives_K],
            }
        )
        bank_ND, last_step_N = reference.updated_bank(
            bank_ND, last_step_N, indices_G, features_GD, valid_G, momentum=0.5, step=step
        )
    return steps, bank_ND, last_step_N


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["softmax", "nce", "infonce"])
def test_loss_and_gradient_equal_the_float64_reference_on_any_number_of_processes(by_rank, expected, world_size, name):
    counts = COUNTS[world_size]
    for step in range(STEPS):
        losses_G, gradient_GD = expected[0][step][name]
        for rank, count in enumerate(counts):
            loss, gradient_BD = by_rank[rank][world_size]["steps"][step]["scored"][name]
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            if count == 0:
                assert loss == 0
                continue
            np.testing.assert_allclose(loss, losses_G[own].mean(), rtol=2e-6)
            np.testing.assert_allclose(np.array(gradient_BD) * count, gradient_GD[own], rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_gets_the_same_negatives_as_one_process_has(by_rank, expected, world_size):
    for step in range(STEPS):
        for rank in range(world_size):
            found_KD = np.array(by_rank[rank][world_size]["steps"][step]["negatives"])
            np.testing.assert_allclose(found_KD, expected[0][step]["negatives"], atol=1e-6)
            np.testing.assert_array_equal(found_KD, by_rank[0][1]["steps"][step]["negatives"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_and_last_written_steps_equal_the_reference_and_do_not_depend_on_the_shards(by_rank, expected, world_size):
    parts = [by_rank[rank][world_size] for rank in range(world_size)]
    assert [part["start"] for part in parts] == [NUM_ROWS * r // world_size for r in range(world_size)]
    rows_ND = np.concatenate([part["rows"] for part in parts])
    np.testing.assert_allclose(rows_ND, expected[1], atol=1e-6)
    np.testing.assert_array_equal(rows_ND, by_rank[0][1]["rows"])
    np.testing.assert_array_equal(np.concatenate([part["last_step"] for part in parts]), expected[2])
