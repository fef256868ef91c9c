"""The sample stream, an endless concatenation of epochs: which dataset row stands at which position of training.

Epoch e is a permutation of 0..N-1 that is a pure function of (seed, e). Global step t uses positions
[t*G, (t+1)*G), whatever the number of workers, and batches straddle epoch ends: nothing is dropped, padded or
repeated. The place in the stream is one integer, the step.

The permutation is a Feistel network over Z_a x Z_b with a*b >= N (round function Philox, cycle walking back into
0..N-1; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It needs no memory at any N and can be
inverted, so that the step at which a row is visited can be computed as well.

What holds of it: every epoch has each row once. For a handful of images not all orders are equally likely (N = 5: 0.90
to 1.08 of their share, N = 6: 0.86 to 1.29, over 240,000 and 1,440,000 epochs). Where N is a product of two odd halves
(9, 25, 49, 1,225, …) each round is made of odd cycles, so that only even permutations occur; whoever looks at fewer
than N - 1 positions cannot tell. More rounds do not change that, and would change the order of runs begun before.

Shapes: G global batch, P positions, N rows of the dataset.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.philox import Purpose, philox4x32

_ROUNDS = 12  # 8 leave a measurable bias at N = 5, where the halves hold two bits


def positions(step: int, global_batch: int) -> NDArray[np.int64]:
    """Return the stream positions of global step `step`, int64 (G,)."""
    return np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)


def visits(positions_P: ArrayLike, num_rows: int) -> NDArray[np.int64]:
    """Return how often the row at each position came before in the stream (here: the epoch), int64 (P,)."""
    return np.asarray(positions_P, dtype=np.int64) // num_rows


def rows(positions_P: ArrayLike, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return the dataset row at each stream position, int64 (P,). num_rows: N, at most 2^40. seed: 64 bits."""
    if not 1 <= num_rows <= 2**40:
        raise ValueError(f"num_rows: found {num_rows}, expected 1 to 2^40")
    epochs, places = np.divmod(np.asarray(positions_P, dtype=np.int64), num_rows)
    return _walk(places, epochs, num_rows, seed, _forward)


def positions_of(rows_P: ArrayLike, epochs_P: ArrayLike, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return the stream position at which each row stands in each epoch, int64 (P,): the inverse of `rows`."""
    epochs = np.asarray(epochs_P, dtype=np.int64)
    return epochs * num_rows + _walk(np.asarray(rows_P, dtype=np.int64), epochs, num_rows, seed, _backward)


def last_steps(num_rows: int, seed: int, global_batch: int, num_steps: int) -> NDArray[np.int64]:
    """Return the step of each row's last visit in steps 0..num_steps-1, -1 where there was none, int64 (N,)."""
    last = np.full(num_rows, -1, dtype=np.int64)
    end = num_steps * global_batch
    if end == 0:
        return last
    all_rows = np.arange(num_rows, dtype=np.int64)
    epoch = (end - 1) // num_rows
    for e in (epoch - 1, epoch):
        if e >= 0:
            places = positions_of(all_rows, np.full(num_rows, e), num_rows, seed)
            last = np.where(places < end, places // global_batch, last)
    return last


def group_offsets(global_batch: int, norm_group: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return rank's whole groups of consecutive positions as (start, stop) offsets into the G positions.

    Groups hold `norm_group` positions, the last one what is left. Ranks take contiguous runs of whole groups whose
    counts differ by at most one; with more ranks than groups some ranks have none.
    """
    if not (global_batch >= 1 and norm_group >= 1 and 0 <= rank < world_size):
        raise ValueError(
            f"global_batch {global_batch}, norm_group {norm_group}, rank {rank} of {world_size}: expected "
            "both sizes at least 1 and 0 <= rank < world_size"
        )
    num_groups = -(-global_batch // norm_group)
    first, last = num_groups * rank // world_size, num_groups * (rank + 1) // world_size
    return [(g * norm_group, min((g + 1) * norm_group, global_batch)) for g in range(first, last)]


def _walk(values_P, epochs_P, num_rows, seed, network):
    """Apply `network` again wherever it left 0..N-1: it permutes a*b >= N values, so every walk comes back."""
    a = isqrt(num_rows - 1) + 1
    b = -(-num_rows // a)
    result = network(values_P, epochs_P, a, b, seed)
    outside = np.flatnonzero(result >= num_rows)
    while outside.size:
        result[outside] = network(result[outside], epochs_P[outside], a, b, seed)
        outside = outside[result[outside] >= num_rows]
    return result


def _round(half_P, epochs_P, number: int, seed: int) -> NDArray[np.int64]:
    counters = np.empty((len(half_P), 4), dtype=np.uint32)
    counters[:, 0] = half_P
    counters[:, 1] = int(Purpose.ORDER) << 8 | number
    counters[:, 2] = epochs_P & 0xFFFFFFFF
    counters[:, 3] = 0x40000000
    block = philox4x32(counters, seed)
    return (block[:, 0].astype(np.int64) << 31) ^ block[:, 1]


def _forward(values_P, epochs_P, a: int, b: int, seed: int) -> NDArray[np.int64]:
    left, right = np.divmod(values_P, b)
    for number in range(0, _ROUNDS, 2):
        left = (left + _round(right, epochs_P, number, seed)) % a
        right = (right + _round(left, epochs_P, number + 1, seed)) % b
    return left * b + right


def _backward(values_P, epochs_P, a: int, b: int, seed: int) -> NDArray[np.int64]:
    left, right = np.divmod(values_P, b)
    for number in range(_ROUNDS - 2, -1, -2):
        right = (right - _round(left, epochs_P, number + 1, seed)) % b
        left = (left - _round(right, epochs_P, number, seed)) % a
    return left * b + right
