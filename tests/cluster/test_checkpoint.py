"""Saving and restoring: any number of ranks, any error, any moment of death."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_fakes import FaultyStore, Killed, ThreadWorker, run_group
from fsspec.implementations.memory import MemoryFileSystem

import cluster.manifest
from cluster.attempts import begin_attempt, read_history
from cluster.checkpoint import (
    Checkpoint,
    CheckpointDeletedError,
    Checkpointer,
    CheckpointError,
    RowTable,
    SupersededError,
    read_latest,
)
from cluster.checkpoint_reader import verify_share
from cluster.manifest import ManifestId
from cluster.retention import remove_old
from cluster.row_table import DTYPES
from cluster.store import Store, StoreError
from cluster.stored_object import DamagedObjectError, write_object

NUM_ROWS = 37
HERE = Path(__file__).parent


@pytest.fixture
def uri() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}"
    # The memory file system belongs to the process, and its listings look at everything in it.
    MemoryFileSystem.store.clear()


def whole_tables(step: int, num_rows: int = NUM_ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "bank": torch.randn(num_rows, 6, generator=generator).to(torch.bfloat16),
        "last_step": torch.randint(-1, step + 1, (num_rows,), generator=generator, dtype=torch.int32),
        "weights": torch.randn(num_rows, 2, 3, generator=generator),
    }


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), float(step)), "momentum": torch.arange(step)}


def share(tables: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, RowTable]:
    parts = {}
    for name, rows in tables.items():
        start, stop = len(rows) * rank // world_size, len(rows) * (rank + 1) // world_size
        parts[name] = RowTable(len(rows), start, rows[start:stop])
    return parts


def save(checkpointer: Checkpointer, worker: ThreadWorker, step: int):
    tables = share(whole_tables(step), worker.rank, worker.world_size)
    return checkpointer.save(step, tables, tensors_of(step) if worker.rank == 0 else {}, {"step": step, "z": 0.1})


def start(store: Store, worker: ThreadWorker | None = None, **options) -> tuple[Checkpointer, Checkpoint | None]:
    checkpointer = Checkpointer(store, worker=worker or ThreadWorker(), **{"block_rows": 5, **options})
    checkpoint = checkpointer.restore()
    checkpointer.begin_attempt()
    return checkpointer, checkpoint


def run_saves(store: Store, steps, world_size: int = 1, **options) -> list:
    def work(worker: ThreadWorker):
        checkpointer, _ = start(store, worker, **options)
        return [save(checkpointer, worker, step) for step in steps]

    return run_group(world_size, work)


def assert_holds(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step, "z": 0.1}
    for name, rows in whole_tables(step).items():
        assert checkpoint.rows(name).dtype == rows.dtype
        assert torch.equal(checkpoint.rows(name), rows)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(checkpoint.tensors()[name], tensor)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_checkpoint_of_any_number_of_ranks_restores_on_any_other(uri, world_size):
    reports = run_saves(Store(uri), [3], world_size)
    assert all(report == reports[0] for report in reports)
    assert reports[0][0].num_bytes == sum(s.num_bytes for s in read_latest(Store(uri)).manifest.objects())

    def restore(worker: ThreadWorker):
        checkpoint = Checkpointer(Store(uri), worker=worker).restore()
        parts = share(whole_tables(3), worker.rank, worker.world_size)
        for name, part in parts.items():
            assert torch.equal(checkpoint.rows(name, part.start, part.stop), part.rows)
        assert_holds(checkpoint, 3)
        return checkpoint.step

    for other in (1, 2, 3, 4):
        assert run_group(other, restore) == [3] * other


def test_a_table_may_have_fewer_rows_than_there_are_ranks(uri):
    rows = torch.tensor([[1.5, 2.5], [3.5, 4.5]])

    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker)
        checkpointer.save(1, share({"bank": rows}, worker.rank, 4), {}, {})

    assert run_group(4, work) == [None] * 4
    assert torch.equal(read_latest(Store(uri)).rows("bank"), rows)


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


def test_rows_reads_only_the_segments_that_overlap(uri):
    run_saves(Store(uri), [1], world_size=2)
    store = FaultyStore(uri)
    checkpoint = read_latest(store)
    segments = [(s.start, s.stop) for s in checkpoint.tables["bank"].segments]
    assert segments == [(0, 5), (5, 10), (10, 15), (15, 18), (18, 20), (20, 25), (25, 30), (30, 35), (35, 37)]

    store.log.clear()
    assert torch.equal(checkpoint.rows("bank", 16, 21), whole_tables(1)["bank"][16:21])
    assert sorted(key[-16:-4] for name, key in store.log) == ["000000000018", "000000000020", "000000000025"]
    assert {name for name, _ in store.log} == {"get"}

    store.log.clear()
    assert checkpoint.rows("bank", 7, 7).shape == (0, 6)
    assert store.log == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, NUM_ROWS + 1)])
def test_rows_outside_a_table_are_refused(uri, start, stop):
    run_saves(Store(uri), [1])
    with pytest.raises(ValueError, match=r"table 'bank': found rows .* expected them in \[0, 37\)"):
        read_latest(Store(uri)).rows("bank", start, stop)
    with pytest.raises(ValueError, match="table: found 'bnak', expected one of bank, last_step, weights"):
        read_latest(Store(uri)).rows("bnak")


def test_a_full_disk_on_one_rank_is_the_same_error_on_all_and_the_checkpoint_before_stays(uri):
    full = StoreError("cannot write: the disk is full")

    def work(worker: ThreadWorker):
        store = FaultyStore(uri, error=full)
        checkpointer, _ = start(store, worker)
        save(checkpointer, worker, 1)
        store.kill_at = len(store.log) + 2 if worker.rank == 1 else None
        with pytest.raises(CheckpointError) as caught:
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
    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker)
        first, last = (0, 18) if worker.rank == 0 else rows_of_rank_1
        checkpointer.save(1, {"bank": RowTable(NUM_ROWS, first, torch.zeros(last - first, 2))}, {}, {})

    for error in run_group(2, work):
        with pytest.raises(CheckpointError, match=text):
            raise error
    assert read_latest(Store(uri)) is None


def test_ranks_that_disagree_on_a_table_are_told_so(uri):
    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker)
        checkpointer.save(1, {"bank": RowTable(4, 2 * worker.rank, torch.zeros(2, 3 + worker.rank))}, {}, {})

    for error in run_group(2, work):
        with pytest.raises(CheckpointError, match="table 'bank': the ranks do not agree on what it is"):
            raise error


def test_a_mistake_in_the_state_is_an_error_on_every_rank(uri):
    def work(worker: ThreadWorker):
        checkpointer, _ = start(Store(uri), worker)
        checkpointer.save(1, {}, {}, {"loss": float("nan")})

    for error in run_group(2, work):
        with pytest.raises(CheckpointError, match=r"cannot save step 1: rank 0: state\['loss'\]: found nan"):
            raise error


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, dtype=torch.float64), torch.tensor(1.0), torch.zeros(3, 0), torch.zeros(9, 1)]
)
def test_a_table_that_the_format_cannot_hold_is_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        RowTable(8, 0, rows)


def remove(store: Store, key: str) -> None:
    store.delete(key)


def cut(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, data)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("damage", [remove, cut, flip])
@pytest.mark.parametrize("where", ["/weights/000000000030", "tensors"])
def test_a_damaged_checkpoint_is_reported_skipped_and_kept_and_the_one_before_is_used(uri, world_size, damage, where):
    store = Store(uri)
    run_saves(store, [10, 20], world_size)
    of_step_20 = ManifestId(1, 20)
    key = next(k for k in store.list(of_step_20.objects_prefix) if where in k)
    damage(store, key)
    kept = [of_step_20.key, *store.list(of_step_20.objects_prefix)]

    def work(worker: ThreadWorker):
        checkpointer, checkpoint = start(Store(uri), worker, keep_last=1)
        assert_holds(checkpoint, 10)
        for step in (20, 30):
            save(checkpointer, worker, step)
        return checkpointer.warnings

    warnings = run_group(world_size, work)
    assert all(w == warnings[0] and len(w) == 1 for w in warnings)
    assert warnings[0][0].startswith("the checkpoint of step 20 (attempt 1) is damaged and was skipped: object ")
    assert key in warnings[0][0]
    assert {remove: "is missing", cut: "bytes, expected", flip: "differs from its checksum"}[damage] in warnings[0][0]
    assert set(kept) <= set(store.list())

    checkpointer, checkpoint = start(Store(uri), keep_last=1)
    assert_holds(checkpoint, 30)
    save(checkpointer, ThreadWorker(), 40)
    assert set(kept) <= set(store.list()), "the next attempt keeps it, too"


def test_a_manifest_that_was_cut_short_is_named_and_skipped(uri):
    store = Store(uri)
    run_saves(store, [10, 20])
    cut(store, "manifests/000001-000000000020.json")

    assert_holds(read_latest(store), 10)
    checkpointer, checkpoint = start(store)
    assert_holds(checkpoint, 10)
    assert "manifests/000001-000000000020.json" in checkpointer.warnings[0]


def test_a_run_of_which_nothing_is_intact_does_not_start_again_from_nothing(uri):
    store = Store(uri)
    run_saves(store, [10, 20])
    for key in store.list("objects/"):
        flip(store, key)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact, 2 tried.*put the damaged objects back"):
        start(store)


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_skipped(uri, monkeypatch):
    run_saves(Store(uri), [10])
    checkpointer, _ = start(Store(uri))
    monkeypatch.setattr(cluster.manifest, "FORMAT", 2)
    save(checkpointer, ThreadWorker(), 20)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 2, expected at most 1: .* update the package"):
        Checkpointer(Store(uri), worker=ThreadWorker()).restore()


def test_loading_executes_nothing(uri, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    store = Store(uri)
    run_saves(store, [1])
    checkpoint = read_latest(store)
    payload = write_object(store, checkpoint.manifest.tensors.key, [pickle.dumps({"w": Payload()})])
    object.__setattr__(checkpoint.manifest, "tensors", payload)
    with pytest.raises(Exception, match=r"(?i)header"):
        checkpoint.tensors()
    assert not (tmp_path / "executed").exists()


def test_a_zombie_is_told_to_end_and_harms_nothing(uri):
    zombie, _ = start(Store(uri), keep_last=1)
    save(zombie, ThreadWorker(), 10)
    successor, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 10)

    with pytest.raises(SupersededError, match="attempt 1 was left behind by attempt 2"):
        save(zombie, ThreadWorker(), 20)
    assert_holds(read_latest(Store(uri)), 10)
    save(successor, ThreadWorker(), 15)
    assert_holds(read_latest(Store(uri)), 15)
    assert Store(uri).list(ManifestId(1, 20).objects_prefix) == []
    assert not Store(uri).exists(ManifestId(1, 20).key)


def test_a_zombie_that_commits_at_the_worst_moment_stays_invisible(uri):
    zombie, _ = start(Store(uri))
    save(zombie, ThreadWorker(), 10)
    successor, _ = start(Store(uri))
    record = Store(uri).get("attempts/000002.json")
    Store(uri).delete("attempts/000002.json")
    save(zombie, ThreadWorker(), 20)
    Store(uri).put("attempts/000002.json", record)

    assert_holds(read_latest(Store(uri)), 10)
    save(successor, ThreadWorker(), 15)
    assert_holds(read_latest(Store(uri)), 15)
    assert not Store(uri).exists(ManifestId(1, 20).key), "an orphan is collected"


def test_attempts_that_begin_at_once_have_different_numbers(uri):
    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(lambda _: begin_attempt(Store(uri), None), range(8)))
    assert sorted(attempt.number for attempt in attempts) == list(range(1, 9))


def test_an_attempt_whose_checkpoint_was_deleted_while_it_began_is_refused(uri):
    alive, _ = start(Store(uri), keep_last=1)
    save(alive, ThreadWorker(), 10)
    late = Checkpointer(Store(uri), worker=ThreadWorker())
    late.restore()
    save(alive, ThreadWorker(), 20)
    with pytest.raises(CheckpointError, match="was deleted while this attempt began: another process still writes"):
        late.begin_attempt()


class ForgetfulStore(Store):
    """Creates the object, loses the answer, and finds on its own retry that the key is taken."""

    def create(self, key, data):
        super().create(key, data)
        return super().create(key, data)


def test_a_lost_answer_to_a_create_costs_nothing(uri):
    checkpointer, _ = start(ForgetfulStore(uri))
    save(checkpointer, ThreadWorker(), 10)
    assert Store(uri).list("attempts/") == ["attempts/000001.json"]
    assert_holds(read_latest(Store(uri)), 10)


def test_a_step_that_is_not_after_the_checkpoint_before_is_refused(uri):
    checkpointer, _ = start(Store(uri))
    save(checkpointer, ThreadWorker(), 10)
    with pytest.raises(CheckpointError, match="step: found 10, expected at least 11"):
        save(checkpointer, ThreadWorker(), 10)


def test_the_last_checkpoints_stay_and_everything_else_goes(tmp_path):
    store = Store(tmp_path)
    run_saves(store, [1, 2], keep_last=2)
    run_saves(store, [3, 4], world_size=2, keep_last=2)
    assert store.list("manifests/") == ["manifests/000002-000000000003.json", "manifests/000002-000000000004.json"]
    assert {key.split("/")[2] for key in store.list("objects/")} == {"000000000003-0001", "000000000004-0002"}
    assert sorted(path.name for path in tmp_path.glob("objects/*/*")) == ["000000000003-0001", "000000000004-0002"]


def test_retention_does_not_touch_what_later_attempts_write(uri):
    zombie, _ = start(Store(uri), keep_last=1)
    save(zombie, ThreadWorker(), 10)
    successor, _ = start(Store(uri))
    save(successor, ThreadWorker(), 20)
    of_successor = [*Store(uri).list("manifests/000002"), *Store(uri).list("objects/000002")]

    history = [ManifestId(1, 10), ManifestId(2, 20)]
    remove_old(Store(uri), attempt=1, chain=history[:1], manifests=history, damaged=[], keep_last=1)
    assert set(of_successor) <= set(Store(uri).list())


def test_a_failure_to_remove_older_checkpoints_is_a_warning(uri):
    class Undeletable(Store):
        def delete(self, key):
            raise StoreError("cannot delete: no permission")

    checkpointer, _ = start(Undeletable(uri), keep_last=1)
    save(checkpointer, ThreadWorker(), 1)
    save(checkpointer, ThreadWorker(), 2)
    assert checkpointer.warnings == ["older checkpoints were not removed: cannot delete: no permission"]
    assert_holds(read_latest(Store(uri)), 2)


def test_a_reader_whose_checkpoint_is_deleted_is_told_so_and_finds_a_newer_one(uri):
    checkpointer, _ = start(Store(uri), keep_last=1)
    save(checkpointer, ThreadWorker(), 1)
    checkpoint = read_latest(Store(uri))
    save(checkpointer, ThreadWorker(), 2)
    with pytest.raises(CheckpointDeletedError, match=r"step 1 \(attempt 1\) .* was deleted while it was read"):
        checkpoint.rows("bank")
    assert_holds(read_latest(Store(uri)), 2)


def test_a_reader_notices_damage(uri):
    run_saves(Store(uri), [1])
    flip(Store(uri), next(key for key in Store(uri).list("objects/") if "/bank/" in key))
    checkpoint = read_latest(Store(uri))
    with pytest.raises(DamagedObjectError, match=r"step 1 \(attempt 1\) is damaged: .* differs from its checksum"):
        checkpoint.rows("bank", 0, 1)
    assert torch.equal(checkpoint.rows("bank", 5), whole_tables(1)["bank"][5:])


def test_a_restore_while_another_process_deletes_is_not_taken_for_damage(uri):
    run_saves(Store(uri), [1])
    store = FaultyStore(uri)

    class Deleting(Store):
        def get(self, key, start=None, stop=None):
            data = super().get(key, start, stop)
            if key.startswith("manifests/"):
                for other in Store(uri).list("manifests/") + Store(uri).list("objects/"):
                    Store(uri).delete(other)
            return data

    with pytest.raises(CheckpointError, match="another process still writes to this run"):
        Checkpointer(Deleting(store.uri), worker=ThreadWorker()).restore()


def test_records_that_vanished_are_not_taken_for_an_empty_run(uri):
    run_saves(Store(uri), [1])
    Store(uri).delete("attempts/000001.json")
    with pytest.raises(CheckpointError, match="no record of that attempt: the run was changed by hand"):
        read_latest(Store(uri))


def kill_scenario(store: Store, done: list[int]) -> None:
    """Two attempts that save and remove; `done` gets the steps whose save returned."""
    for steps in ([1, 2], [3, 4]):
        checkpointer, _ = start(store, keep_last=1, num_threads=1, block_rows=20)
        for step in steps:
            save(checkpointer, ThreadWorker(), step)
            done.append(step)


def test_death_between_any_two_operations_leaves_the_newest_committed_checkpoint(uri):
    complete = FaultyStore(uri)
    kill_scenario(complete, [])
    assert len(complete.log) >= 80
    for number in range(len(complete.log)):
        MemoryFileSystem.store.clear()
        done: list[int] = []
        with pytest.raises(Killed):
            kill_scenario(FaultyStore(uri, kill_at=number), done)
        for id in read_history(Store(uri)).chain:
            assert verify_share(Store(uri), id, 0, 1, 1)[1] == [], "a visible checkpoint lacks something"

        checkpointer, checkpoint = start(Store(uri), keep_last=1)
        newest = checkpoint.step if checkpoint else 0
        assert newest in ((done[-1], done[-1] + 1) if done else (0, 1))
        assert checkpointer.warnings == []
        if checkpoint:
            assert_holds(checkpoint, newest)
        save(checkpointer, ThreadWorker(), 9)
        latest = read_latest(Store(uri))
        assert_holds(latest, 9)
        left = {latest.manifest.id.key, *(stored.key for stored in latest.manifest.objects())}
        assert {key for key in Store(uri).list() if not key.startswith("attempts/")} == left


def run_script(name: str, *args: object) -> list:
    command = [sys.executable, "-W", "error", str(HERE / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_killed_at_any_moment_leaves_the_newest_committed_checkpoint(tmp_path):
    rounds = run_script("kill_while_saving.py", tmp_path, 12)
    assert len(rounds) == 12
    for before in rounds:
        assert before["warnings"] == []
        assert before["restored"] in (before["returned"], before["returned"] + 1)
        assert before["values"] == [before["restored"]]
    assert rounds[-1]["restored"] > 0
    assert not list(tmp_path.glob("objects/**/.tmp-*")), "the last save removed what the killed processes left"


def test_saving_copies_neither_tables_nor_tensors(tmp_path):
    (peak,) = run_script("measure_save_memory.py", tmp_path, 48)
    assert peak["grown_mib"] < 16
