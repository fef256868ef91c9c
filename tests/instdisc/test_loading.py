"""What a run hands out: pictures are prepared for its encoder as its evaluations prepare them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading.loader import eval_batches
from dataloading.sources import open_dataset
from instdisc.config import TrainConfig
from instdisc.loading import RunEncoder

SIZES = [(400, 300), (301, 517), (120, 90), (600, 233), (256, 256), (97, 640), (1, 300)]


@pytest.mark.parametrize(
    ("mode", "ending"), [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("RGB", "jpg")]
)
def test_a_picture_is_prepared_to_the_bit_as_evaluations_prepare_it(tmp_path, mode, ending):
    generator = np.random.default_rng(3)
    for number, (width, height) in enumerate(SIZES):
        small = Image.fromarray(generator.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / f"{number}.{ending}")
    config = TrainConfig()
    encoder = RunEncoder(torch.nn.Identity(), config)
    dataset = open_dataset("folder", str(tmp_path), "train")
    (batch,) = eval_batches(
        dataset,
        range(len(SIZES)),
        resize=config.eval.resize,
        crop=config.eval.crop,
        mean=config.augment.mean,
        std=config.augment.std,
        batch_size=len(SIZES),
        device="cpu",
        num_threads=1,
    )
    for row, image_CSS in zip(batch.indices_B.tolist(), batch.images_BCHW, strict=True):
        with Image.open(tmp_path / dataset.index.names[row]) as image:
            assert torch.equal(encoder.preprocess(image), image_CSS), dataset.index.names[row]
