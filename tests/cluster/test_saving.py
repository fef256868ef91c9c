"""Saving by all ranks together: every bit survives, and an error on any rank is the same error on all."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_content import NUM_ROWS, assert_holds, run_saves, save, share, start, whole_tables
from checkpoint_fakes import FaultyStore, InlineCoordination, ThreadWorker, run_group

from cluster.checkpoint import Checkpointer, CheckpointError, Retention, RowTable, SaveFailedError, read_latest
from cluster.manifest import Manifest, ManifestId
from cluster.row_table import DTYPES
from cluster.store import Store, StoreError


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_checkpoint_of_any_number_of_ranks_restores_on_any_other(uri, world_size):
    reports = run_saves(Store(uri), [3], world_size)
    assert all(replace(report, stall_s=0) == replace(reports[0][0], stall_s=0) for (report,) in reports)
    assert reports[0][0].num_bytes == sum(s.num_bytes for s in read_latest(Store(uri)).manifest.objects())

    for other in (1, 2, 3, 4):
        coordinator = InlineCoordination(Store(uri))

        def restore(worker: ThreadWorker, coordinator=coordinator):
            checkpoint = Checkpointer(Store(uri), worker=worker, coordinator=coordinator).restore()
            parts = share(whole_tables(3), worker.rank, worker.world_size)
            for name, part in parts.items():
                assert torch.equal(checkpoint.rows(name, part.start, part.stop), part.rows)
            assert_holds(checkpoint, 3)
            return checkpoint.step

        assert run_group(other, restore) == [3] * other


def test_one_worker_needs_no_coordinator_from_outside(uri):
    checkpointer, _ = start(Store(uri), coordinator=None, retention=Retention(last=2))
    for step in (1, 2, 3):
        assert save(checkpointer, ThreadWorker(), step).step == step
    checkpointer.close()
    assert_holds(read_latest(Store(uri)), 3)
    assert len(Store(uri).list("manifests/")) == 2


def test_without_a_coordinator_from_outside_rank_0_hosts_one_for_all(uri):
    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=None, retention=Retention(last=1))
        reports = [save(checkpointer, worker, step) for step in (1, 2)]
        worker.all_gather_object(None)
        checkpointer.close()
        return [report.step for report in reports]

    assert run_group(3, work) == [[1, 2]] * 3
    assert_holds(read_latest(Store(uri)), 2)
    assert len(Store(uri).list("manifests/")) == 1


def test_a_table_may_have_fewer_rows_than_there_are_ranks(uri):
    rows = torch.tensor([[1.5, 2.5], [3.5, 4.5]])
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=coordinator)
        checkpointer.save(1, share({"bank": rows}, worker.rank, 4), {}, {})

    assert run_group(4, work) == [None] * 4
    assert torch.equal(read_latest(Store(uri)).rows("bank"), rows)


def test_a_table_may_have_no_rows_at_all(uri):
    for step in (1, 2):
        checkpointer, _ = start(Store(uri), rows_per_step=3)
        empty = RowTable(0, 0, torch.empty(0, 4), last_step=torch.empty(0, dtype=torch.int32))
        checkpointer.save(step, {"bank": empty}, {}, {})
    assert read_latest(Store(uri)).rows("bank").shape == (0, 4)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_bit_of_every_dtype_survives_from_views_that_are_not_contiguous(uri, dtype):
    noise = torch.randint(0, 256, (20, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = noise.view(DTYPES[dtype])[:, ::2]
    checkpointer, _ = start(Store(uri))
    checkpointer.save(1, {"t": RowTable(20, 0, rows)}, {"t": rows}, {})

    checkpoint = read_latest(Store(uri))
    expected = rows.contiguous().view(torch.uint8)
    assert torch.equal(checkpoint.rows("t").view(torch.uint8), expected)
    assert torch.equal(checkpoint.tensors()["t"].view(torch.uint8), expected)


def test_tensors_of_any_shape_survive(uri):
    tensors = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "double": torch.tensor([0.1, -0.0], dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    checkpointer, _ = start(Store(uri))
    checkpointer.save(1, {}, tensors, {})
    read = read_latest(Store(uri)).tensors()
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_full_disk_on_one_rank_is_the_same_error_on_all_and_the_checkpoint_before_stays(uri):
    full = StoreError("cannot write: the disk is full")
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        store = FaultyStore(uri, error=full)
        checkpointer, _ = start(store, worker, coordinator=coordinator)
        save(checkpointer, worker, 1)
        store.kill_at = len(store.log) + 2 if worker.rank == 1 else None
        with pytest.raises(SaveFailedError) as caught:
            save(checkpointer, worker, 2)
        assert_holds(read_latest(Store(uri)), 1)
        worker.all_gather_object(None)
        store.kill_at = None
        save(checkpointer, worker, 3)
        return caught.value

    errors = run_group(3, work)
    assert [str(error) for error in errors] == ["cannot save step 2: rank 1: cannot write: the disk is full"] * 3
    assert str(pickle.loads(pickle.dumps(errors[0]))) == str(errors[0])
    assert_holds(read_latest(Store(uri)), 3)
    assert Store(uri).list(ManifestId(1, 2).objects_prefix) == [], "remains of the failed save"


@pytest.mark.parametrize(
    ("rows_of_rank_1", "text"),
    [
        ((20, 37), r"table 'bank': segments: found rows \[20, .* after row 18, expected each row once"),
        ((17, 37), r"table 'bank': segments: found rows \[17, .* after row 18, expected each row once"),
        ((18, 36), "table 'bank': segments: they end at row 36, expected all 37 rows"),
    ],
)
def test_ranks_that_leave_out_or_repeat_rows_are_told_which(uri, rows_of_rank_1, text):
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=coordinator)
        first, last = (0, 18) if worker.rank == 0 else rows_of_rank_1
        checkpointer.save(1, {"bank": RowTable(NUM_ROWS, first, torch.zeros(last - first, 2))}, {}, {})

    for error in run_group(2, work):
        with pytest.raises(CheckpointError, match=text):
            raise error
    assert read_latest(Store(uri)) is None


def test_ranks_that_disagree_on_a_table_are_told_so(uri):
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=coordinator)
        checkpointer.save(1, {"bank": RowTable(4, 2 * worker.rank, torch.zeros(2, 3 + worker.rank))}, {}, {})

    for error in run_group(2, work):
        with pytest.raises(CheckpointError, match="table 'bank': the ranks do not agree on what it is"):
            raise error


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state": {"loss": float("nan")}}, r"cannot save step 1: rank 0: state\['loss'\]: found nan"),
        ({"tensors": {"w": torch.zeros(2, dtype=torch.complex64)}}, "rank 0: tensor 'w': found torch.complex64"),
        ({"tables": {"a/b": RowTable(2, 0, torch.zeros(2, 1))}}, "rank 0: table 'a/b': expected a name without '/'"),
    ],
)
def test_a_mistake_of_rank_0_is_an_error_on_every_rank_and_the_next_save_works(uri, content, text):
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker, coordinator=coordinator)
        mine = {"tables": {}, "tensors": {}, "state": {}, **(content if worker.rank == 0 else {})}
        with pytest.raises(SaveFailedError, match=text) as caught:
            checkpointer.save(1, **mine)
        assert caught.value.is_permanent
        worker.all_gather_object(None)
        save(checkpointer, worker, 2)

    assert run_group(2, work) == [None, None]
    assert_holds(read_latest(Store(uri)), 2)


def test_a_metric_that_is_no_finite_number_is_told_and_left_out_of_a_checkpoint_that_is_saved(uri):
    store = Store(uri)
    checkpointer, _ = start(store)
    odd = {"nan": math.nan, "inf": -math.inf, "none": None, "text": "0.5", "huge": 10**400, "pair": torch.zeros(2)}
    even = {"float": 0.25, "int": 3, "numpy": np.float32(0.5), "tensor": torch.tensor(2.0), "bool": True}
    checkpointer.save(1, {}, {}, {}, metrics={**odd, **even})
    (key,) = store.list("manifests/")
    metrics = Manifest.from_bytes(store.get(key), key).metrics
    assert metrics == {"float": 0.25, "int": 3.0, "numpy": 0.5, "tensor": 2.0, "bool": 1.0}
    assert [warning.split(":")[0] for warning in checkpointer.warnings] == [f"metric {name} of step 1" for name in odd]
    checkpointer.close()


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, dtype=torch.float64), torch.tensor(1.0), torch.zeros(3, 0), torch.zeros(9, 1)]
)
def test_a_table_that_the_format_cannot_hold_is_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        RowTable(8, 0, rows)


@pytest.mark.parametrize("last_step", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)])
def test_steps_of_writes_that_do_not_fit_the_rows_are_refused(last_step):
    with pytest.raises(ValueError, match=r"last_step: found .*, expected \(3,\) torch.int32"):
        RowTable(8, 0, torch.zeros(3, 1), last_step=last_step)


def test_a_step_that_is_not_after_the_checkpoint_before_is_refused(uri):
    checkpointer, _ = start(Store(uri))
    save(checkpointer, ThreadWorker(), 10)
    with pytest.raises(CheckpointError, match="step: 10 was saved already"):
        save(checkpointer, ThreadWorker(), 10)
    with pytest.raises(CheckpointError, match="step: found 9, expected at least 10"):
        save(checkpointer, ThreadWorker(), 9)
    save(checkpointer, ThreadWorker(), 11)


class ForgetfulStore(Store):
    """Creates the object, loses the answer, and finds on its own retry that the key is taken."""

    def create(self, key, data):
        super().create(key, data)
        return super().create(key, data)


def test_a_lost_answer_to_a_create_costs_nothing(uri):
    checkpointer, _ = start(ForgetfulStore(uri))
    save(checkpointer, ThreadWorker(), 10)
    assert Store(uri).list("attempts/") == ["attempts/000001.json", "attempts/000001.start.json"]
    assert_holds(read_latest(Store(uri)), 10)


class LosesOneAnswer(Store):
    """Creates a manifest and then reports an error, once."""

    error: StoreError | None = None

    def create(self, key, data):
        created = super().create(key, data)
        if self.error is not None and key.startswith("manifests/"):
            error, self.error = self.error, None
            raise error
        return created


def test_a_manifest_of_which_the_connection_lost_the_answer_is_found_and_counts(uri):
    store = LosesOneAnswer(uri)
    checkpointer, _ = start(store)
    store.error = StoreError("cannot create: connection reset")
    store.error.__cause__ = ConnectionResetError()
    assert save(checkpointer, ThreadWorker(), 10).step == 10
    assert store.error is None
    assert_holds(read_latest(Store(uri)), 10)


def test_a_manifest_whose_answer_was_lost_for_good_is_a_checkpoint_and_does_no_harm_to_later_ones(uri):
    store = LosesOneAnswer(uri)
    checkpointer, _ = start(store)
    save(checkpointer, ThreadWorker(), 10)
    store.error = StoreError("cannot create: no permission")
    with pytest.raises(SaveFailedError, match="no permission") as caught:
        save(checkpointer, ThreadWorker(), 20)
    assert caught.value.is_permanent
    assert_holds(read_latest(Store(uri)), 20)
    with pytest.raises(SaveFailedError, match="step: 20 was saved already"):
        save(checkpointer, ThreadWorker(), 20)
    assert_holds(read_latest(Store(uri)), 20)
    save(checkpointer, ThreadWorker(), 30)
    _, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 30)
