"""A save beside training: it starts at once, training writes on, and how it ended is told once, on every rank."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from checkpoint_content import assert_holds, bounds, save, start
from checkpoint_fakes import FaultyStore, InlineCoordination, SlowStore, ThreadWorker, run_group

from cluster.checkpoint import RowGuard, RowTable, SaveFailedError, read_latest
from cluster.manifest import ManifestId
from cluster.store import Store, StoreError

NUM_ROWS = 40


def table(rows: torch.Tensor, guard: RowGuard, last: torch.Tensor | None = None) -> dict[str, RowTable]:
    return {"bank": RowTable(len(rows), 0, rows, last, guard)}


def test_start_save_returns_at_once_and_training_writes_on_while_a_slow_store_takes_its_time(uri):
    rows, guard, tensor = torch.zeros(NUM_ROWS, 2), RowGuard(), torch.zeros(3)
    store = SlowStore(uri, delay_s=0.4)
    checkpointer, _ = start(store, coordinator=InlineCoordination(Store(uri)), num_threads=2)
    started_s = time.monotonic()
    checkpointer.start_save(1, table(rows, guard), {"w": tensor}, {"step": 1})
    start_s = time.monotonic() - started_s
    assert checkpointer.is_saving
    num_writes, longest_s = 0, 0.0
    while checkpointer.is_saving:
        before_s = time.monotonic()
        with guard.writing(np.arange(NUM_ROWS)):
            rows += 1
        tensor += 1
        longest_s = max(longest_s, time.monotonic() - before_s)
        num_writes += 1
        time.sleep(0.001)
    saved_s = time.monotonic() - started_s
    report = checkpointer.wait()

    assert saved_s >= 1.6, "nine objects of 0.4 s on two threads"
    assert start_s < 0.4
    assert longest_s < 0.4
    assert num_writes > 50
    assert report.stall_s < 0.4 < report.write_s
    checkpoint = read_latest(Store(uri))
    assert not checkpoint.rows("bank").any(), "as it was when the save began"
    assert not checkpoint.tensors()["w"].any()
    assert rows[0, 0] == num_writes


def test_rows_without_a_guard_and_tensors_may_change_as_soon_as_start_save_returns(uri):
    rows, last, tensor = torch.zeros(NUM_ROWS, 2), torch.zeros(NUM_ROWS, dtype=torch.int32), torch.zeros(3)
    checkpointer, _ = start(SlowStore(uri, 0.02), coordinator=InlineCoordination(Store(uri)))
    for step in (1, 2, 3):
        rows[step], last[step], tensor[0] = step, step, step
        then = rows.clone(), tensor.clone()
        checkpointer.start_save(step, {"bank": RowTable(NUM_ROWS, 0, rows, last)}, {"w": tensor}, {})
        rows += 100
        last += 100
        tensor += 100
        checkpointer.wait()
        assert torch.equal(read_latest(Store(uri)).rows("bank"), then[0])
        assert torch.equal(read_latest(Store(uri)).tensors()["w"], then[1])
        rows -= 100
        last -= 100
        tensor -= 100


def test_wait_says_how_a_save_ended_once(uri):
    checkpointer, _ = start(Store(uri))
    assert checkpointer.wait() is None
    assert not checkpointer.is_saving
    checkpointer.start_save(1, {}, {}, {})
    assert checkpointer.wait().step == 1
    assert checkpointer.wait() is None
    checkpointer.start_save(2, {}, {}, {})
    with pytest.raises(AssertionError, match="its outcome was asked for"):
        checkpointer.start_save(3, {}, {}, {})
    assert checkpointer.wait().step == 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("cause", "is_permanent"),
    [(OSError(28, "No space left on device"), True), (ConnectionResetError("reset by peer"), False)],
)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_failing_upload_is_reported_once_on_every_rank_and_the_next_save_works(
    uri, world_size, cause, is_permanent, at
):
    error = StoreError(f"cannot write 'x': {cause}")
    error.__cause__ = cause
    coordinator = InlineCoordination(Store(uri))
    rows = torch.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2)

    def work(worker: ThreadWorker):
        store = FaultyStore(uri, error=error)
        checkpointer, _ = start(store, worker, coordinator=coordinator, num_threads=2)
        first, stop = bounds(NUM_ROWS, worker.rank, world_size)
        mine, guard = rows[first:stop].clone(), RowGuard()
        places = np.arange(stop - first)
        saved = []
        for step in range(1, 5):
            with guard.writing(places):
                mine += 1
            is_failing = step == 2 and worker.rank == world_size - 1
            store.kill_at = len(store.log) + min(at, 2) if is_failing else None
            part = {"bank": RowTable(NUM_ROWS, first, mine, None, guard)}
            checkpointer.start_save(step, part, {"w": torch.ones(2)}, {"step": step})
            with guard.writing(places):
                mine += 1
            with guard.writing(places):
                mine -= 1
            try:
                saved.append(checkpointer.wait().step)
            except SaveFailedError as caught:
                saved.append((str(caught), caught.is_permanent))
            assert checkpointer.wait() is None, "reported once"
            worker.all_gather_object(None)
        return saved

    outcomes = run_group(world_size, work)
    text = f"cannot save step 2: rank {world_size - 1}: cannot write 'x': {cause}"
    assert outcomes == [[1, (text, is_permanent), 3, 4]] * world_size
    assert torch.equal(read_latest(Store(uri)).rows("bank"), rows + 4)
    assert Store(uri).list(ManifestId(1, 2).objects_prefix) == []


def test_a_failed_save_leaves_no_guard_that_goes_on_saving_old_values(uri):
    guard, rows = RowGuard(), torch.zeros(4, 2)
    checkpointer, _ = start(Store(uri))
    bad = {"bank": RowTable(4, 0, rows, None, guard), "views": RowTable(4, 0, torch.zeros(4, 4)[:, ::2], None, guard)}
    with pytest.raises(SaveFailedError, match="rank 0: rows: found strides"):
        checkpointer.save(1, bad, {}, {})
    assert guard._snapshots == []
    store = FaultyStore(uri, kill_at=0, error=StoreError("cannot write"))
    failing, _ = start(store, coordinator=InlineCoordination(Store(uri)))
    store.kill_at = len(store.log)
    with pytest.raises(SaveFailedError):
        failing.save(1, table(rows, guard), {}, {})
    assert guard._snapshots == []
    store.kill_at = None
    failing.save(2, table(rows, guard), {}, {})
    assert guard._snapshots == []


def test_a_snapshot_that_fails_in_an_odd_way_on_one_rank_is_an_error_on_all(uri):
    coordinator = InlineCoordination(Store(uri))

    class NoMemory(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            if function is torch.Tensor.detach:
                raise RuntimeError("out of memory")
            return super().__torch_function__(function, types, arguments, keywords or {})

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=coordinator)
        rows = torch.zeros(2, 2)
        if worker.rank == 1:
            rows = rows.as_subclass(NoMemory)
        with pytest.raises(SaveFailedError, match=r"rank 1: RuntimeError\('out of memory'\)"):
            checkpointer.save(1, {"bank": RowTable(4, 2 * worker.rank, rows)}, {}, {})

    assert run_group(2, work) == [None, None]


def test_a_share_of_the_bandwidth_leaves_rests_until_somebody_waits(uri):
    rows, guard = torch.zeros(NUM_ROWS, 2), RowGuard()
    store = SlowStore(uri, delay_s=0.02)
    checkpointer, _ = start(store, coordinator=InlineCoordination(Store(uri)), num_threads=1, bandwidth_share=0.01)
    checkpointer.start_save(1, table(rows, guard), {}, {})
    time.sleep(0.5)
    assert checkpointer.is_saving, "nine objects of 0.02 s with rests of 2 s"
    assert len(Store(uri).list("objects/")) <= 2
    started_s = time.monotonic()
    checkpointer.wait()
    assert time.monotonic() - started_s < 1.5, "it hurried"


def test_a_save_on_its_way_does_not_keep_close_waiting(uri):
    rows, guard = torch.zeros(NUM_ROWS, 2), RowGuard()
    checkpointer, _ = start(SlowStore(uri, 0.5), coordinator=InlineCoordination(Store(uri)), num_threads=1)
    checkpointer.start_save(1, table(rows, guard), {}, {})
    started_s = time.monotonic()
    checkpointer.close()
    assert time.monotonic() - started_s < 0.5


def test_saves_of_two_runs_in_one_process_do_not_mix(uri):
    def work(number: int) -> None:
        checkpointer, _ = start(Store(f"{uri}-{number}"), coordinator=None)
        for step in (1, 2, 3):
            save(checkpointer, ThreadWorker(), 10 * number + step)
        checkpointer.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in (1, 2):
        assert_holds(read_latest(Store(f"{uri}-{number}")), 10 * number + 3)
