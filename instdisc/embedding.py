"""Features of a data set: each rank embeds its share of the rows with the encoder in eval mode.

Shapes: R rows of this rank's share, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cluster.worker import threads_for
from dataloading.index import Dataset
from dataloading.loader import eval_batches
from instdisc.config import TrainConfig

if TYPE_CHECKING:
    from instdisc.loading import RunEncoder


@torch.no_grad()
def embed_rows(
    encoder: nn.Module,
    dataset: Dataset,
    rows: range,
    config: TrainConfig,
    *,
    device: torch.device,
    num_threads: int,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the unit features of `rows` through central crops, float32 (R, D) on `device`.

    Rows whose image is damaged get zeros, which are near to nothing. The encoder's mode is left as it was.
    """
    batches = eval_batches(
        dataset,
        rows,
        resize=config.eval.resize,
        crop=config.eval.crop,
        mean=config.augment.mean,
        std=config.augment.std,
        batch_size=config.eval.batch,
        device=device,
        num_threads=num_threads,
        backend=config.data.backend,
    )
    features: list[Tensor] = []
    with eval_mode(encoder):
        for batch in batches:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                features_BD = encoder(batch.images_BCHW)
            features.append(features_BD * batch.valid_B.to(device)[:, None])
            if on_progress:
                on_progress(min(len(rows), len(features) * config.eval.batch), len(rows))
    return torch.cat(features) if features else torch.zeros((0, config.model.feature_dim), device=device)


@contextmanager
def eval_mode(encoder: nn.Module) -> Iterator[None]:
    """Put the encoder into eval mode for a while."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def share(num_rows: int, rank: int, world_size: int) -> range:
    """Return the rows that a rank embeds: the same contiguous division as the bank's."""
    return range(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def embed_here(
    encoder: RunEncoder, dataset: Dataset, on_event: Callable[[dict[str, Any]], None] | None = None
) -> Tensor:
    """Return the features of all rows in this process, float32 (N, D), on the encoder's device."""

    def progress(done: int, total: int) -> None:
        if on_event:
            on_event({"kind": "phase", "text": f"embedding {done:,} of {total:,} images"})

    return embed_rows(
        encoder,
        dataset,
        range(dataset.index.num_rows),
        encoder.config,
        device=next(encoder.parameters()).device,
        num_threads=threads_for(1),
        on_progress=progress,
    )
