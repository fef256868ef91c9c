"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every random number of a run is a pure function of a tuple that names what it is for, so it depends neither on
the number of workers nor on threads, batch composition or restarts. Seed, visit and row go into different words
of key and counter; nothing is added or multiplied together, so no two tuples share a stream.

Shapes: B samples, N counters.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Purpose(IntEnum):
    """What a random number is for: one number per use, appended to and never renumbered (runs depend on them)."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    JITTER = 3
    GRAYSCALE = 4
    BLUR = 5
    SOLARIZE = 6
    NEGATIVES = 7
    BANK_START = 8
    DROPOUT = 9
    DEMO = 10
    WEIGHTS = 11
    SHARD_SEQUENCE = 12
    LANE_SHARDS = 13
    WINDOW = 14
    PLACEMENT = 15
    NEGATIVES_OF_EACH = 16
    ROW_CHOICE = 17


def philox4x32(counters_N4: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Return the Philox4x32-10 block of each counter.

    counters_N4: uint32; key: 64 bits. Returns uint32 (N, 4). Known answers are checked in the tests.
    """
    c0, c1, c2, c3 = (counters_N4[:, i].astype(np.uint64) for i in range(4))
    key_0, key_1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIERS[0] * c0
        product_1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(key_0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(key_1),
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def _key(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: found {seed}, expected a whole number from 0 to 2^64 - 1")
    return seed


def uniforms(
    seed: int, visits_B: ArrayLike, rows_B: ArrayLike, *, view: int, purpose: int, num_draws: int
) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), float64 (B, num_draws), a pure function of (seed, visit, row, view, purpose).

    rows_B < 2^40, visits_B < 2^32, view < 256, purpose < 256, num_draws <= 1024. Each number has 32 random bits.
    """
    rows = np.asarray(rows_B, dtype=np.uint64)
    visits = np.asarray(visits_B, dtype=np.uint64)
    blocks = np.arange((num_draws + 3) // 4, dtype=np.uint64)
    if not (0 <= view < 256 and 0 <= purpose < 256 and num_draws <= 1024):
        raise ValueError(
            f"view {view}, purpose {purpose}, num_draws {num_draws}: expected below 256, 256 and at most 1024"
        )
    # Word 1 holds 8 bits each of the row's top, view, purpose and the block of four draws.
    high = ((rows >> _SHIFT) << np.uint64(24)) | np.uint64(view << 16 | purpose << 8)
    counters = np.empty((len(rows), len(blocks), 4), dtype=np.uint32)
    counters[:, :, 0] = (rows & _LOW)[:, None]
    counters[:, :, 1] = high[:, None] | blocks[None, :]
    counters[:, :, 2] = visits[:, None]
    counters[:, :, 3] = 0
    words = philox4x32(counters.reshape(-1, 4), _key(seed)).reshape(len(rows), 4 * len(blocks))[:, :num_draws]
    return words.astype(np.float64) * 2.0**-32


def words(seed: int, stream: int, *, purpose: int, num: int) -> NDArray[np.uint64]:
    """Return `num` random 64-bit words, uint64 (num,), a pure function of (seed, stream, purpose).

    stream < 2^64 numbers what the words are drawn for: a step, a block of rows.
    """
    blocks = np.arange((num + 1) // 2, dtype=np.uint64)
    counters = np.empty((len(blocks), 4), dtype=np.uint32)
    counters[:, 0] = blocks
    counters[:, 1] = np.uint32(purpose) << np.uint32(8)
    counters[:, 2] = stream & 0xFFFFFFFF
    # The top bit sets these counters apart from those of `uniforms`, whose last word is 0.
    counters[:, 3] = (stream >> 32) | 0x80000000
    block_words = philox4x32(counters, _key(seed)).astype(np.uint64)
    pairs = (block_words[:, ::2] << _SHIFT) | block_words[:, 1::2]
    return pairs.reshape(-1)[:num]
