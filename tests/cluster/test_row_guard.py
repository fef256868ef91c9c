"""Frozen rows: what a snapshot reads in pieces is what was there when it was taken, whatever is written meanwhile."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.row_guard import RowGuard

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64]


def random_rows(num_rows: int, dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    noise = np.random.default_rng(seed).integers(0, 256, (num_rows, *shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
    return torch.from_numpy(noise).view(dtype)


def as_bytes(rows: torch.Tensor) -> np.ndarray:
    """The bytes (R, X) by another way than the package's: through Python's own buffers."""
    width = rows[0].numel() * rows.itemsize if len(rows) else 0
    raw = bytes(rows.contiguous().view(-1).view(torch.uint8).tolist()) if len(rows) else b""
    return np.frombuffer(raw, np.uint8).reshape(len(rows), width)


def read_all(frozen, row_bytes: int, piece: int, between=lambda: None) -> np.ndarray:
    out = np.zeros((len(frozen), row_bytes), np.uint8)
    for at in range(0, len(frozen), piece):
        stop = min(at + piece, len(frozen))
        frozen.read(stop, out[at:stop])
        between()
    return out


class Writer:
    """Writes rows and the steps of their last writes, in both tables under one guard, and keeps nothing else."""

    def __init__(self, rows: torch.Tensor, last: torch.Tensor, guard: RowGuard, seed: int) -> None:
        self.rows, self.last, self.guard = rows, last, guard
        self.random = np.random.default_rng(seed)
        self.step = 0

    def write(self, places_U: np.ndarray | None = None) -> None:
        self.step += 1
        if places_U is None:
            places_U = self.random.integers(0, len(self.rows), self.random.integers(1, 8))  # a row may come twice
        new = random_rows(len(places_U), self.rows.dtype, int(self.random.integers(2**31)), tuple(self.rows.shape[1:]))
        with self.guard.writing(places_U):
            self.rows[torch.from_numpy(places_U)] = new
            self.last[torch.from_numpy(places_U)] = self.step


# What happens, in order: a write, a snapshot, or a piece read of one of the snapshots.
events = st.lists(
    st.tuples(st.just("write"), st.integers(0, 5)) | st.tuples(st.just("freeze"), st.integers(1, 9))
    | st.tuples(st.just("read"), st.integers(0, 3)),
    max_size=60,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(events, st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 12))
def test_any_order_of_writes_snapshots_and_reads_gives_each_snapshot_its_own_moment(
    events, num_rows, dtype, only_written, since
):
    rows, last = random_rows(num_rows, dtype, 0), torch.full((num_rows,), -1, dtype=torch.int32)
    guard = RowGuard()
    writer = Writer(rows, last, guard, 1)
    alive: list[dict] = []
    done = []
    for name, number in [*events, *[("read", 0)] * (3 * num_rows)]:
        if name == "write":
            writer.write()
        elif name == "freeze" and len(alive) < 3:
            frozen = guard.freeze(rows, last)
            moment = {"rows": as_bytes(rows).copy(), "last": np.array(last.tolist()), "at": 0, "read": []}
            alive.append({"frozen": frozen, "piece": number, **moment})
        elif name == "read" and number < len(alive):
            snapshot = alive[number]
            stop = min(snapshot["at"] + snapshot["piece"], num_rows)
            if only_written:
                snapshot["read"].append(snapshot["frozen"].read_written(stop, since))
            else:
                out = np.zeros((stop - snapshot["at"], snapshot["rows"].shape[1]), np.uint8)
                snapshot["frozen"].read(stop, out)
                snapshot["read"].append((np.arange(snapshot["at"], stop), out))
            snapshot["at"] = stop
            if stop == num_rows:
                snapshot["frozen"].release()
                done.append(alive.pop(number))
    assert not alive
    for snapshot in done:
        selected = snapshot["last"] >= since if only_written else np.ones(num_rows, bool)
        assert np.array_equal(np.concatenate([places for places, _ in snapshot["read"]]), np.flatnonzero(selected))
        assert np.array_equal(np.concatenate([read for _, read in snapshot["read"]]), snapshot["rows"][selected])


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("seed", range(4))
def test_a_writer_thread_that_never_rests_does_not_change_what_readers_in_other_threads_get(dtype, seed):
    num_rows, row_bytes = 2000, 24 * dtype.itemsize
    rows, last = random_rows(num_rows, dtype, seed, (2, 12)), torch.full((num_rows,), -1, dtype=torch.int32)
    guard = RowGuard()
    writer = Writer(rows, last, guard, seed)
    timing = np.random.default_rng(seed)
    problems: list[str] = []
    readers: list[threading.Thread] = []
    num_written = []

    def read(frozen, frozen_last, then: np.ndarray, last_then: np.ndarray, since: int, piece: int) -> None:
        got = read_all(frozen, row_bytes, piece, lambda: time.sleep(timing.uniform(0, 0.001)))
        if not np.array_equal(got, then):
            problems.append("rows differ")
        parts = [frozen_last.read_written(min(at + piece, num_rows), since) for at in range(0, num_rows, piece)]
        places, values = np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts])
        if not np.array_equal(places, np.flatnonzero(last_then >= since)) or not np.array_equal(values, then[places]):
            problems.append("written rows differ")
        frozen.release()
        frozen_last.release()

    for round_number in range(6):
        frozen, frozen_last = guard.freeze(rows), guard.freeze(rows, last)
        then, last_then = as_bytes(rows).copy(), last.numpy().copy()
        arguments = (frozen, frozen_last, then, last_then, round_number * 20, int(timing.integers(50, 700)))
        readers.append(threading.Thread(target=read, args=arguments))
        readers[-1].start()
        num_written.append(0)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            writer.write()
            num_written[-1] += 1
            if timing.random() < 0.1:
                time.sleep(0.0002)
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive()
    assert problems == []
    assert min(num_written) > 0
    assert sum(num_written) > 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_rank_without_rows_freezes_and_reads_nothing(dtype, shape):
    guard = RowGuard()
    rows, last = torch.empty(0, *shape, dtype=dtype), torch.empty(0, dtype=torch.int32)
    frozen = guard.freeze(rows, last)
    assert len(frozen) == 0
    with guard.writing(np.empty(0, np.int64)):
        pass
    places, read = frozen.read_written(0, 0)
    row_bytes = int(np.prod(shape)) * dtype.itemsize
    assert places.shape == (0,)
    assert read.shape == (0, row_bytes)
    assert read_all(guard.freeze(rows), row_bytes, 4).shape == (0, row_bytes)


def test_rows_that_do_not_lie_side_by_side_are_refused():
    with pytest.raises(ValueError, match=r"strides .*expected rows that lie side by side"):
        RowGuard().freeze(torch.zeros(4, 6)[:, ::2])


def test_a_writer_waits_for_one_piece_and_not_for_the_whole_reading():
    num_rows = 4000
    rows = torch.zeros(num_rows, 2)
    guard = RowGuard()
    frozen = guard.freeze(rows)
    piece_s = 0.02

    class SlowRows(np.ndarray):
        """Rows that take their time to be copied, while the guard is held."""

        def __getitem__(self, key):
            if isinstance(key, slice):
                time.sleep(piece_s)
            return super().__getitem__(key)

    frozen._rows = frozen._rows.view(SlowRows)
    reading = threading.Thread(target=read_all, args=(frozen, 8, 100))
    started_s = time.monotonic()
    reading.start()
    waits_s = []
    while reading.is_alive():
        before_s = time.monotonic()
        with guard.writing(np.array([num_rows - 1])):
            waits_s.append(time.monotonic() - before_s)
        time.sleep(0.001)
    reading.join()
    total_s = time.monotonic() - started_s
    assert total_s >= 40 * piece_s, "the reader has to hold the guard for this long in all"
    assert len(waits_s) >= 20, "the writer got in about once in every piece"
    assert sorted(waits_s)[int(0.9 * len(waits_s))] < 3 * piece_s


def test_nothing_is_kept_of_rows_that_were_read_already_or_when_nobody_reads():
    rows, guard = torch.zeros(10, 2), RowGuard()
    frozen = guard.freeze(rows)
    out = np.zeros((5, 8), np.uint8)
    frozen.read(5, out)
    with guard.writing(np.array([0, 4])):
        rows[[0, 4]] = 1
    assert len(frozen._places.values) == 0
    with guard.writing(np.array([5, 6, 5])):
        rows[[5, 6]] = 1
    with guard.writing(np.array([5, 6])):
        rows[[5, 6]] = 2
    assert set(frozen._places.values.tolist()) == {5, 6}
    assert len(frozen._places.values) <= 3, "once per write at most, and not again"
    frozen.release()
    with guard.writing(np.array([7])):
        rows[7] = 3
    assert 7 not in frozen._places.values
