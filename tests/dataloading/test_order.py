"""Orders: every row once per epoch at any size, and lanes that own shards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloading import stream
from dataloading.block_order import BlockOrder
from dataloading.order import Permutation, StepRows

seeds = st.integers(0, 2**64 - 1)
shard_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def block_order(sizes=(40,) * 50, seed=3, global_batch=24, lanes=6, window=3, **more):
    return BlockOrder(sizes, seed, global_batch, lanes=lanes, window=window, **more)


@settings(max_examples=150, deadline=None)
@given(
    sizes=shard_sizes,
    global_batch=st.integers(1, 50),
    lanes=st.integers(1, 12),
    window=st.integers(1, 6),
    seed=seeds,
    start=st.integers(0, 40),
)
def test_in_block_order_every_row_comes_exactly_once_per_epoch(sizes, global_batch, lanes, window, seed, start):
    num_rows = sum(sizes)
    places = np.random.default_rng(0).permutation(num_rows)
    order = block_order(sizes, seed, global_batch, lanes, window, row_of_place_N=places)
    positions = np.arange(start * num_rows, (start + 3) * num_rows)
    together = order.rows(positions)
    again = block_order(sizes, seed, global_batch, lanes, window, row_of_place_N=places)
    step_by_step = [again.rows(positions[i : i + global_batch]) for i in range(0, len(positions), global_batch)]
    assert together.tolist() == np.concatenate(step_by_step).tolist()
    for rows in together.reshape(3, num_rows):
        assert np.array_equal(np.sort(rows), np.arange(num_rows))


@settings(max_examples=60, deadline=None)
@given(
    sizes=shard_sizes, global_batch=st.integers(1, 40), lanes=st.integers(1, 8), window=st.integers(1, 4), seed=seeds
)
def test_the_announced_uses_of_shards_are_what_a_part_of_the_batch_reads(sizes, global_batch, lanes, window, seed):
    order = block_order(sizes, seed, global_batch, lanes, window)
    num_rows, shard_of_row = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    offsets = (global_batch // 3, global_batch - global_batch // 4)
    for epoch in range(2):
        uses = order.uses(offsets, epoch)
        positions = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
        mine = positions[(positions % global_batch >= offsets[0]) & (positions % global_batch < offsets[1])]
        for position, row in zip(mine, order.rows(mine), strict=True):
            shard = shard_of_row[row]
            assert any(use.shard == shard and use.first <= position <= use.last for use in uses)


def test_lanes_keep_their_shards_from_epoch_to_epoch():
    order = block_order(sizes=np.full(64, 40), global_batch=32, lanes=8)
    halves = [(0, 16), (16, 32)]
    read = [{use.shard for epoch in range(5) for use in order.uses(half, epoch)} for half in halves]
    assert max(len(shards) for shards in read) <= 33
    assert len(read[0] | read[1]) == 64


def test_a_batch_mixes_the_windows_of_all_lanes_and_epochs_differ():
    order = block_order(sizes=np.full(240, 50), global_batch=64, lanes=8, window=4)
    shard_of_row = np.repeat(np.arange(240), 50)
    in_batch = [len(set(shard_of_row[order.rows(stream.positions(step, 64))])) for step in range(30, 90)]
    assert np.mean(in_batch) > 0.7 * 8 * 4  # 64 images out of 32 open shards hit 27.6 of them on average
    pairs = [tuple(order.rows(np.arange(e * 12_000, e * 12_000 + 64))) for e in range(3)]
    assert len(set(pairs)) == 3
    # Windows of different lanes end at different steps.
    ends = [use.last // 64 for use in order.uses((0, 64), 0)]
    assert np.bincount(ends).max() <= 2 * 4 + 4


def test_first_positions_of_rows_in_block_order_are_spread_over_epochs():
    sizes = np.full(12, 10)
    order = block_order(sizes, seed=1, global_batch=12, lanes=2, window=2)
    rows = order.rows(np.arange(120 * 800)).reshape(800, 120)
    # Lanes own shards, so a row stays in its lane's half of every batch and visits all the steps of an epoch.
    steps = np.argsort(rows, axis=1) // 12
    counts = np.stack([np.bincount(steps[:, row], minlength=10) for row in range(120)])
    assert ((counts - 80.0) ** 2 / 80.0).sum(axis=1).max() < 60  # 9 degrees of freedom, 120 rows


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 300),
    global_batch=st.integers(1, 9000),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    steps=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    seed=seeds,
)
def test_step_rows_are_the_stream_in_whatever_order_steps_are_asked_for(num_rows, global_batch, part, steps, seed):
    offsets = tuple(int(p * global_batch) for p in sorted(part))
    step_rows = StepRows(Permutation(num_rows, seed), global_batch, offsets)
    for step in steps:
        positions_B = stream.positions(step, global_batch)[slice(*offsets)]
        assert step_rows.positions(step).tolist() == positions_B.tolist()
        assert step_rows.visits(step).tolist() == stream.visits(positions_B, num_rows).tolist()
        assert step_rows.rows(step).tolist() == stream.rows(positions_B, num_rows, seed).tolist()


@pytest.mark.parametrize("wrong", [{"sizes": ()}, {"sizes": (3, 0)}, {"lanes": 0}, {"window": 0}, {"global_batch": 0}])
def test_an_impossible_block_order_is_refused(wrong):
    with pytest.raises(ValueError, match="expected at least"):
        block_order(**wrong)
