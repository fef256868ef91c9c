"""Which rows are the negatives of a step: the same on every rank, from (seed, step) alone.

Shapes: G samples of all ranks, K negatives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataloading.philox import Purpose

MAX_ROWS = 2**32


def negative_indices(seed: int, step: int, num_negatives: int, num_rows: int) -> Tensor:
    """Return the rows of the negatives of global step `step`, int64 (K,) on the CPU.

    Uniform over 0..num_rows-1 with replacement, as the noise of NCE is defined (arXiv 1805.01978, section 3.2);
    num_negatives may exceed num_rows.
    """
    return _drawn(seed, Purpose.NEGATIVES, step, num_negatives, num_rows)


def negative_indices_of_each(seed: int, step: int, num_samples: int, num_negatives: int, num_rows: int) -> Tensor:
    """Return negatives of each sample of global step `step` alone, int64 (G, K) on the CPU, drawn as above."""
    drawn = _drawn(seed, Purpose.NEGATIVES_OF_EACH, step, num_samples * num_negatives, num_rows)
    return drawn.view(num_samples, num_negatives)


def _drawn(seed: int, purpose: Purpose, step: int, num: int, num_rows: int) -> Tensor:
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"negatives: found {num_rows} rows to draw from, expected 1 to 2^32")
    # A step draws up to millions of rows: they come from numpy's Philox, compiled, whose raw words are the same in all
    # its versions, under a key of its own for each step.
    words = np.random.Philox(key=[seed, int(purpose) << 48 | step]).random_raw(num)
    # A 64-bit word times N, and of that the top (Lemire 2019): no row is favoured by more than one part in 2^32.
    bound, half = np.uint64(num_rows), np.uint64(32)
    low = ((words & np.uint64(2**32 - 1)) * bound) >> half
    drawn = ((words >> half) * bound + low) >> half
    return torch.from_numpy(drawn.astype(np.int64))
