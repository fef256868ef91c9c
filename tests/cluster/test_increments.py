"""Increments: any history of writes, saves, failures and restarts on other ranks restores what a model says."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from checkpoint_content import bounds, start
from checkpoint_fakes import FaultyStore, InlineCoordination, ThreadWorker, run_group
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoint import Checkpointer, Retention, RowGuard, RowTable, SaveFailedError, SaveReport, read_latest
from cluster.store import Store, StoreError

ROW_BYTES, STEP_BYTES, NUMBER_BYTES = 3 * 4, 4, 4


@dataclass
class Rank:
    """One rank's rows, which it writes under a guard."""

    checkpointer: Checkpointer
    store: FaultyStore
    start: int
    rows: torch.Tensor
    last: torch.Tensor
    guard: RowGuard = field(default_factory=RowGuard)

    def write(self, places_U: np.ndarray, values_U: np.ndarray, step: int) -> None:
        mine = (places_U >= self.start) & (places_U < self.start + len(self.rows))
        local = places_U[mine] - self.start
        with self.guard.writing(local):
            self.rows[torch.from_numpy(local)] = torch.from_numpy(values_U[mine])
            self.last[torch.from_numpy(local)] = step


class Run:
    """A training run on several ranks, and beside it a model of numpy arrays that knows nothing of checkpoints."""

    def __init__(self, uri: str, num_rows: int, options: dict) -> None:
        self.uri, self.num_rows, self.options = uri, num_rows, options
        self.rows, self.last = np.zeros((num_rows, 3), np.float32), np.full(num_rows, -1, np.int32)
        self.saved = self.rows.copy(), self.last.copy(), 0
        self.step = 0
        self.ranks: list[Rank] = []

    def restart(self, world_size: int, incremental: bool) -> None:
        coordinator = InlineCoordination(Store(self.uri), Retention(last=2))

        def begin(worker: ThreadWorker) -> Rank:
            first, stop = bounds(self.num_rows, worker.rank, world_size)
            rows, last = torch.zeros(stop - first, 3), torch.full((stop - first,), -1, dtype=torch.int32)
            store = FaultyStore(self.uri)

            def load(checkpoint) -> None:
                checkpoint.read_rows("bank", first, rows)
                checkpoint.read_rows("last_step", first, last)

            checkpointer, checkpoint = start(
                store, worker, coordinator=coordinator, load=load, incremental=incremental, **self.options
            )
            assert checkpointer.warnings == []
            assert (checkpoint.step if checkpoint else 0) == self.saved[2]
            return Rank(checkpointer, store, first, rows, last)

        self.ranks = run_group(world_size, begin)
        for rank in self.ranks:
            assert isinstance(rank, Rank), rank
        self.rows, self.last, self.step = self.saved[0].copy(), self.saved[1].copy(), self.saved[2]
        assert np.array_equal(np.concatenate([rank.rows.numpy() for rank in self.ranks]), self.rows)
        assert np.array_equal(np.concatenate([rank.last.numpy() for rank in self.ranks]), self.last)

    def write(self, seed: int) -> None:
        self.step += 1
        random = np.random.default_rng(seed)
        places = random.integers(0, self.num_rows, random.integers(1, 6))
        values = random.standard_normal((len(places), 3)).astype(np.float32)
        values = values[[list(places).index(place) for place in places]]  # of a row that comes twice: one value
        self.rows[places], self.last[places] = values, self.step
        for rank in self.ranks:
            rank.write(places, values, self.step)

    def save(self, failing: int | None, writes_meanwhile: list[int]) -> list[SaveReport]:
        """Save on all ranks while writes go on; on the rank `failing` an upload fails."""
        then = self.rows.copy(), self.last.copy(), self.step
        if failing is not None:
            store = self.ranks[failing % len(self.ranks)].store
            store.kill_at, store.error = len(store.log), StoreError("cannot write: the disk is full")
        for rank in self.ranks:
            tables = {
                "bank": RowTable(self.num_rows, rank.start, rank.rows, rank.last, rank.guard),
                "last_step": RowTable(self.num_rows, rank.start, rank.last, rank.last, rank.guard),
            }
            rank.checkpointer.start_save(self.step, tables, {"w": torch.tensor([self.step])}, {"step": self.step})
        for seed in writes_meanwhile:
            self.write(seed)
        reports = []
        for rank in self.ranks:
            try:
                reports.append(rank.checkpointer.wait())
            except SaveFailedError:
                assert failing is not None
        assert len(reports) in (0, len(self.ranks)), "all ranks or none"
        if reports:
            self.saved = then
        for rank in self.ranks:
            rank.store.kill_at = None
        return reports

    def check(self) -> None:
        """What a reader finds is what the model saved last."""
        checkpoint = read_latest(Store(self.uri))
        if self.saved[2] == 0:
            assert checkpoint is None
            return
        assert checkpoint.state == {"step": self.saved[2]}
        assert np.array_equal(checkpoint.rows("bank").numpy(), self.saved[0])
        assert np.array_equal(checkpoint.rows("last_step").numpy(), self.saved[1])


def touched_bytes(last: np.ndarray, since: int) -> int:
    """What the rows written in step `since` and later take in an increment of both tables."""
    return int((last >= since).sum()) * (ROW_BYTES + NUMBER_BYTES + STEP_BYTES + NUMBER_BYTES)


seeds = st.integers(0, 10**6)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), seeds),
        st.tuples(st.just("write"), seeds),
        st.tuples(st.just("save"), st.lists(seeds, max_size=3)),
        st.tuples(st.just("save"), st.lists(seeds, max_size=3)),
        st.tuples(st.just("fail"), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.tuples(st.integers(1, 4), st.sampled_from([True, True, True, False]))),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, st.integers(1, 97), st.integers(1, 4), st.sampled_from([{}, {"rows_per_step": 5}]))
def test_any_history_restores_what_the_model_says_on_any_number_of_ranks(operations, num_rows, world_size, options):
    run = Run(f"memory://{uuid.uuid4().hex}", num_rows, options)
    try:
        run.restart(world_size, True)
        is_incremental = True
        for name, argument in operations:
            before = run.saved
            if name == "write":
                run.write(argument)
            elif name == "restart":
                run.restart(*argument)
                is_incremental = argument[1]
            elif run.step > run.saved[2]:
                reports = run.save(argument if name == "fail" else None, argument if name == "save" else [])
                if name == "save":
                    assert reports
                    whole = num_rows * (ROW_BYTES + STEP_BYTES)
                    if reports[0].is_base:
                        assert reports[0].table_bytes == whole
                    else:
                        assert is_incremental
                        assert reports[0].table_bytes == touched_bytes(run.saved[1], before[2])
                run.check()
        run.restart(5 - world_size, True)
        run.check()
    finally:
        MemoryFileSystem.store.clear()


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_increments_of_any_number_of_ranks_go_on_on_any_other(uri, before, after):
    run = Run(uri, 197, {})
    run.restart(before, True)
    for seed, world_size in enumerate([before, before, after, after]):
        if seed == 2:
            run.restart(after, True)
        run.write(seed)
        (report, *_) = run.save(None, [100 + seed])
        assert report.is_base == (seed == 0), world_size
        run.check()
    increments = read_latest(Store(uri)).tables["bank"].increments
    assert len({increment.key.split("/")[1] for increment in increments}) == 2, "of both attempts"
    run.restart(before, True)


def bank(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(num_rows, 128, dtype=torch.bfloat16), torch.full((num_rows,), -1, dtype=torch.int32)


def train(rows: torch.Tensor, last: torch.Tensor, first: int, stop: int, batch: int) -> set[int]:
    """Write `batch` rows in each of the steps [first, stop); return which were written."""
    written: set[int] = set()
    for step in range(first, stop):
        places = (torch.arange(batch) + step * batch) % len(rows)
        rows[places], last[places] = float(step % 100), step
        written.update(places.tolist())
    return written


@pytest.mark.parametrize("options", [{}, {"rows_per_step": 64}])
def test_an_increment_takes_the_rows_touched_and_a_new_base_comes_when_increments_exceed_half_of_it(uri, options):
    num_rows, batch, interval = 20_000, 64, 30
    rows, last = bank(num_rows)
    guard = RowGuard()
    checkpointer, _ = start(Store(uri), block_rows=None, **options)
    base_bytes, increment_bytes, num_bases = num_rows * (256 + 4), 0, 0
    for save in range(1, 25):
        written = train(rows, last, 1 + (save - 1) * interval, 1 + save * interval, batch)
        tables = {
            "bank": RowTable(num_rows, 0, rows, last, guard),
            "last_step": RowTable(num_rows, 0, last, last, guard),
        }
        report = checkpointer.save(save * interval, tables, {}, {})
        if report.is_base:
            assert report.table_bytes == base_bytes
            if num_bases:
                expected = base_bytes * batch * interval / num_rows if options else 0
                assert increment_bytes + expected > 0.5 * base_bytes, "not too early"
            num_bases, increment_bytes = num_bases + 1, 0
        else:
            assert report.table_bytes <= 1.2 * len(written) * (256 + 4 + 4 + 4)
            assert increment_bytes <= 0.5 * base_bytes, "not too late"
            increment_bytes += report.table_bytes
    assert num_bases >= 3
    assert torch.equal(read_latest(Store(uri)).rows("bank"), rows)


def test_increments_are_not_written_where_they_were_not_asked_for(uri):
    rows, last = bank(500)
    checkpointer, _ = start(Store(uri), incremental=False)
    for step in (1, 2):
        train(rows, last, step, step + 1, 3)
        report = checkpointer.save(step, {"bank": RowTable(500, 0, rows, last)}, {}, {})
        assert report.is_base
        assert report.table_bytes == 500 * 256
    assert torch.equal(read_latest(Store(uri)).rows("bank"), rows)


@pytest.mark.parametrize("change", ["another table", "more rows", "another dtype", "another shape"])
def test_a_table_that_changed_begins_a_new_base(uri, change):
    rows, last = bank(400)
    checkpointer, _ = start(Store(uri))
    checkpointer.save(1, {"bank": RowTable(400, 0, rows, last)}, {}, {})
    if change == "more rows":
        rows, last = bank(401)
    rows = (
        rows.float() if change == "another dtype" else rows[:, :64].contiguous() if change == "another shape" else rows
    )
    name = "other" if change == "another table" else "bank"
    train(rows, last, 2, 3, 3)
    assert checkpointer.save(2, {name: RowTable(len(rows), 0, rows, last)}, {}, {}).is_base
    assert torch.equal(read_latest(Store(uri)).rows(name), rows)


def test_a_table_that_does_not_know_its_writes_is_stored_whole_beside_increments(uri):
    rows, last = bank(400)
    other = torch.arange(400.0)[:, None]
    checkpointer, _ = start(Store(uri))
    for step in (1, 2, 3):
        train(rows, last, step, step + 1, 3)
        other += 1
        tables = {"bank": RowTable(400, 0, rows, last), "other": RowTable(400, 0, other)}
        report = checkpointer.save(step, tables, {}, {})
        assert report.is_base == (step == 1)
    checkpoint = read_latest(Store(uri))
    assert torch.equal(checkpoint.rows("bank"), rows)
    assert torch.equal(checkpoint.rows("other"), other)
    assert checkpoint.tables["other"].increments == ()


def test_the_next_increment_after_a_failed_save_adds_to_the_checkpoint_before(uri):
    rows, last = bank(400)
    store = FaultyStore(uri, error=StoreError("cannot write"))
    checkpointer, _ = start(store, coordinator=InlineCoordination(Store(uri)))
    for step in range(1, 7):
        train(rows, last, step, step + 1, 3)
        store.kill_at = len(store.log) if step in (3, 4) else None
        with contextlib.suppress(SaveFailedError) if step in (3, 4) else contextlib.nullcontext():
            checkpointer.save(step, {"bank": RowTable(400, 0, rows, last)}, {}, {})
    checkpoint = read_latest(Store(uri))
    assert torch.equal(checkpoint.rows("bank"), rows)
    assert [i.key.split("/")[2][:12] for i in checkpoint.tables["bank"].increments] == [
        f"{step:012d}" for step in (2, 5, 6)
    ]
