"""The rows nearest to each feature against a search in float64, on 1 to 4 processes; the denominators of InfoNCE
against the papers' formulas.

Shapes: N rows, G samples, B samples of a rank, K negatives, D feature numbers.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import npid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist

import instdisc.hard_negatives
from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.hard_negatives import nearest_owned
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives.infonce import contrast, log_sum_exp
from instdisc.objectives.own_rows import ScorePlaces
from instdisc.objectives.owners import log_sum_exp_of_owned

NUM_ROWS, DIM, GLOBAL_BATCH, TEMPERATURE = 103, 16, 9, 0.1
COUNTS = {1: [9], 2: [4, 5], 3: [2, 0, 7], 4: [3, 1, 1, 4]}
# Shards have 25 rows and more: 40 are more than one of four has, 200 more than there are.
NUM_HARD = (1, 5, 40, 200)
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def samples():
    """Features, the first of which is its own row, and own rows, one of them twice."""
    generator = np.random.default_rng(0)
    indices_G = generator.permutation(NUM_ROWS)[:GLOBAL_BATCH]
    indices_G[7] = indices_G[1]
    features_GD = reference.unit(generator.standard_normal((GLOBAL_BATCH, DIM)))
    features_GD[0] = start_rows(NUM_ROWS, DIM, 3, 0, NUM_ROWS).double().numpy()[indices_G[0]]
    return features_GD, indices_G


def run_on_every_world_size(worker: Worker) -> dict:
    instdisc.hard_negatives.BLOCK_SCORES = 7 * GLOBAL_BATCH  # seven rows a block, unless more are asked for
    found = {}
    for world_size, counts in COUNTS.items():
        group = dist.new_group(list(range(world_size)))
        if worker.rank < world_size:
            for dtype in KINDS:
                bank = ShardedMemoryBank(NUM_ROWS, DIM, seed=3, dtype=KINDS[dtype], group=group)
                found[world_size, dtype] = {hard: search(worker.rank, counts, bank, hard) for hard in NUM_HARD}
            found[world_size, "ties"] = search_among_copies(group)
            found[world_size, "tiny"] = search_in_fewer_rows_than_ranks(group)
    return found


def search(rank: int, counts: list[int], bank: ShardedMemoryBank, num_hard: int) -> dict:
    features_GD, indices_G = samples()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    features_BD = torch.from_numpy(features_GD[own]).float().requires_grad_()
    pairs = nearest_owned(torch.from_numpy(features_GD).float(), torch.from_numpy(indices_G), bank, num_hard)
    log_sums_B = log_sum_exp_of_owned(features_BD, pairs, bank, temperature=TEMPERATURE, counts_W=counts)
    log_sums_B.sum().backward()
    assert features_BD.grad is not None
    return {"rows": rows_of(pairs, bank), "sums": log_sums_B.tolist(), "gradient": features_BD.grad.tolist()}


def rows_of(pairs, bank) -> list[list[int]]:
    """The chosen row numbers of each sample."""
    parts = np.split(pairs.places_P + bank.start, np.cumsum(pairs.counts_G)[:-1])
    return [part.tolist() for part in parts]


def search_among_copies(group) -> list[list[int]]:
    """Rows 10, 11, ... 89 are one vector, nearer to the feature than all others; every shard has some of them."""
    bank = ShardedMemoryBank(NUM_ROWS, DIM, seed=3, group=group)
    copy_D = start_rows(1, DIM, 99, 0, 1)[0]
    for row in range(max(10, bank.start), min(90, bank.stop)):
        bank.rows[row - bank.start] = copy_D
    return rows_of(nearest_owned(copy_D[None], torch.tensor([50]), bank, 5), bank)


def search_in_fewer_rows_than_ranks(group) -> list[list[int]]:
    bank = ShardedMemoryBank(3, DIM, seed=3, group=group)
    features_GD = start_rows(2, DIM, 98, 0, 2)
    return rows_of(nearest_owned(features_GD, torch.tensor([0, 2]), bank, 4), bank)


@pytest.fixture(scope="module")
def by_rank():
    return run_local(run_on_every_world_size, 4)


def together(by_rank, world_size: int, what: str) -> list[list[int]]:
    """The rows that all ranks chose for each sample."""
    parts = [by_rank[rank][world_size, what] for rank in range(world_size)]
    return [list(chain(*rows)) for rows in zip(*parts, strict=True)]


@pytest.mark.parametrize("num_hard", NUM_HARD)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("world_size", COUNTS)
def test_the_nearest_rows_and_their_sums_equal_a_search_in_float64(by_rank, world_size, dtype, num_hard):
    bank_ND = start_rows(NUM_ROWS, DIM, 3, 0, NUM_ROWS).to(KINDS[dtype]).double().numpy()
    features_GD, indices_G = samples()
    nearest_GH = reference.nearest_rows(features_GD, indices_G, bank_ND, num_hard)
    parts = [by_rank[rank][world_size, dtype][num_hard] for rank in range(world_size)]
    for sample in range(GLOBAL_BATCH):
        chosen = list(chain(*(part["rows"][sample] for part in parts)))
        assert sorted(chosen) == sorted(nearest_GH[sample].tolist())
        assert indices_G[sample] not in chosen
    sums_G, gradient_GD = reference.log_sum_exp_of_each(features_GD, np.stack(nearest_GH), 1, bank_ND, TEMPERATURE)
    np.testing.assert_allclose(list(chain(*(part["sums"] for part in parts))), sums_G, rtol=3e-6, atol=1e-6)
    found_GD = np.concatenate([np.array(part["gradient"]).reshape(-1, DIM) for part in parts])
    np.testing.assert_allclose(found_GD, gradient_GD, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("world_size", COUNTS)
def test_of_rows_that_are_as_near_as_many_are_taken_as_were_asked_for(by_rank, world_size):
    """More on more ranks would change the loss: log of the number of copies that count."""
    (chosen,) = together(by_rank, world_size, "ties")
    assert len(chosen) == len(set(chosen)) == 5
    assert set(chosen) <= set(range(10, 90)) - {50}


@pytest.mark.parametrize("world_size", COUNTS)
def test_with_fewer_rows_than_ranks_all_but_the_own_row_are_taken(by_rank, world_size):
    first, second = together(by_rank, world_size, "tiny")
    assert Counter(first) == Counter([1, 2])
    assert Counter(second) == Counter([0, 1])


def scores(seed: int = 0, num_negatives: int = 40):
    """s_i/τ and s_k/τ of seven samples at τ = 0.1."""
    generator = np.random.default_rng(seed)
    cosines = generator.uniform(-0.9, 0.9, (7, num_negatives + 1))
    return cosines[:, 0] / TEMPERATURE, cosines[:, 1:] / TEMPERATURE


def log_sums(negative_GK) -> torch.Tensor:
    return torch.logsumexp(torch.from_numpy(negative_GK), dim=1)


def test_decoupled_is_equation_6_of_its_paper():
    positive_G, negative_GK = scores()
    found_G = contrast(torch.from_numpy(positive_G), log_sums(negative_GK), denominator="decoupled")
    np.testing.assert_allclose(found_G, reference.decoupled_losses(positive_G, negative_GK), rtol=1e-12)


@pytest.mark.parametrize("prior", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_debiased_is_equation_8_of_its_paper_at_the_floor_as_well(prior):
    positive_G, negative_GK = scores()
    # Certainly above the floor, and certainly at it: the positive takes all, or the negatives have nothing.
    positive_G[:2], positive_G[2] = -1 / TEMPERATURE, 1 / TEMPERATURE
    negative_GK[3] = -1 / TEMPERATURE
    found_G = contrast(
        torch.from_numpy(positive_G),
        log_sums(negative_GK),
        denominator="debiased",
        num_negatives=negative_GK.shape[1],
        prior=prior,
        temperature=TEMPERATURE,
    )
    expected_G = reference.debiased_losses(positive_G, negative_GK, prior, TEMPERATURE)
    np.testing.assert_allclose(found_G, expected_G, rtol=1e-9, atol=1e-12)


def test_debiased_with_the_prior_0_and_all_negatives_far_from_the_floor_is_infonce():
    positive_G, negative_GK = scores()
    arguments = torch.from_numpy(positive_G), log_sums(negative_GK)
    debiased_G = contrast(*arguments, denominator="debiased", num_negatives=40, prior=0.0, temperature=TEMPERATURE)
    torch.testing.assert_close(debiased_G, contrast(*arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("denominator", ["standard", "decoupled", "debiased"])
def test_gradients_of_the_denominators_are_those_of_finite_differences(denominator):
    positive_G, negative_GK = scores(1)
    # Sample 0 lies at the floor of "debiased", where the negatives have no gradient; none lies at its edge.
    positive_G[0] = 1 / TEMPERATURE
    arguments = torch.from_numpy(positive_G).requires_grad_(), log_sums(negative_GK).requires_grad_()

    def losses(positive_B, negative_B):
        return contrast(
            positive_B, negative_B, denominator=denominator, num_negatives=40, prior=0.1, temperature=TEMPERATURE
        )

    assert torch.autograd.gradcheck(losses, arguments, eps=1e-7, atol=1e-6)
    if denominator == "debiased":
        losses(*arguments)[0].backward()
        assert arguments[1].grad is not None
        assert arguments[1].grad[0] == 0


@pytest.mark.parametrize("denominator", ["standard", "decoupled", "debiased"])
@pytest.mark.parametrize("prior", [0.0, 0.1, 0.9])
def test_extreme_scores_give_finite_losses_and_gradients(denominator, prior):
    """At τ = 0.03 scores reach ±33.3; every pair of the positive's and the negatives' ends, the floor included."""
    temperature, num_negatives = 0.03, 50
    ends = [-1.0, -0.97, -0.5, 0.0, 0.5, 0.97, 1.0]
    row_D = start_rows(1, DIM, 0, 0, 1)
    for positive in ends:
        for negative in ends:
            features_BD = row_D.clone().requires_grad_()
            positive_B = (features_BD * (positive * row_D)).sum(dim=1) / temperature
            negative_B = log_sum_exp(features_BD, (negative * row_D).expand(num_negatives, -1), temperature=temperature)
            loss_B = contrast(
                positive_B,
                negative_B,
                denominator=denominator,
                num_negatives=num_negatives,
                prior=prior,
                temperature=temperature,
            )
            loss_B.sum().backward()
            assert loss_B.isfinite().all(), (positive, negative)
            assert features_BD.grad is not None
            assert features_BD.grad.isfinite().all(), (positive, negative)


@pytest.mark.parametrize("prior", [0.0, 1e-9, 0.1])
@pytest.mark.parametrize("denominator", ["standard", "decoupled", "debiased"])
def test_with_all_negatives_excluded_nothing_is_learnt_from_them(denominator, prior):
    """The loss is 0 (of the positive against nothing), but for "debiased", which keeps its floor of K exp(-1/τ)."""
    features_BD = start_rows(3, DIM, 0, 0, 3).requires_grad_()
    negatives_KD = start_rows(4, DIM, 1, 0, 4)
    excluded_BK = torch.ones(3, 4, dtype=torch.bool)
    excluded_BK[2, 1] = False
    negative_B = log_sum_exp(features_BD, negatives_KD, temperature=0.03, excluded=ScorePlaces.of_mask(excluded_BK))
    assert negative_B.isneginf().tolist() == [True, True, False]
    positive_B = torch.tensor([5.0, -33.0, 0.0])
    loss_B = contrast(positive_B, negative_B, denominator=denominator, num_negatives=4, prior=prior, temperature=0.03)
    floor_B = torch.log1p(4 * torch.exp(-1 / 0.03 - positive_B.double())) if denominator == "debiased" else [0, 0]
    assert loss_B[:2].tolist() == pytest.approx([float(value) for value in floor_B[:2]], abs=1e-5)
    loss_B.sum().backward()
    assert features_BD.grad is not None
    assert features_BD.grad.isfinite().all()
    assert not features_BD.grad[:2].any()
    assert loss_B.isfinite().all()
