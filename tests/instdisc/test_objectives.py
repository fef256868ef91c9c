"""Objectives on one process: initial losses against theory, ranges, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives import infonce_loss, nce_loss, softmax_loss
from instdisc.objectives.normalizer import Normalizer

DIM = 128


def random_unit(count, seed):
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_first_nce_loss_is_the_one_of_theory():
    """ln m + 1/(2 D τ²) + 1 = 10.11 for m = 4096 and τ = 0.07, from scores normal with variance 1/(D τ²)."""
    features_BD, negatives_KD, num_rows = random_unit(256, 0), random_unit(4096, 1), 100_000
    normalizer = Normalizer(
        kind="constant", decay=0.99, num_rows=num_rows, temperature=0.07, device=torch.device("cpu")
    )
    normalizer.observe([features_BD @ negatives_KD.T / 0.07], 256 * 4096)
    assert float(normalizer.log_z) - math.log(num_rows) == pytest.approx(1 / (2 * DIM * 0.07**2), rel=0.02)
    loss = nce_loss(
        features_BD,
        random_unit(256, 2),
        negatives_KD,
        temperature=0.07,
        log_z=normalizer.log_z,
        num_rows=num_rows,
    )
    assert loss.item() == pytest.approx(math.log(4096) + 1 / (2 * DIM * 0.07**2) + 1, rel=0.02)
    assert loss.item() == pytest.approx(10.11, rel=0.02)


def test_the_first_softmax_loss_on_cifar_is_the_one_of_theory():
    """ln 50,000 + 1/(2 D τ²) = 11.21 at τ = 0.1."""
    bank = ShardedMemoryBank(50_000, DIM, seed=0)
    loss = softmax_loss(random_unit(256, 3), torch.arange(256), bank, temperature=0.1)
    assert loss.item() == pytest.approx(11.21, rel=0.02)


def test_the_first_infonce_loss_is_the_one_of_theory():
    """ln K + 1/(2 D τ²) = 11.89 for K = 65,536 and τ = 0.07; the positive is random too."""
    loss = infonce_loss(random_unit(512, 0), random_unit(512, 1), random_unit(65_536, 2), temperature=0.07)
    assert loss.item() == pytest.approx(math.log(65_536) + 1 / (2 * DIM * 0.07**2), rel=0.02)


def test_the_softmax_gradient_is_the_one_of_autograd_on_the_full_matrix():
    bank = ShardedMemoryBank(300, DIM, seed=0)
    indices_B = torch.arange(40) * 7
    features_BD = random_unit(40, 5)
    ours_BD, plain_BD = features_BD.clone().requires_grad_(), features_BD.double().requires_grad_()
    (3 * softmax_loss(ours_BD, indices_B, bank, temperature=0.07, score_bytes=4 * 40 * 11)).backward()
    (3 * F.cross_entropy(plain_BD @ bank.rows.double().T / 0.07, indices_B)).backward()
    assert ours_BD.grad is not None
    assert plain_BD.grad is not None
    torch.testing.assert_close(ours_BD.grad.double(), plain_BD.grad, rtol=1e-4, atol=1e-6)


def test_scores_at_the_ends_of_their_range_give_finite_losses_and_gradients():
    row_D = random_unit(1, 0)
    for sign in (1.0, -1.0):
        features_BD = (sign * row_D).clone().requires_grad_()
        bank = ShardedMemoryBank(5, DIM)
        bank.rows[:] = row_D
        losses = [
            softmax_loss(features_BD, torch.tensor([0]), bank, temperature=0.025),
            nce_loss(features_BD, row_D, row_D.expand(9, -1), temperature=0.01, log_z=1.0, num_rows=5),
            infonce_loss(features_BD, row_D, row_D.expand(9, -1), temperature=0.01),
        ]
        torch.stack(losses).sum().backward()
        assert all(loss.isfinite() for loss in losses)
        assert features_BD.grad is not None
        assert features_BD.grad.isfinite().all()


def test_infonce_with_every_negative_excluded_is_zero():
    features_BD = random_unit(3, 0)
    loss = infonce_loss(
        features_BD, features_BD, random_unit(4, 1), temperature=0.1, excluded_BK=torch.ones(3, 4, dtype=torch.bool)
    )
    assert loss.item() == 0


def test_softmax_refuses_a_temperature_that_float32_cannot_carry():
    with pytest.raises(ValueError, match=r"temperature: found 0\.01, expected at least 0\.025"):
        softmax_loss(random_unit(1, 0), torch.tensor([0]), ShardedMemoryBank(2, DIM), temperature=0.01)


def test_the_running_z_follows_while_the_constant_one_stays_and_both_survive_a_restart():
    def make(kind):
        return Normalizer(kind=kind, decay=0.5, num_rows=10, temperature=1.0, device=torch.device("cpu"))

    constant, running = make("constant"), make("ema")
    for normalizer in (constant, running):
        normalizer.observe([torch.zeros(2, 3)], 6)
        normalizer.observe([torch.ones(1, 4), torch.ones(1, 2)], 6)
    assert constant.log_z.item() == pytest.approx(math.log(10))
    assert running.log_z.item() == pytest.approx(math.log(10 * (0.5 + 0.5 * math.e)))
    assert constant.running_log_z.item() == running.log_z.item()
    again = make("ema")
    again.load_state_dict(running.state_dict())
    assert again.log_z.item() == running.log_z.item()
    assert again.state_dict() == running.state_dict()


@pytest.mark.parametrize("kind", ["constant", "ema"])
def test_a_batch_of_damaged_images_alone_leaves_z_as_it_was(kind):
    normalizer = Normalizer(kind=kind, decay=0.5, num_rows=10, temperature=0.01, device=torch.device("cpu"))
    normalizer.observe([torch.empty(0, 3)], 0)
    assert not normalizer.started
    normalizer.observe([torch.full((2, 3), -60.0), torch.empty(0, 3)], 6)
    assert normalizer.log_z.item() == pytest.approx(math.log(10) - 60)
    normalizer.observe([torch.empty(0, 3)], 0)
    assert normalizer.log_z.item() == pytest.approx(math.log(10) - 60)
    assert normalizer.running_log_z.isfinite()


def test_a_normaliser_that_takes_over_an_older_state_keeps_nothing_of_its_own():
    make = lambda: Normalizer(kind="ema", decay=0.5, num_rows=10, temperature=1.0, device=torch.device("cpu"))  # noqa: E731
    fresh, used = make(), make()
    used.observe([torch.ones(1, 4)], 4)
    used.load_state_dict(fresh.state_dict())
    assert (used.log_z.item(), used.running_log_z.item()) == (fresh.log_z.item(), fresh.running_log_z.item())
