"""Features of a data set: each rank embeds its share of the rows with the encoder in eval mode.

Shapes: R rows of this rank's share, D feature numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cluster.worker import threads_for
from dataloading.damaged import BadRow, DamagedRows, NoGoodImage
from dataloading.device_copies import to_device
from dataloading.index import Dataset
from dataloading.loader import Batch, eval_batches
from instdisc.config import TrainConfig

if TYPE_CHECKING:
    from instdisc.loading import RunEncoder


_NUM_SHOWN = 3


@dataclass(frozen=True)
class Embedded:
    """Features of some rows of a data set."""

    features_RD: Tensor
    """Of unit length, float32; zeros for a row that has none."""
    damaged: tuple[BadRow, ...]
    """The rows that have none, rising, with the reasons."""


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
    is_asked_to_end: Callable[[], bool] = lambda: False,
) -> Embedded:
    """Return the unit features of `rows` through central crops, (R, D) on `device`.

    Images that cannot be decoded have none, nor has one for which the encoder finds a feature that is not finite. The
    encoder's mode is left as it was.
    """
    damaged = DamagedRows(dataset.index)
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
        damaged=damaged,
        is_asked_to_end=is_asked_to_end,
    )
    features_RD = torch.zeros((len(rows), config.model.feature_dim), device=device)
    is_valid_R, is_finite_R = (torch.zeros(len(rows), dtype=torch.bool, device=device) for _ in range(2))
    done = 0
    with eval_mode(encoder):
        for batch in _while_any_is_good(batches):
            part = slice(done, done + len(batch.indices_B))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                features_BD = encoder(batch.images_BCHW)
            if done == 0:
                features_RD = features_RD.new_zeros((len(rows), features_BD.shape[1]))
            is_valid_R[part] = to_device(batch.valid_B, device)
            is_finite_R[part] = features_BD.isfinite().all(dim=1)
            is_good_B1 = (is_valid_R[part] & is_finite_R[part])[:, None]
            features_RD[part] = torch.where(is_good_B1, features_BD, 0.0)
            done = part.stop
            if on_progress:
                on_progress(done, len(rows))
    lost = {rows[place]: "" for place in (~is_valid_R).nonzero()[:, 0].tolist()}
    lost |= {rows[p]: "its feature is not finite" for p in (is_valid_R & ~is_finite_R).nonzero()[:, 0].tolist()}
    return Embedded(features_RD, tuple(_bad_rows(dataset, damaged, lost)))


def _while_any_is_good(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; none of a data set of which no image can be decoded."""
    with contextlib.suppress(NoGoodImage):
        yield from batches


def _bad_rows(dataset: Dataset, damaged: DamagedRows, lost: dict[int, str]) -> Iterator[BadRow]:
    """Yield what is known of rows that have no feature. lost: the reason for each, where none is known before."""
    reasons = {bad.row: bad.reason for bad in damaged.found()} | dataset.index.reasons
    for row in sorted(lost):
        yield BadRow(row, dataset.index.names[row], reasons.get(row) or lost[row])


def left_out_text(damaged: Sequence[BadRow], num_rows: int, what: str, outcome: str = "are left out") -> str:
    """Return how many images have no feature, what follows, and which they are. what: as in "test images"."""
    shown = "; ".join(f"{bad.name}: {bad.reason}" for bad in damaged[:_NUM_SHOWN])
    more = f"; and {len(damaged) - _NUM_SHOWN:,} more" if len(damaged) > _NUM_SHOWN else ""
    return f"{len(damaged):,} of {num_rows:,} {what} cannot be used and {outcome} ({shown}{more})"


@contextlib.contextmanager
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
) -> Embedded:
    """Return the features of all rows, made in this process, on the encoder's device."""

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
