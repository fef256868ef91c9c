"""Parts of a batch whose scores stay in the caches of a CPU.

Shapes: B samples, K scores of each.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CACHED_SCORES = 2**20


def sample_blocks(features_BD: Tensor, num_scores: int) -> Iterator[slice]:
    """Yield slices of the batch: a few samples at a time on a CPU, all at once on other devices."""
    num_samples = len(features_BD)
    size = max(1, CACHED_SCORES // max(1, num_scores)) if features_BD.device.type == "cpu" else max(1, num_samples)
    for start in range(0, num_samples, size):
        yield slice(start, min(num_samples, start + size))
