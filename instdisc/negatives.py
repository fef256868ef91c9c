"""Which rows are the negatives of a step: the same on every rank, from (seed, step) alone.

Shapes: K negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataloading.philox import Purpose, integers


def negative_indices(seed: int, step: int, num_negatives: int, num_rows: int) -> Tensor:
    """Return the rows of the negatives of global step `step`, int64 (K,) on the CPU.

    Uniform over 0..num_rows-1 with replacement, as the noise of NCE is defined (arXiv 1805.01978, section 3.2);
    num_negatives may exceed num_rows.
    """
    return torch.from_numpy(integers(seed, step, purpose=Purpose.NEGATIVES, num=num_negatives, bound=num_rows))
