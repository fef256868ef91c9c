"""The exact softmax over rows of any storage in ragged blocks, against float64; what memory it takes for its scores.

Shapes: N rows, G samples, B samples of a rank, D feature numbers.
"""

from __future__ import annotations

import gc

import npid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.worker import Worker, run_local
from instdisc.bank_storage import start_rows
from instdisc.benchmark.peak_memory import reset_peak, resident_bytes
from instdisc.memory_bank import DTYPES, ShardedMemoryBank
from instdisc.objectives import softmax, softmax_loss

NUM_ROWS, DIM, GLOBAL_BATCH, TEMPERATURE = 103, 16, 13, 0.07
COUNTS = {1: [13], 3: [6, 0, 7]}
# Rows in a block by the scores that fit: one, seven, more than there are. Rows of 16 numbers against 13 samples make it
# five of the seven, so that the last block has 3 of 103, 4 of 34 and none fewer of 35.
BLOCK_ROWS = (1, 7, 1000)
MIB = 2**20


def samples():
    generator = np.random.default_rng(0)
    features_GD = reference.unit(generator.standard_normal((GLOBAL_BATCH, DIM)))
    return features_GD, generator.permutation(NUM_ROWS)[:GLOBAL_BATCH]


def run_on_both_world_sizes(worker: Worker) -> dict:
    found = {}
    for world_size, counts in COUNTS.items():
        group = dist.new_group(list(range(world_size)))
        if worker.rank >= world_size:
            continue
        own = slice(sum(counts[: worker.rank]), sum(counts[: worker.rank + 1]))
        features_GD, indices_G = samples()
        for dtype in DTYPES:
            bank = ShardedMemoryBank(NUM_ROWS, DIM, seed=3, dtype=DTYPES[dtype], group=group)
            for rows in BLOCK_ROWS:
                features_BD = torch.from_numpy(features_GD[own]).float().requires_grad_()
                loss = softmax_loss(
                    features_BD,
                    torch.from_numpy(indices_G[own]),
                    bank,
                    temperature=TEMPERATURE,
                    score_bytes=4 * GLOBAL_BATCH * rows,
                )
                loss.backward()
                assert features_BD.grad is not None
                found[world_size, dtype, rows] = loss.item(), features_BD.grad.tolist()
    return found


@pytest.fixture(scope="module")
def by_rank():
    return run_local(run_on_both_world_sizes, 3)


@pytest.mark.parametrize("rows", BLOCK_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", COUNTS)
def test_loss_and_gradient_equal_float64_of_the_rows_as_they_are_stored(by_rank, world_size, dtype, rows):
    bank_ND = start_rows(NUM_ROWS, DIM, 3, 0, NUM_ROWS).to(DTYPES[dtype]).double().numpy()
    features_GD, indices_G = samples()
    losses_G, gradient_GD = reference.softmax_losses(features_GD, indices_G, bank_ND, TEMPERATURE)
    counts = COUNTS[world_size]
    for rank, count in enumerate(counts):
        loss, gradient_BD = by_rank[rank][world_size, dtype, rows]
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        assert loss == pytest.approx(losses_G[own].mean() if count else 0.0, rel=3e-6)
        np.testing.assert_allclose(
            np.array(gradient_BD).reshape(-1, DIM) * count, gradient_GD[own], rtol=1e-4, atol=5e-6
        )


def measured(worker: Worker, dtype: str, num_rows: int, dim: int, batch: int, score_mib: float) -> int:
    """The most bytes by which this process grows in an exact softmax, features, gradients and all.

    The least of three times: pages of libraries that the system had taken back count as growth when read again.
    """
    bank = ShardedMemoryBank(num_rows, dim, dtype=DTYPES[dtype])
    softmax.CACHED_SCORE_BYTES = 2**40  # as on a GPU, where `score_bytes` alone limits a block
    features_BD, indices_B = start_rows(batch, dim, 9, 0, batch), torch.arange(batch)
    softmax_loss(features_BD, indices_B, bank, temperature=TEMPERATURE, score_bytes=MIB)  # loads what it needs
    features_BD.requires_grad_()
    grown_bytes = []
    for _ in range(3):
        features_BD.grad = None
        gc.collect()
        before = resident_bytes("VmRSS")
        reset_peak()
        loss = softmax_loss(features_BD, indices_B, bank, temperature=TEMPERATURE, score_bytes=int(score_mib * MIB))
        loss.backward()
        grown_bytes.append(resident_bytes("VmHWM") - before)
        del loss
    return min(grown_bytes)


@pytest.mark.parametrize(
    ("dtype", "num_rows", "dim", "batch", "score_mib", "allowed_mib"),
    [
        # 195.3 MiB of scores in all, so that the second block is nearly as large as the first.
        pytest.param("float32", 199_998, 8, 256, 97.7, 97.7 + 16, id="a last block of nearly the size of the first"),
        # 512 MiB of scores in all; a block's 32,768 rows take 8 MiB when they are converted.
        pytest.param("float16", 262_144, 64, 512, 64, 64 + 8 + 16, id="rows of 16 bits"),
        # Two samples: 8 bytes of scores a row against 1,024 of converted numbers, 256 MiB in all.
        pytest.param("bfloat16", 262_144, 256, 2, 64, 64 + 16, id="rows of 16 bits, few samples"),
    ],
)
def test_scores_and_converted_rows_take_no_more_memory_than_is_configured(
    dtype, num_rows, dim, batch, score_mib, allowed_mib
):
    (grown_bytes,) = run_local(measured, 1, dtype, num_rows, dim, batch, score_mib)
    assert grown_bytes < allowed_mib * MIB
