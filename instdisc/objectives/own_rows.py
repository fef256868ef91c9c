"""Scores of samples with their own rows: the positives, which must not count among the negatives.

They are few among millions of scores, so their places are found on the host from the row numbers, and what travels to
a GPU is those places and not a mask of all scores.

Shapes: B samples, K rows that they are scored with, P scores that are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloading.device_copies import to_device


@dataclass(frozen=True)
class ScorePlaces:
    """Places in a (B, K) matrix of scores, int64 NumPy arrays."""

    samples_P: np.ndarray
    columns_P: np.ndarray

    @classmethod
    def of_mask(cls, mask_BK: Tensor) -> ScorePlaces:
        """Return the places where a mask is True. Waits for the device that it lies on."""
        samples_P, columns_P = mask_BK.cpu().numpy().nonzero()
        return cls(samples_P, columns_P)

    def in_rows(self, blocks: Sequence[slice], num_columns: int, device: torch.device) -> list[Tensor]:
        """Return for each block of samples the places in its scores, (b, K) seen as one line, int64 on `device`."""
        order = np.argsort(self.samples_P, kind="stable")
        samples_P, columns_P = self.samples_P[order], self.columns_P[order]
        cuts = [np.searchsorted(samples_P, (block.start, block.stop)) for block in blocks]
        flat = [
            (samples_P[low:high] - block.start) * num_columns + columns_P[low:high]
            for block, (low, high) in zip(blocks, cuts, strict=True)
        ]
        return _sent(flat, device)

    def in_columns(self, blocks: Sequence[slice], device: torch.device) -> list[Tensor]:
        """Return for each block of columns the places in its scores, (B, c) seen as one line, int64 on `device`."""
        order = np.argsort(self.columns_P, kind="stable")
        samples_P, columns_P = self.samples_P[order], self.columns_P[order]
        cuts = [np.searchsorted(columns_P, (block.start, block.stop)) for block in blocks]
        flat = [
            samples_P[low:high] * (block.stop - block.start) + columns_P[low:high] - block.start
            for block, (low, high) in zip(blocks, cuts, strict=True)
        ]
        return _sent(flat, device)


def own_places(indices_B: Tensor, indices_K: Tensor) -> ScorePlaces:
    """Return where a sample meets its own row, also where a row number stands twice on either side. Both on the CPU."""
    samples = indices_B.numpy()
    order_B = np.argsort(samples, kind="stable")
    sorted_B, wanted_K = samples[order_B], indices_K.numpy()
    first_K = np.searchsorted(sorted_B, wanted_K)
    hits = np.flatnonzero(np.append(sorted_B, -1)[first_K] == wanted_K)
    counts = np.searchsorted(sorted_B, wanted_K[hits], side="right") - first_K[hits]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return ScorePlaces(order_B[np.repeat(first_K[hits], counts) + within], np.repeat(hits, counts))


def owned_places(indices_G: Tensor, start: int, stop: int) -> ScorePlaces:
    """Return where a sample meets its own row among the rows [start, stop). indices_G: int64, on the CPU."""
    samples_P = np.flatnonzero(((indices_G >= start) & (indices_G < stop)).numpy())
    return ScorePlaces(samples_P, indices_G.numpy()[samples_P] - start)


def _sent(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors on a device, which they reach in one copy."""
    together = to_device(torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])), device)
    return list(together.split([len(part) for part in parts]))
