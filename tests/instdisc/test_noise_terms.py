"""NCE's terms of shared negatives against float64 over the whole range of scores and of Z, in blocks of any size.

Shapes: B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import npid_reference as reference
import numpy as np
import pytest
import torch

from instdisc.bank_storage import start_rows
from instdisc.objectives import blocks
from instdisc.objectives.infonce import log_sum_exp
from instdisc.objectives.nce import noise_terms
from instdisc.objectives.own_rows import ScorePlaces

B, K, D = 11, 30, 8


def rows_and_features(pull: float):
    """Negatives, and features drawn towards them (pull > 0) or away, float64 with the digits of float32."""
    negatives_KD = reference.unit(start_rows(K, D, 1, 0, K).numpy() + 3)
    features_BD = reference.unit(start_rows(B, D, 2, 0, B).numpy() + pull)
    return negatives_KD.astype(np.float32).astype(np.float64), features_BD.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("cached_scores", [1, 4 * K, 2**20])
@pytest.mark.parametrize("pull", [-30.0, 0.0, 30.0])
@pytest.mark.parametrize("temperature", [0.01, 0.025, 0.07, 1.0])
def test_terms_gradients_and_sums_equal_float64_for_any_score_and_z(monkeypatch, cached_scores, pull, temperature):
    """Z at both ends: as if all scores were 1/τ, or -1/τ. The loss of a score is held to 80, its gradient is not."""
    monkeypatch.setattr(blocks, "CACHED_SCORES", cached_scores)
    negatives_KD, features_BD = rows_and_features(pull)
    scores_BK = features_BD @ negatives_KD.T / temperature
    log_sums_B = np.log(np.exp(scores_BK - scores_BK.max(1, keepdims=True)).sum(1)) + scores_BK.max(1)
    for offset in (np.log(K) + 1 / temperature, np.log(K) - 1 / temperature):
        leaf_BD = torch.from_numpy(features_BD).float().requires_grad_()
        loss_B, found_B = noise_terms(
            leaf_BD,
            torch.from_numpy(negatives_KD).float(),
            temperature=temperature,
            offset=torch.tensor(offset).float(),
        )
        loss_B.sum().backward()
        x_BK = np.minimum(scores_BK - offset, 80) if temperature < 0.025 else scores_BK - offset
        # The scores' own rounding in float32 is 1/τ times that of 1.
        rounding = 4e-7 / temperature + 1e-6
        np.testing.assert_allclose(loss_B.detach(), np.logaddexp(0, x_BK).sum(1), rtol=2 * rounding, atol=1e-30)
        np.testing.assert_allclose(found_B, log_sums_B, rtol=0, atol=2 * rounding)
        gradient_BD = 1 / (1 + np.exp(-x_BK)) @ negatives_KD / temperature
        assert leaf_BD.grad is not None
        np.testing.assert_allclose(leaf_BD.grad, gradient_BD, rtol=4 * rounding, atol=1e-30 / temperature)


@pytest.mark.parametrize("cached_scores", [1, 4 * K, 2**20])
@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_the_sum_of_infonce_equals_float64_in_blocks_of_any_size(monkeypatch, cached_scores, temperature):
    monkeypatch.setattr(blocks, "CACHED_SCORES", cached_scores)
    negatives_KD, features_BD = rows_and_features(0.0)
    excluded_BK = np.random.default_rng(0).random((B, K)) < 0.3
    excluded_BK[4] = True
    leaf_BD = torch.from_numpy(features_BD).float().requires_grad_()
    found_B = log_sum_exp(
        leaf_BD,
        torch.from_numpy(negatives_KD).float(),
        temperature=temperature,
        excluded=ScorePlaces.of_mask(torch.from_numpy(excluded_BK)),
    )
    found_B.sum().backward()
    every_BK = np.tile(np.arange(K), (B, 1))
    values_B, gradient_BD = reference.log_sum_exp_of_each(
        features_BD, every_BK, ~excluded_BK, negatives_KD, temperature
    )
    rounding = 4e-7 / temperature + 1e-6
    np.testing.assert_allclose(found_B.detach(), values_B, rtol=0, atol=rounding)
    assert leaf_BD.grad is not None
    np.testing.assert_allclose(leaf_BD.grad, gradient_BD, rtol=1e-3, atol=4 * rounding / temperature)
