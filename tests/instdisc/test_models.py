"""Encoders: shapes, unit length, seeds; BatchNorm over groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instdisc.config_sections import ModelConfig
from instdisc.models import build_encoder
from instdisc.train.batch_norm import GroupedBatchNorm


@pytest.mark.parametrize(
    ("architecture", "stem", "side"),
    [
        ("resnet18", "cifar", 32),
        ("resnet18", "imagenet", 64),
        ("resnet50", "imagenet", 64),
        ("alexnet", "imagenet", 64),
        ("resnet-small", "cifar", 32),
        ("convnet-small", "cifar", 32),
    ],
)
def test_an_encoder_gives_unit_features_of_the_length_asked_for(architecture, stem, side):
    encoder = build_encoder(ModelConfig(architecture=architecture, stem=stem, feature_dim=24), seed=1).eval()
    with torch.no_grad():
        features_BD = encoder(torch.rand(2, 3, side, side))
    assert features_BD.shape == (2, 24)
    torch.testing.assert_close(features_BD.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("architecture", ["alexnet", "vgg16", "resnet50", "resnet-small", "convnet-small"])
def test_the_smallest_images_that_the_configuration_allows_are_the_smallest_that_the_net_takes(architecture):
    config = ModelConfig(architecture=architecture)
    with torch.device("meta"):  # shapes alone
        encoder = build_encoder(config).eval()
        assert encoder(torch.rand(1, 3, config.min_side, config.min_side)).shape == (1, 128)
        if config.min_side > 1:
            with pytest.raises(RuntimeError):
                encoder(torch.rand(1, 3, config.min_side - 1, config.min_side - 1))


def test_the_cifar_stem_keeps_the_resolution():
    trunk = build_encoder(ModelConfig(architecture="resnet18", stem="cifar")).trunk
    assert trunk.conv1(torch.zeros(1, 3, 32, 32)).shape[-1] == 32  # pyright: ignore[reportCallIssue]
    assert isinstance(trunk.maxpool, nn.Identity)


def test_weights_come_from_the_seed_alone_and_leave_the_callers_random_state():
    config = ModelConfig(architecture="resnet-small", width=4, blocks=(1, 1))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (build_encoder(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_running_statistics_move_by_the_average_over_the_groups():
    norm = nn.BatchNorm2d(3)
    encoder = nn.Sequential(norm)
    grouped = GroupedBatchNorm(encoder)
    groups = [torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(size)) for size in (5, 5, 2)]
    expected_mean, expected_var = torch.zeros(3), torch.ones(3)
    for _ in range(3):
        for images in groups:
            encoder(images)
            grouped.add_group()
        grouped.start_exchange()
        grouped.finish_step(len(groups))
        means = torch.stack([g.mean(dim=(0, 2, 3)) for g in groups]).mean(dim=0)
        variances = torch.stack([g.var(dim=(0, 2, 3), unbiased=True) for g in groups]).mean(dim=0)
        expected_mean = 0.9 * expected_mean + 0.1 * means
        expected_var = 0.9 * expected_var + 0.1 * variances
    grouped.put_back(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, expected_mean)
    torch.testing.assert_close(norm.running_var, expected_var)
    assert int(norm.num_batches_tracked or 0) == 3


def test_a_pass_that_is_discarded_leaves_the_running_statistics():
    norm = nn.BatchNorm1d(2)
    encoder = nn.Sequential(norm)
    grouped = GroupedBatchNorm(encoder)
    encoder(torch.randn(6, 2) + 3)
    grouped.add_group()
    grouped.discard()
    grouped.put_back(0)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0]
