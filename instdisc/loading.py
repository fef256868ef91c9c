"""What a run learned, for use elsewhere: its encoder and its bank, read from its newest checkpoint.

Shapes: N rows, B images, D feature numbers, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from cluster.checkpoint import Checkpoint, read_latest
from dataloading.augment import eval_windows
from dataloading.color import normalize
from dataloading.headers import decode
from dataloading.resize import resize_into
from instdisc.config import TrainConfig
from instdisc.evaluate.knn import nearest
from instdisc.memory_bank import NEVER
from instdisc.models import build_encoder
from instdisc.runs import RunError, existing_run


class RunEncoder(nn.Module):
    """A run's encoder in eval mode: normalised float images (B, C, H, W) to unit features, float32 (B, D)."""

    def __init__(self, encoder: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.encoder(images_BCHW)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the central crop of a picture, normalised as the encoder expects it, float32 (3, crop, crop).

        The numbers are those that evaluations of encoded images get.
        """
        config = self.config
        pixels_HWC = torch.from_numpy(decode(image, config.data.pixel_rules).copy())
        (anchor,), (size,) = eval_windows(
            [len(pixels_HWC)], [pixels_HWC.shape[1]], resize=config.eval.resize, crop=config.eval.crop
        )
        (top, left), (height, width) = anchor.tolist(), size.tolist()
        crop_CSS = torch.empty((3, config.eval.crop, config.eval.crop), dtype=torch.uint8)
        resize_into(pixels_HWC[top : top + height, left : left + width], crop_CSS)
        images_BCSS = torch.empty((1, *crop_CSS.shape))
        return normalize(crop_CSS[None], config.augment.mean, config.augment.std, images_BCSS)[0]


@dataclass(frozen=True)
class Bank:
    """A run's memory bank: `rows_ND` float32 of unit length, `last_step_N` int32 (-1: never written)."""

    rows_ND: Tensor
    last_step_N: Tensor

    @property
    def rows(self) -> Tensor:
        """The rows, as a memory bank that is trained calls them."""
        return self.rows_ND

    @property
    def last_step(self) -> Tensor:
        """The steps, as a memory bank that is trained calls them."""
        return self.last_step_N

    def on(self, device: torch.device) -> Bank:
        """Return the bank on a device."""
        return Bank(self.rows_ND.to(device), self.last_step_N.to(device))

    @torch.no_grad()
    def nearest(self, features_BD: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Return cosines, float32 (B, k), and dataset rows, int64 (B, k), of the nearest rows, the nearest first.

        Rows that were never written, as those of damaged images, are not among them. features_BD: as the run's encoder
        makes them; zeros have no neighbours, cosines -inf and rows -1. Raises ValueError where shapes or k do not fit.
        """
        dim, is_written_N = self.rows_ND.shape[1], self.last_step_N != NEVER
        num_rows = int(is_written_N.sum())
        if features_BD.dim() != 2 or features_BD.shape[1] != dim:
            raise ValueError(f"features: found shape {tuple(features_BD.shape)}, expected (B, {dim})")
        if not 1 <= k <= num_rows:
            raise ValueError(f"k: found {k}, expected 1 to {num_rows}, the number of rows that were written")
        return nearest(features_BD, self.rows_ND, k, usable_N=is_written_N)


def load_encoder(run: str, device: str = "cpu") -> RunEncoder:
    """Return the encoder of the run at URI `run`, in eval mode on `device` ("auto": a GPU where there is one).

    Raises RunError where there is none yet.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config, checkpoint = _newest(run)
    encoder = build_encoder(config.model)
    tensors = checkpoint.tensors()
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"run {run}: its configuration describes another network than its checkpoint of step {checkpoint.step} "
            f"holds ({str(error).splitlines()[-1].strip()[:200]}); put its config.json back from a copy"
        ) from error
    return RunEncoder(encoder, config).to(device).eval()


def load_bank(run: str) -> Bank:
    """Return the memory bank of the run at URI `run`. Raises RunError where there is none yet."""
    _, checkpoint = _newest(run)
    return Bank(checkpoint.rows("bank").float(), checkpoint.rows("bank_last_step"))


def _newest(uri: str) -> tuple[TrainConfig, Checkpoint]:
    run = existing_run(uri)
    config, checkpoint = run.config(), read_latest(run.checkpoints())
    if config is None or checkpoint is None:
        raise RunError(f"run {uri} has no checkpoint: wait for its first, or put its folder checkpoints back")
    return config, checkpoint
