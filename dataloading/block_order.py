"""The block order: for data sets beyond what the disk of a node holds.

Shards stand in a fixed random sequence, which is cut into *lanes* of equal numbers of images. A lane owns its part of
the sequence in all epochs and supplies a fixed part of every batch, so a node that computes a part of the batch
downloads the shards of its lanes and not all of them. In each epoch a lane takes its shards in another order, a
*window* of a few shards at a time, and the images of a window in a random order. The windows of different lanes end at
different steps, so that a batch mixes images of lanes x window shards and downloads come one after the other.

Everything is a pure function of (seed, epoch, shard sizes, G), and every image comes exactly once per epoch, whatever
the sizes: where the number of images is no multiple of G, the borders between lanes move by less than a batch from
epoch to epoch, and a shard on a border serves two lanes.

Shapes: S shards, L lanes, P positions, G global batch, K pieces of shards that a lane takes in an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.philox import Purpose, words

_WINDOWS_KEPT_PER_LANE = 3


@dataclass(frozen=True)
class ShardUse:
    """A shard and the stream positions between which a lane reads it."""

    shard: int
    first: int
    """Position of the first image of the window that the shard is in."""
    last: int
    """Position of the last one."""


@dataclass(frozen=True)
class _LaneEpoch:
    """What a lane reads in an epoch, in its order."""

    shards_K: NDArray[np.int64]
    starts_K: NDArray[np.int64]
    """Place in the sequence at which each piece begins."""
    ends_K: NDArray[np.int64]
    """Images of the lane up to the end of each piece."""
    windows: NDArray[np.int64]
    """Piece at which each window begins, and K at the end."""

    def window_bounds(self, window: int) -> tuple[int, int]:
        """Return the first image of a window and the first after it, counted in the lane's epoch."""
        first, stop = int(self.windows[window]), int(self.windows[window + 1])
        return int(self.ends_K[first - 1]) if first else 0, int(self.ends_K[stop - 1])


class BlockOrder:
    """Which row stands at which position. Not safe in threads; every user makes one of its own."""

    def __init__(
        self,
        shard_rows_S: ArrayLike,
        seed: int,
        global_batch: int,
        *,
        lanes: int,
        window: int,
        row_of_place_N: NDArray[np.integer] | None = None,
    ) -> None:
        """shard_rows_S: images of each shard, at least 1. lanes: at most G are used. window: shards mixed at a time.

        row_of_place_N: the row of the i-th image in shard order; None where rows are in shard order.
        """
        sizes_S = np.asarray(shard_rows_S, dtype=np.int64)
        if len(sizes_S) == 0 or sizes_S.min() < 1:
            raise ValueError(
                f"shard sizes: found {sizes_S[:5].tolist()}, expected at least one shard, none of it empty"
            )
        if global_batch < 1 or lanes < 1 or window < 1:
            raise ValueError(f"global batch {global_batch}, lanes {lanes}, window {window}: expected at least 1 each")
        self.num_rows = int(sizes_S.sum())
        self.num_lanes = min(lanes, global_batch)
        self._seed, self._global_batch, self._window = seed, global_batch, window
        self._row_of_place_N = row_of_place_N
        self._sequence_S = _shuffled(len(sizes_S), seed, 0, Purpose.SHARD_SEQUENCE)
        self._sequence_ends_S = np.cumsum(sizes_S[self._sequence_S])
        self._first_place_S = np.cumsum(sizes_S) - sizes_S
        self._lane_offsets = np.arange(self.num_lanes + 1) * global_batch // self.num_lanes
        self._lane_of_offset_G = np.searchsorted(self._lane_offsets, np.arange(global_batch), side="right") - 1
        self._lane_epochs: OrderedDict[tuple[int, int], _LaneEpoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()

    def rows(self, positions_P: ArrayLike) -> NDArray[np.int64]:
        """Return the dataset row at each position, int64 (P,)."""
        positions = np.asarray(positions_P, dtype=np.int64)
        epochs_P = positions // self.num_rows
        lanes_P = self._lane_of_offset_G[positions % self._global_batch]
        places_P = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs_P).tolist():
            for lane in np.unique(lanes_P[epochs_P == epoch]).tolist():
                chosen = np.flatnonzero((epochs_P == epoch) & (lanes_P == lane))
                before = self._count(epoch * self.num_rows, lane)
                places_P[chosen] = self._places(self._counts(positions[chosen], lane) - before, epoch, lane)
        return places_P if self._row_of_place_N is None else self._row_of_place_N[places_P].astype(np.int64)

    def lanes_of(self, offsets: tuple[int, int]) -> range:
        """Return the lanes that supply the part [start, stop) of the G positions of a step."""
        start, stop = offsets
        if start == stop:
            return range(0)
        return range(int(self._lane_of_offset_G[start]), int(self._lane_of_offset_G[stop - 1]) + 1)

    def uses(self, offsets: tuple[int, int], epoch: int) -> list[ShardUse]:
        """Return what the lanes of a part of the batch read in an epoch, in the order in which it is needed."""
        found: list[ShardUse] = []
        for lane in self.lanes_of(offsets):
            work = self._lane_epoch(epoch, lane)
            for window in range(len(work.windows) - 1):
                start, stop = work.window_bounds(window)
                first, last = (self._position(index, epoch, lane) for index in (start, stop - 1))
                pieces = work.shards_K[work.windows[window] : work.windows[window + 1]]
                found += [ShardUse(int(shard), first, last) for shard in pieces]
        return sorted(found, key=lambda use: (use.first, use.last, use.shard))

    def uses_from(self, offsets: tuple[int, int], position: int) -> Iterator[ShardUse]:
        """Yield without end what a part of the batch reads from a position on."""
        epoch = position // self.num_rows
        while True:
            yield from (use for use in self.uses(offsets, epoch) if use.last >= position)
            epoch += 1

    def _counts(self, positions_P: NDArray[np.int64], lane: int) -> NDArray[np.int64]:
        """Return how many of the positions before each one belong to the lane."""
        low, high = self._lane_offsets[lane], self._lane_offsets[lane + 1]
        steps_P, offsets_P = np.divmod(positions_P, self._global_batch)
        return steps_P * (high - low) + np.clip(offsets_P - low, 0, high - low)

    def _count(self, position: int, lane: int) -> int:
        return int(self._counts(np.array([position]), lane)[0])

    def _position(self, index: int, epoch: int, lane: int) -> int:
        """Return the position at which the lane's image `index` of an epoch stands: the inverse of `_counts`."""
        low, high = int(self._lane_offsets[lane]), int(self._lane_offsets[lane + 1])
        step, offset = divmod(index + self._count(epoch * self.num_rows, lane), high - low)
        return step * self._global_batch + low + offset

    def _places(self, indices_P: NDArray[np.int64], epoch: int, lane: int) -> NDArray[np.int64]:
        """Return the places in shard order of images of a lane, counted in its epoch."""
        work = self._lane_epoch(epoch, lane)
        pieces_P = np.searchsorted(work.ends_K, indices_P, side="right")
        windows_P = np.searchsorted(work.windows, pieces_P, side="right") - 1
        for window in np.unique(windows_P).tolist():
            chosen = np.flatnonzero(windows_P == window)
            start, stop = work.window_bounds(window)
            shuffled = self._shuffled_window(stop - start, epoch, lane, window)
            indices_P[chosen] = start + shuffled[indices_P[chosen] - start]
        pieces_P = np.searchsorted(work.ends_K, indices_P, side="right")
        before_P = np.where(pieces_P > 0, work.ends_K[pieces_P - 1], 0)
        in_sequence_P = work.starts_K[pieces_P] + indices_P - before_P
        numbers_P = np.searchsorted(self._sequence_ends_S, in_sequence_P, side="right")
        shards_P = self._sequence_S[numbers_P]
        before_P = np.where(numbers_P > 0, self._sequence_ends_S[numbers_P - 1], 0)
        return self._first_place_S[shards_P] + in_sequence_P - before_P

    def _lane_epoch(self, epoch: int, lane: int) -> _LaneEpoch:
        key = (epoch, lane)
        if key not in self._lane_epochs:
            self._lane_epochs[key] = self._make_lane_epoch(epoch, lane)
            while len(self._lane_epochs) > _WINDOWS_KEPT_PER_LANE * self.num_lanes:
                self._lane_epochs.popitem(last=False)
        self._lane_epochs.move_to_end(key)
        return self._lane_epochs[key]

    def _make_lane_epoch(self, epoch: int, lane: int) -> _LaneEpoch:
        bounds = [epoch * self.num_rows, (epoch + 1) * self.num_rows]
        # Places of the sequence before the lane: the positions of the epoch that belong to the lanes before it.
        start = sum(self._count(bounds[1], before) - self._count(bounds[0], before) for before in range(lane))
        stop = start + self._count(bounds[1], lane) - self._count(bounds[0], lane)
        if start == stop:
            empty = np.empty(0, dtype=np.int64)
            return _LaneEpoch(empty, empty, empty, np.zeros(1, dtype=np.int64))
        first = int(np.searchsorted(self._sequence_ends_S, start, side="right"))
        last = int(np.searchsorted(self._sequence_ends_S, stop, side="left"))
        ends_K = np.minimum(self._sequence_ends_S[first : last + 1], stop)
        starts_K = np.concatenate([[start], ends_K[:-1]])
        order_K = _shuffled(len(ends_K), self._seed, epoch << 32 | lane, Purpose.LANE_SHARDS)
        lengths_K = (ends_K - starts_K)[order_K]
        # The first window of lane l is shorter, by l mod window shards: windows of different lanes end at other times.
        windows = np.arange(self._window - lane % self._window, len(ends_K), self._window)
        return _LaneEpoch(
            shards_K=self._sequence_S[first : last + 1][order_K],
            starts_K=starts_K[order_K],
            ends_K=np.cumsum(lengths_K),
            windows=np.concatenate([[0], windows, [len(ends_K)]]).astype(np.int64),
        )

    def _shuffled_window(self, size: int, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        key = (epoch, lane, window)
        if key not in self._windows:
            stream = epoch << 44 | lane << 24 | window
            self._windows[key] = _shuffled(size, self._seed, stream, Purpose.WINDOW)
            while len(self._windows) > _WINDOWS_KEPT_PER_LANE * self.num_lanes:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]


def _shuffled(size: int, seed: int, stream: int, purpose: Purpose) -> NDArray[np.int64]:
    """Return a random permutation of 0..size-1, a pure function of (seed, stream, purpose)."""
    return np.argsort(words(seed, stream, purpose=purpose, num=size), kind="stable")
