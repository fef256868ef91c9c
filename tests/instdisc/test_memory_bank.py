"""The memory bank on one process: start, storage, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.collectives import PendingRows
from instdisc.bank_storage import START_BLOCK_ROWS, start_rows
from instdisc.memory_bank import ShardedMemoryBank, shard_bounds
from instdisc.negatives import negative_indices


def test_starting_rows_are_unit_vectors_in_all_directions():
    rows_ND = start_rows(20_000, 128, 0, 0, 20_000)
    torch.testing.assert_close(rows_ND.norm(dim=1), torch.ones(20_000))
    cosines = (rows_ND[:10_000] * rows_ND[10_000:]).sum(dim=1)
    assert abs(cosines.mean()) < 5 / math.sqrt(128 * 10_000)
    assert abs(cosines.std() * math.sqrt(128) - 1) < 0.05


@given(num_rows=st.integers(1, 3 * START_BLOCK_ROWS), world_size=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_starting_rows_do_not_depend_on_how_they_are_sharded(num_rows, world_size, seed):
    bounds = shard_bounds(num_rows, world_size)
    assert bounds[0] == 0
    assert bounds[-1] == num_rows
    assert np.diff(bounds).max() - np.diff(bounds).min() <= 1
    parts = [start_rows(num_rows, 2, seed, int(a), int(b)) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), start_rows(num_rows, 2, seed, 0, num_rows))


def test_another_seed_starts_elsewhere():
    assert not torch.equal(start_rows(10, 8, 0, 0, 10), start_rows(10, 8, 1, 0, 10))


def test_negatives_are_uniform_with_replacement_and_differ_between_steps_and_seeds():
    drawn = torch.cat([negative_indices(1, step, 1000, 20) for step in range(50)])
    counts = torch.bincount(drawn, minlength=20).double()
    # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand.
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 43.8
    assert not torch.equal(negative_indices(1, 0, 9, 1000), negative_indices(1, 1, 9, 1000))
    assert not torch.equal(negative_indices(1, 0, 9, 1000), negative_indices(2, 0, 9, 1000))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_storage_follows_float32_within_its_rounding(dtype, tolerance):
    banks = [ShardedMemoryBank(50, 32, dtype=kind, seed=1) for kind in (torch.float32, dtype)]
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        indices_B = torch.randperm(50, generator=generator)[:20]
        features_BD = torch.nn.functional.normalize(torch.randn(20, 32, generator=generator), dim=1)
        for bank in banks:
            bank.update(indices_B, features_BD, step)
    assert banks[1].rows.dtype == dtype
    assert banks[1].lookup(torch.arange(50)).dtype == torch.float32
    torch.testing.assert_close(banks[1].rows.float(), banks[0].rows, atol=tolerance, rtol=0)
    torch.testing.assert_close(banks[1].rows.float().norm(dim=1), torch.ones(50), atol=tolerance, rtol=0)
    assert torch.equal(banks[0].last_step, banks[1].last_step)


def start(bank, indices, features_BD, step):
    """An update as training makes it, which does not wait for the device to look at the features."""
    validity = PendingRows(torch.ones(1, len(indices), dtype=torch.bool), [len(indices)], None)
    return bank.start_update(torch.tensor(indices), [len(indices)], validity, features_BD, step).wait()


def test_in_training_features_that_are_not_finite_leave_their_rows_as_they_were_and_are_remembered():
    bank = ShardedMemoryBank(4, 2)
    before_ND = bank.rows.clone()
    features_BD = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    bank.write(start(bank, [0, 1, 2], features_BD, 7))
    assert torch.equal(bank.rows[1:], before_ND[1:])
    assert not torch.equal(bank.rows[0], before_ND[0])
    assert bank.last_step.tolist() == [7, -1, -1, -1]
    bank.write(start(bank, [3], features_BD[1:2], 8))
    assert int(bank.non_finite_step) == 7


def test_in_training_a_batch_of_one_feature_writes_nothing_and_is_remembered():
    bank = ShardedMemoryBank(6, 2)
    before_ND = bank.rows.clone()
    bank.write(start(bank, [0, 1, 2, 3, 4], torch.tensor([[0.6, 0.8]]).repeat(5, 1), 3))
    assert torch.equal(bank.rows, before_ND)
    assert bank.last_step.tolist() == [-1] * 6
    assert int(bank.all_same_step) == 3


def test_rows_fetched_before_an_update_are_those_from_before_it():
    bank = ShardedMemoryBank(6, 4)
    before_ND = bank.rows.clone()
    pending = bank.start_lookup(torch.tensor([4, 1, 4]))
    bank.update(torch.tensor([4]), torch.tensor([[1.0, 0, 0, 0]]), 0)
    assert torch.equal(pending.wait(), before_ND[[4, 1, 4]])


@pytest.mark.parametrize(
    ("indices", "features", "message"),
    [
        ([0, 6], torch.ones(2, 4), "indices from 0 to 6, expected 0 to 5"),
        ([-1], torch.ones(1, 4), "indices from -1"),
        ([0], torch.ones(1, 3), r"shape \(1, 3\).*expected \(1, 4\)"),
        ([0, 1], torch.ones(1, 4), r"shape \(1, 4\) and 2 flags for 2 indices"),
        ([0, 2], torch.tensor([[1.0, 0, 0, 0], [float("nan"), 0, 0, 0]]), "not finite for row 2"),
        ([0, 1, 2, 3], torch.ones(4, 4) / 2, "one feature for all 4 images"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_and_writes_nothing(indices, features, message):
    bank = ShardedMemoryBank(6, 4)
    before_ND = bank.rows.clone()
    with pytest.raises(ValueError, match=rf"at step 3.*rank 0.*{message}"):
        bank.update(torch.tensor(indices), features, 3)
    assert torch.equal(bank.rows, before_ND)
    assert bank.last_step.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0, "dim": 4}, "0 rows"),
        ({"num_rows": 4, "dim": 4, "momentum": 1.0}, "momentum"),
        ({"num_rows": 4, "dim": 4, "dtype": torch.int8}, "dtype"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardedMemoryBank(**arguments)


def test_negatives_of_a_billion_rows_are_uniform_and_more_than_can_be_drawn_from_are_refused():
    """With 32 bits for a draw, some of a billion rows would be drawn a quarter more often than others."""
    num_rows = 3 * 2**30
    # 2^32 / N is 4/3: of three neighbouring rows one would get two of the 32-bit words, the others one each.
    counts = torch.bincount(negative_indices(0, 0, 60_000, num_rows) % 3, minlength=3).double()
    assert float(((counts - 20_000) ** 2 / 20_000).sum()) < 13.8  # chi-square, 2 degrees: once in a thousand
    with pytest.raises(ValueError, match="expected 1 to 2"):
        negative_indices(0, 0, 10, 2**33)


def test_features_that_leave_no_direction_change_no_row():
    bank = ShardedMemoryBank(6, 4)
    before_ND = bank.rows.clone()
    bank.update(torch.tensor([1]), torch.full((1, 4), 1e20), 0)
    bank.update(torch.tensor([2]), -before_ND[2:3], 1)
    assert torch.equal(bank.rows, before_ND)
    assert bank.last_step.tolist() == [-1] * 6


def test_an_update_that_is_refused_leaves_no_mark():
    bank = ShardedMemoryBank(6, 4)
    with pytest.raises(ValueError, match="not finite"):
        bank.update(torch.tensor([1]), torch.full((1, 4), torch.nan), 3)
    assert int(bank.non_finite_step) == -1
