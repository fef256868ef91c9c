from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloading import stream

sizes = st.integers(1, 120)
seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(num_rows=sizes, global_batch=st.integers(4, 90), seed=seeds)
def test_every_row_comes_exactly_once_per_epoch_at_any_batch_size(num_rows, global_batch, seed):
    num_steps = -(-3 * num_rows // global_batch)
    positions = np.concatenate([stream.positions(step, global_batch) for step in range(num_steps)])[: 3 * num_rows]
    rows = np.concatenate([stream.rows(positions[i : i + global_batch], num_rows, seed)
                           for i in range(0, len(positions), global_batch)])  # fmt: skip
    for epoch, rows_of_epoch in enumerate(rows.reshape(3, num_rows)):
        assert np.array_equal(np.sort(rows_of_epoch), np.arange(num_rows))
        assert (stream.visits(positions.reshape(3, num_rows)[epoch], num_rows) == epoch).all()


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 2**40), start=st.integers(0, 2**45), seed=seeds)
def test_positions_of_is_the_inverse_of_rows(num_rows, start, seed):
    positions = np.arange(start, start + 20)
    rows = stream.rows(positions, num_rows, seed)
    assert rows.min() >= 0
    assert rows.max() < num_rows
    assert np.array_equal(stream.positions_of(rows, stream.visits(positions, num_rows), num_rows, seed), positions)


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 60), global_batch=st.integers(1, 90), num_steps=st.integers(0, 12), seed=seeds)
def test_last_steps_equals_walking_through_the_stream(num_rows, global_batch, num_steps, seed):
    walked = np.full(num_rows, -1)
    for step in range(num_steps):
        walked[stream.rows(stream.positions(step, global_batch), num_rows, seed)] = step
    assert np.array_equal(stream.last_steps(num_rows, seed, global_batch, num_steps), walked)


@settings(max_examples=200, deadline=None)
@given(global_batch=st.integers(1, 300), norm_group=st.integers(1, 320), world_size=st.integers(1, 20))
def test_the_ranks_groups_tile_the_global_batch(global_batch, norm_group, world_size):
    of_ranks = [stream.group_offsets(global_batch, norm_group, rank, world_size) for rank in range(world_size)]
    groups = [group for groups in of_ranks for group in groups]
    assert [start for start, _ in groups] == list(range(0, global_batch, norm_group))
    assert [stop for _, stop in groups] == [*(start for start, _ in groups[1:]), global_batch]
    counts = [len(groups) for groups in of_ranks]
    assert max(counts) - min(counts) <= 1


def test_epochs_and_seeds_have_different_orders():
    orders = [tuple(stream.rows(np.arange(e * 50, (e + 1) * 50), 50, seed).tolist())
              for e in range(4) for seed in range(4)]  # fmt: skip
    assert len(set(orders)) == len(orders)


def test_the_orders_of_four_rows_are_about_equally_frequent():
    num_epochs = 6_000
    rows = stream.rows(np.arange(4 * num_epochs), 4, seed=5).reshape(num_epochs, 4)
    counts = np.array([(rows == order).all(axis=1).sum() for order in permutations(range(4))])
    # 23 degrees of freedom: 70 is exceeded once in a million times.
    assert ((counts - num_epochs / 24) ** 2 / (num_epochs / 24)).sum() < 70


def test_each_place_of_an_epoch_sees_all_rows_about_equally_often():
    num_rows, num_epochs = 13, 5_200
    rows = stream.rows(np.arange(num_rows * num_epochs), num_rows, seed=8).reshape(num_epochs, num_rows)
    counts = np.stack([np.bincount(rows[:, place], minlength=num_rows) for place in range(num_rows)])
    # 12 degrees of freedom per place: 55 is exceeded once in five million times.
    assert ((counts - 400.0) ** 2 / 400.0).sum(axis=1).max() < 55


@pytest.mark.parametrize("num_rows", [0, 2**40 + 1])
def test_an_impossible_stream_is_refused(num_rows):
    with pytest.raises(ValueError, match="num_rows"):
        stream.rows([0], num_rows, 0)
