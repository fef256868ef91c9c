"""Gradients of samples whose positive is nearly all of the softmax, against float64; and gradients that are refused.

Shapes: B samples, K negatives, N rows, D feature numbers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from instdisc.config_method import DENOMINATORS, ObjectiveConfig
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.negatives import negative_indices_of_each
from instdisc.objectives import gradients, infonce_loss, nce_loss, own_rows, owners, softmax_loss
from instdisc.objectives.infonce import log_sum_exp
from instdisc.objectives.nce import noise_terms
from instdisc.objectives.normalizer import Normalizer
from instdisc.rows_ahead import FetchedRows
from instdisc.train.scoring import Group, Scorer

N, B, K, D = 3000, 16, 512, 128
ROWS_B = torch.arange(B) * 7
GENERATOR = np.random.default_rng(0)
SHARED_K = torch.from_numpy(np.concatenate([ROWS_B.numpy()[:3], GENERATOR.integers(0, N, K - 3)]))
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def bank():
    return ShardedMemoryBank(N, D, seed=1)


def features(bank, cosine):
    """Unit features that have a cosine with their own rows."""
    rows_BD = F.normalize(bank.rows[ROWS_B].double(), dim=1)
    other_BD = torch.from_numpy(np.random.default_rng(2).standard_normal((B, D)))
    other_BD = F.normalize(other_BD - (other_BD * rows_BD).sum(1, keepdim=True) * rows_BD, dim=1)
    return (cosine * rows_BD + math.sqrt(1 - cosine**2) * other_BD).float()


def scored(config, bank, features_BD):
    """The losses of a training step of one process."""
    normalizer = Normalizer(
        kind="constant", decay=0.9, num_rows=N, temperature=config.temperature, device=torch.device("cpu")
    )
    rows = FetchedRows(bank.rows[ROWS_B], bank.rows[SHARED_K], ROWS_B, SHARED_K)
    return Scorer(config, bank, normalizer, seed=5).losses(Group(features_BD, slice(0, B), [(0, B)]), rows, step=0)[0]


def expected(config, bank, features_BD):
    """The same in float64, from all scores, with the own row taken out wherever the paper's formula has it apart."""
    rows_ND, tau = bank.rows.double(), config.temperature
    scores_BN = features_BD @ rows_ND.T / tau
    positive_B = scores_BN[torch.arange(B), ROWS_B]
    is_own_BN = torch.arange(N) == ROWS_B[:, None]
    drawn_BK = SHARED_K.expand(B, K)
    if config.per_sample:
        drawn_BK = negative_indices_of_each(5, 0, B, config.num_negatives, N)
    if config.name == "softmax":
        negative_B = scores_BN.masked_fill(is_own_BN, -math.inf).logsumexp(1)
        return F.softplus(negative_B - positive_B, threshold=800)
    if config.name == "nce":
        offset = math.log(config.num_negatives)  # Z = N, as before any estimate
        noise_BK = F.softplus(scores_BN.gather(1, drawn_BK) - offset, threshold=800)
        return F.softplus(offset - positive_B, threshold=800) + noise_BK.sum(1)
    negatives_BK = scores_BN.gather(1, drawn_BK).masked_fill(drawn_BK == ROWS_B[:, None], -math.inf)
    if config.hard_negatives:
        hardest_BH = scores_BN.masked_fill(is_own_BN, -math.inf).topk(config.hard_negatives, dim=1).values
        negatives_BK = torch.cat([negatives_BK, hardest_BH], dim=1)
    negative_B = negatives_BK.logsumexp(1)
    if config.denominator == "decoupled":
        return negative_B - positive_B
    if config.denominator == "debiased":
        mean_B = negatives_BK.exp().sum(1) / negatives_BK.shape[1]
        g_B = (mean_B - config.debias_prior * positive_B.exp()) / (1 - config.debias_prior)
        negative_B = (g_B.clamp(min=math.exp(-1 / tau)) * negatives_BK.shape[1]).log()
    return F.softplus(negative_B - positive_B, threshold=800)


OBJECTIVES = {
    "softmax": {"name": "softmax"},
    "nce": {"name": "nce"},
    "nce, per sample": {"name": "nce", "per_sample": True},
    **{f"infonce, {denominator}": {"name": "infonce", "denominator": denominator} for denominator in DENOMINATORS},
    **{
        f"infonce, per sample, hard, {denominator}": {
            "name": "infonce",
            "denominator": denominator,
            "per_sample": True,
            "hard_negatives": 20,
        }
        for denominator in DENOMINATORS
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [0.03, 0.05, 0.07, 0.2])
@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.99])
def test_gradients_keep_their_digits_however_well_a_sample_is_solved(bank, cosine, temperature, objective):
    """As a whole, and along the sphere: the part that the encoder sees through the normalisation of its features."""
    config = ObjectiveConfig(temperature=temperature, num_negatives=K, **OBJECTIVES[objective])
    features_BD = features(bank, cosine)
    found_BD, true_BD = features_BD.clone().requires_grad_(), features_BD.double().requires_grad_()
    losses_B, true_B = scored(config, bank, found_BD), expected(config, bank, true_BD)
    losses_B.sum().backward()
    true_B.sum().backward()
    assert found_BD.grad is not None
    assert true_BD.grad is not None
    if config.denominator != "decoupled":  # that one passes through 0
        np.testing.assert_allclose(losses_B.detach(), true_B.detach(), rtol=TOLERANCE)
    error_BD = found_BD.grad.double() - true_BD.grad
    assert float((error_BD.norm(dim=1) / true_BD.grad.norm(dim=1)).max()) < TOLERANCE
    units_BD = true_BD.detach()
    along = [g - (g * units_BD).sum(1, keepdim=True) * units_BD for g in (error_BD, true_BD.grad)]
    assert float((along[0].norm(dim=1) / along[1].norm(dim=1)).max()) < TOLERANCE


def test_own_rows_are_found_wherever_they_stand_more_than_once():
    indices_B, indices_K = (
        torch.from_numpy(GENERATOR.integers(0, 9, 30)),
        torch.from_numpy(GENERATOR.integers(0, 12, 70)),
    )
    mask_BK = indices_B[:, None] == indices_K
    found, listed = own_rows.own_places(indices_B, indices_K), own_rows.ScorePlaces.of_mask(mask_BK)
    pairs = [set(zip(places.samples_P.tolist(), places.columns_P.tolist(), strict=True)) for places in (found, listed)]
    assert pairs[0] == pairs[1]
    assert len(found.samples_P) == len(pairs[0]) == int(mask_BK.sum())
    for blocks in ([slice(0, 30)], [slice(0, 7), slice(7, 14), slice(14, 30)]):
        marked_BK = torch.zeros(30, 70, dtype=torch.bool)
        for block, places in zip(blocks, found.in_rows(blocks, 70, torch.device("cpu")), strict=True):
            marked_BK[block].view(-1)[places] = True
        assert torch.equal(marked_BK, mask_BK)
    blocks = [slice(0, 32), slice(32, 64), slice(64, 70)]
    parts = [torch.zeros(30, block.stop - block.start, dtype=torch.bool) for block in blocks]
    for part, places in zip(parts, found.in_columns(blocks, torch.device("cpu")), strict=True):
        part.view(-1)[places] = True
    assert torch.equal(torch.cat(parts, dim=1), mask_BK)


def test_a_sample_that_is_the_only_row_has_no_loss_and_no_gradient():
    bank = ShardedMemoryBank(1, D, seed=0)
    features_BD = bank.rows.clone().requires_grad_()
    loss = softmax_loss(features_BD, torch.tensor([0]), bank, temperature=0.07)
    loss.backward()
    assert loss.item() == 0
    assert features_BD.grad is not None
    assert not features_BD.grad.any()


def differentiable(bank):
    """Every custom function, of features alone."""
    rows_BD, negatives_KD = bank.rows[ROWS_B], bank.rows[SHARED_K]
    pairs = owners.owned_pairs(SHARED_K.expand(B, K).numpy(), bank)
    of_owners = {"temperature": 0.1, "counts_W": [B]}
    return {
        "softmax": lambda f: softmax_loss(f, ROWS_B, bank, temperature=0.1),
        "nce": lambda f: nce_loss(f, rows_BD, negatives_KD, temperature=0.1, log_z=8.0, num_rows=N),
        "infonce": lambda f: infonce_loss(f, rows_BD, negatives_KD, temperature=0.1),
        "owners, noise": lambda f: owners.nce_noise_of_owned(f, pairs, bank, offset=5.0, **of_owners)[0].sum(),
        "owners, sums": lambda f: owners.log_sum_exp_of_owned(f, pairs, bank, **of_owners).sum(),
    }


@pytest.mark.parametrize("name", ["softmax", "nce", "infonce", "owners, noise", "owners, sums"])
def test_a_second_derivative_is_refused_and_never_wrong(bank, name):
    features_BD = features(bank, 0.5).requires_grad_()
    (gradient_BD,) = torch.autograd.grad(differentiable(bank)[name](features_BD), features_BD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient_BD.square().sum().backward()


def test_every_custom_function_of_the_project_is_among_those_of_the_test_above():
    ours = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith(("instdisc.", "cluster."))]
    names = {f.__name__ for f in ours if not f.__name__.endswith("Backward")}
    assert names == {"_ExactSoftmax", "_NoiseTerms", "_LogSumExp", "_SumsOfOwners"}


def wants_gradient(tensor):
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("positives", lambda f, p, n: infonce_loss(f, wants_gradient(p), n, temperature=0.1)),
        ("negatives", lambda f, p, n: infonce_loss(f, p, wants_gradient(n), temperature=0.1)),
        ("temperature", lambda f, p, n: infonce_loss(f, p, n, temperature=wants_gradient(torch.tensor(0.1)))),
        ("positives", lambda f, p, n: nce_loss(f, wants_gradient(p), n, temperature=0.1, log_z=8.0, num_rows=N)),
        ("negatives", lambda f, p, n: nce_loss(f, p, wants_gradient(n), temperature=0.1, log_z=8.0, num_rows=N)),
        ("offset", lambda f, p, n: nce_loss(f, p, n, temperature=0.1, log_z=wants_gradient(p[0, 0]), num_rows=N)),
        ("negatives", lambda f, p, n: log_sum_exp(f, wants_gradient(n), temperature=0.1)),
        ("negatives", lambda f, p, n: noise_terms(f, wants_gradient(n), temperature=0.1, offset=5.0)),
    ],
)
def test_what_would_get_no_gradient_or_half_of_one_is_refused(bank, name, ask):
    with pytest.raises(ValueError, match=f"{name}: found a tensor that requires gradients, expected one without"):
        ask(features(bank, 0.5), bank.rows[ROWS_B], bank.rows[SHARED_K])


def test_a_bank_whose_rows_require_gradients_is_refused():
    bank = ShardedMemoryBank(N, D, seed=1)
    bank.rows.requires_grad_()
    pairs = owners.owned_pairs(SHARED_K.expand(B, K).numpy(), bank)
    features_BD = features(bank, 0.5).detach()
    with pytest.raises(ValueError, match="found a tensor that requires gradients"):
        softmax_loss(features_BD, ROWS_B, bank, temperature=0.1)
    with pytest.raises(ValueError, match="rows: found a tensor that requires gradients"):
        owners.log_sum_exp_of_owned(features_BD, pairs, bank, temperature=0.1, counts_W=[B])
    with pytest.raises(ValueError, match="rows: found a tensor that requires gradients"):
        owners.nce_noise_of_owned(features_BD, pairs, bank, temperature=0.1, offset=5.0, counts_W=[B])


def test_numbers_and_detached_tensors_are_not_refused():
    gradients.require_fixed(rows=torch.zeros(2), temperature=0.1, offset=torch.tensor(3.0))
