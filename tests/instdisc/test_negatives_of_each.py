"""Negatives of each sample's own: the draws, and the sums that the owners of rows send, on 1 to 4 processes, against
float64; and training with them and with the other options of InfoNCE on one process and on three.

Shapes: N rows, G samples, B samples of a rank, K negatives of a sample, D feature numbers.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import npid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_training_across_workers import STEPS as LONG_STEPS
from test_training_across_workers import TOLERANCES, config_for, difference, train_all
from tiny_data import write_cifar10

from cluster.checkpoint import read_latest
from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.negatives import negative_indices_of_each
from instdisc.objectives import owners
from instdisc.objectives.nce import nce_offset
from instdisc.runs import Run

DIM, GLOBAL_BATCH, TEMPERATURE, Z, SEED = 16, 13, 0.1, 250.0, 7
COUNTS = {1: [13], 2: [9, 4], 3: [6, 0, 7], 4: [1, 5, 4, 3]}


@dataclass(frozen=True)
class Case:
    num_rows: int = 103
    num_negatives: int = 50
    dtype: torch.dtype = torch.float32
    block_bytes: int = owners.BLOCK_BYTES


CASES = {
    "one block": Case(),
    # A sample's rows take 3,200 bytes in float32, so blocks have 3 samples and more, and the last one fewer.
    "ragged blocks": Case(block_bytes=3 * 3200),
    "a block a sample": Case(block_bytes=1),
    "ranks without a row of some samples": Case(num_negatives=3),
    "more negatives than rows, more ranks than rows": Case(num_rows=3, num_negatives=20),
    "float16": Case(dtype=torch.float16, block_bytes=4 * 3200),
    "bfloat16": Case(dtype=torch.bfloat16, block_bytes=4 * 3200),
}


def samples(case: Case):
    """Features, indices, what each loss is multiplied with (0 for one of them), and the negatives of a step."""
    generator = np.random.default_rng(case.num_rows)
    features_GD = reference.unit(generator.standard_normal((GLOBAL_BATCH, DIM)))
    indices_G = generator.permutation(np.arange(GLOBAL_BATCH) % case.num_rows)
    weights_G = generator.standard_normal(GLOBAL_BATCH)
    weights_G[3] = 0
    drawn_GK = negative_indices_of_each(SEED, 4, GLOBAL_BATCH, case.num_negatives, case.num_rows).numpy()
    indices_G[0] = drawn_GK[0, 1]  # at least one negative is the sample's own row
    return features_GD, indices_G, weights_G, drawn_GK


def run_on_every_world_size(worker: Worker) -> dict:
    found = {}
    for world_size, counts in COUNTS.items():
        group = dist.new_group(list(range(world_size)))
        if worker.rank < world_size:
            for name, case in CASES.items():
                found[world_size, name] = run_case(worker.rank, counts, group, case)
    return found


def run_case(rank: int, counts: list[int], group, case: Case) -> dict:
    owners.BLOCK_BYTES = case.block_bytes
    bank = ShardedMemoryBank(case.num_rows, DIM, seed=3, dtype=case.dtype, group=group)
    features_GD, indices_G, weights_G, drawn_GK = samples(case)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    weights_B = torch.from_numpy(weights_G[own]).float()
    found = {"drawn": drawn_GK.tolist()}
    for name in ("noise", "all", "others"):
        features_BD = torch.from_numpy(features_GD[own]).float().requires_grad_()
        pairs = owners.owned_pairs(drawn_GK, bank, excluded_G=indices_G if name == "others" else None)
        if name == "noise":
            offset = nce_offset(torch.tensor(np.log(Z)), case.num_negatives, case.num_rows)
            values_B, log_sums_B = owners.nce_noise_of_owned(
                features_BD, pairs, bank, temperature=TEMPERATURE, offset=offset, counts_W=counts
            )
            assert not log_sums_B.requires_grad
            found["log sums of noise"] = log_sums_B.tolist()
        else:
            values_B = owners.log_sum_exp_of_owned(features_BD, pairs, bank, temperature=TEMPERATURE, counts_W=counts)
        (weights_B * values_B.where(values_B.isfinite(), 0)).sum().backward()
        assert features_BD.grad is not None
        assert not bank.rows.requires_grad
        found[name] = values_B.tolist(), features_BD.grad.tolist()
    return found


@pytest.fixture(scope="module")
def by_rank():
    return run_local(run_on_every_world_size, 4)


def expected(case: Case, name: str):
    """Values, and gradients of the weighted values, of all samples in float64."""
    bank_ND = start_rows(case.num_rows, DIM, 3, 0, case.num_rows).to(case.dtype).double().numpy()
    features_GD, indices_G, weights_G, drawn_GK = samples(case)
    if name == "noise":
        values_G, gradient_GD, _ = reference.noise_of_each(features_GD, drawn_GK, bank_ND, TEMPERATURE, Z)
    else:
        counts_GK = (drawn_GK != indices_G[:, None]) | (name == "all")
        assert name == "all" or not counts_GK.all()
        values_G, gradient_GD = reference.log_sum_exp_of_each(features_GD, drawn_GK, counts_GK, bank_ND, TEMPERATURE)
    return values_G, weights_G[:, None] * gradient_GD


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", COUNTS)
@pytest.mark.parametrize("name", ["noise", "all", "others"])
def test_sums_of_owners_and_their_gradients_equal_float64_on_any_number_of_processes(by_rank, world_size, case, name):
    values_G, gradient_GD = expected(CASES[case], name)
    parts = [by_rank[rank][world_size, case][name] for rank in range(world_size)]
    assert [len(values) for values, _ in parts] == COUNTS[world_size]
    found_GD = np.concatenate([np.array(gradient).reshape(-1, DIM) for _, gradient in parts])
    np.testing.assert_allclose(np.concatenate([values for values, _ in parts]), values_G, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(found_GD, gradient_GD, rtol=1e-4, atol=5e-6)
    assert np.abs(gradient_GD).max() > 0.1
    assert not found_GD[3].any(), "a sample whose loss counts nothing gets no gradient from those of others"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", COUNTS)
def test_what_z_is_estimated_from_equals_float64(by_rank, world_size, case):
    bank_ND = start_rows(CASES[case].num_rows, DIM, 3, 0, CASES[case].num_rows).to(CASES[case].dtype).double().numpy()
    features_GD, _, _, drawn_GK = samples(CASES[case])
    _, _, log_sums_G = reference.noise_of_each(features_GD, drawn_GK, bank_ND, TEMPERATURE, Z)
    found_G = np.concatenate([by_rank[rank][world_size, case]["log sums of noise"] for rank in range(world_size)])
    np.testing.assert_allclose(found_G, log_sums_G, rtol=3e-6, atol=1e-6)


def test_every_rank_draws_the_same(by_rank):
    for case in CASES:
        drawn = {str(by_rank[rank][size, case]["drawn"]) for size in COUNTS for rank in range(size)}
        assert len(drawn) == 1


def test_some_rank_has_no_row_of_some_sample():
    """What the case is for: without it, the test above would not see a sample that a rank has nothing of."""
    drawn_GK = samples(CASES["ranks without a row of some samples"])[3]
    owners_GK = np.searchsorted([103 * rank // 4 for rank in range(1, 4)], drawn_GK, side="right")
    assert all((owners_GK != rank).all(axis=1).any() for rank in range(4))


def test_a_sample_without_negatives_has_neither_sum_nor_gradient():
    bank = ShardedMemoryBank(5, DIM, seed=3)
    features_BD = torch.nn.functional.normalize(torch.ones(2, DIM), dim=1).requires_grad_()
    pairs = owners.owned_pairs(np.array([[2, 2], [1, 4]]), bank, excluded_G=np.array([2, 0]))
    log_sums_B = owners.log_sum_exp_of_owned(features_BD, pairs, bank, temperature=0.1, counts_W=[2])
    assert log_sums_B[0] == -torch.inf
    assert log_sums_B[1].isfinite()
    log_sums_B.sum().backward()
    assert features_BD.grad is not None
    assert features_BD.grad.isfinite().all()
    assert not features_BD.grad[0].any()


def test_scores_at_the_ends_of_their_range_give_finite_sums_and_gradients():
    """At the smallest temperature that sums of owners take, 0.025, s reaches ±40 and exp(s - 1/τ) reaches e^-80."""
    for sign, score in ((1.0, 40.0), (-1.0, -40.0)):
        bank = ShardedMemoryBank(5, DIM, seed=3)
        bank.rows[:] = bank.rows[0].clone()
        features_BD = (sign * bank.rows[:1]).clone().requires_grad_()
        pairs = owners.owned_pairs(np.arange(4)[None], bank)
        log_sum_B = owners.log_sum_exp_of_owned(features_BD, pairs, bank, temperature=0.025, counts_W=[1])
        assert log_sum_B.item() == pytest.approx(score + np.log(4), abs=1e-4)
        log_sum_B.sum().backward()
        torch.testing.assert_close(features_BD.grad, bank.rows[:1] / 0.025, rtol=1e-4, atol=1e-4)


def test_draws_are_uniform_in_ones_and_in_pairs():
    drawn_SGK = torch.stack([negative_indices_of_each(1, step, 10, 100, 20) for step in range(50)])
    counts = torch.bincount(drawn_SGK.flatten(), minlength=20).double()
    # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand; with 399: above 490.
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 43.8
    for following in (drawn_SGK[:, :, 1:], drawn_SGK[:, 1:], drawn_SGK[1:]):
        steps, rows, columns = following.shape
        before = drawn_SGK[:steps, :rows, :columns]
        pairs = torch.bincount((20 * before + following).flatten(), minlength=400).double()
        mean = following.numel() / 400
        assert float(((pairs - mean) ** 2 / mean).sum()) < 490


@pytest.mark.parametrize("num_rows", [1, 2, 3, 103, 1_281_167, 2**31 + 11])
def test_draws_lie_in_the_rows(num_rows):
    drawn_GK = negative_indices_of_each(2**63 - 1, 2**40, 50, 200, num_rows)
    assert drawn_GK.shape == (50, 200)
    assert drawn_GK.dtype == torch.int64
    assert int(drawn_GK.min()) >= 0
    assert int(drawn_GK.max()) < num_rows
    assert int(drawn_GK.max()) >= 0.99 * (num_rows - 1)


def test_draws_differ_between_samples_steps_and_seeds_and_repeat_for_the_same():
    drawn = [negative_indices_of_each(seed, step, 4, 9, 10**6) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    rows = [tuple(row_K.tolist()) for drawn_GK in drawn for row_K in drawn_GK]
    assert len(set(rows)) == 16
    assert torch.equal(negative_indices_of_each(1, 0, 4, 9, 10**6), drawn[2])


TRAINED = {
    "nce, per sample": ("nce", {"objective.per_sample": True}),
    "hard, and per sample": ("infonce", {"objective.hard_negatives": 3, "objective.per_sample": True}),
    "debiased": ("infonce", {"objective.denominator": "debiased"}),
}
FEW_STEPS = 4
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The checkpoint after four steps, by number of processes, what is trained, and seed."""
    folder = tmp_path_factory.mktemp("options")
    root = str(write_cifar10(folder / "data", 103, 20))
    cases = [(what, seed) for what in TRAINED for seed in SEEDS]
    configs = []
    for what, seed in cases:
        objective, options = TRAINED[what]
        configs.append(config_for(objective, root, FEW_STEPS, seed=seed).with_overrides(options).to_json())
    assert FEW_STEPS in TOLERANCES
    assert FEW_STEPS != LONG_STEPS
    found = {}
    for workers in (0, 3):
        uris = [str(folder / f"{workers}-{number}") for number in range(len(cases))]
        run_local(train_all, workers, configs, uris, preload=["instdisc.train.loop"])
        for (what, seed), uri in zip(cases, uris, strict=True):
            found[workers, what, seed] = read_latest(Run(uri).checkpoints())
    return found


@pytest.mark.parametrize("what", TRAINED)
def test_training_ends_alike_on_one_process_and_on_three(runs, what):
    """The middle one of three seeds is held to the noise of summation, as in test_training_across_workers."""
    differences = [difference(runs[0, what, seed], runs[3, what, seed], FEW_STEPS) for seed in SEEDS]
    for found, allowed in zip(
        map(statistics.median, zip(*differences, strict=True)), TOLERANCES[FEW_STEPS], strict=True
    ):
        assert found <= allowed, differences


def test_every_option_trains_something_else(runs):
    """An option that did nothing would pass the test above."""
    ends = [runs[0, what, 0].rows("bank") for what in TRAINED]
    assert all(not torch.equal(ends[i], ends[k]) for i in range(len(ends)) for k in range(i))
