"""Encoders: an image to a unit vector of D numbers.

The trunks are torchvision's; the last layer maps their features to D numbers (arXiv 1805.01978, section 3.1), which
are scaled to unit length in float32.

Shapes: B images, C channels, H height, W width, D feature numbers.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dataloading.philox import Purpose, words
from instdisc.config_sections import ModelConfig


class Encoder(nn.Module):
    """A trunk followed by scaling to unit length: normalised float images (B, C, H, W) to float32 (B, D)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return F.normalize(self.trunk(images_BCHW).float(), dim=1)


class SmallResNet(nn.Module):
    """A basic-block ResNet with a 3x3 stem for small images on CPUs; channels double from stage to stage."""

    def __init__(self, width: int, blocks: tuple[int, ...], feature_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
        for stage, num_blocks in enumerate(blocks):
            for block in range(num_blocks):
                out, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                layers.append(BasicBlock(channels, out, stride, shortcut))
                channels = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, feature_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(self.features(images_BCHW).mean(dim=(2, 3)))


class SmallConvNet(nn.Module):
    """Four convolutions with BatchNorm: what learns most in a minute of a CPU from images of 32 pixels.

    A 5x5 convolution of stride 2, then three of 3x3 with pooling between them, whose channels double.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()

        def stage(channels: int, out: int, side: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels, out, side, stride, padding=side // 2, bias=False)
            return [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

        self.features = nn.Sequential(
            *stage(3, width, 5, 2),
            *stage(width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            *stage(2 * width, 4 * width, 3, 1),
            nn.MaxPool2d(2),
            *stage(4 * width, 8 * width, 3, 1),
        )
        self.fc = nn.Linear(8 * width, feature_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(self.features(images_BCHW).mean(dim=(2, 3)))


def build_encoder(config: ModelConfig, seed: int = 0) -> Encoder:
    """Return the encoder with weights drawn from `seed` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the caller's GPUs as well, which are not forked.
        torch.default_generator.manual_seed(int(words(seed, 0, purpose=Purpose.WEIGHTS, num=1)[0] >> 1))
        trunk = _trunk(config)
        if config.head != "linear":
            norm = nn.BatchNorm1d(config.feature_dim, affine=False)
            trunk = nn.Sequential(OrderedDict(trunk=trunk, norm=norm))
        return Encoder(trunk)


def _trunk(config: ModelConfig) -> nn.Module:
    if config.architecture == "resnet-small":
        return SmallResNet(config.width, config.blocks, config.feature_dim)
    if config.architecture == "convnet-small":
        return SmallConvNet(config.width, config.feature_dim)
    # torchvision's own last layer has as many outputs as there are "classes": here the feature's numbers.
    build = getattr(torchvision.models, config.architecture)
    trunk = build(weights=None, num_classes=config.feature_dim)
    if config.stem == "cifar" and config.architecture.startswith("resnet"):
        trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    return trunk
