"""Reading checkpoints: only what is asked for, also while the run that writes them goes on."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_content import NUM_ROWS, assert_holds, run_saves, save, start, tensors_of, whole_tables
from checkpoint_fakes import FaultyStore, InlineCoordination, ThreadWorker, run_group

import cluster.manifest
from cluster.checkpoint import CheckpointDeletedError, Checkpointer, CheckpointError, read_latest
from cluster.manifest import FORMAT
from cluster.shared_reads import SharedReads
from cluster.store import Store
from cluster.stored_object import DamagedObjectError


def test_rows_reads_only_the_segments_that_overlap(uri):
    run_saves(Store(uri), [1], world_size=2)
    store = FaultyStore(uri)
    checkpoint = read_latest(store)
    segments = [(s.start, s.stop) for s in checkpoint.tables["bank"].segments]
    assert segments == [(0, 5), (5, 10), (10, 15), (15, 18), (18, 20), (20, 25), (25, 30), (30, 35), (35, 37)]

    store.log.clear()
    assert torch.equal(checkpoint.rows("bank", 16, 21), whole_tables(1)["bank"][16:21])
    assert sorted(key[-16:-4] for name, key in store.log) == ["000000000018", "000000000020", "000000000025"]
    assert {name for name, _ in store.log} == {"read_into"}

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


def test_rows_are_read_into_memory_that_is_not_contiguous_too(uri):
    run_saves(Store(uri), [1])
    whole = torch.zeros(20, 12, dtype=torch.bfloat16)
    read_latest(Store(uri)).read_rows("bank", 9, whole[:, ::2])
    assert torch.equal(whole[:, ::2], whole_tables(1)["bank"][9:29])
    assert not whole[:, 1::2].any()


@pytest.mark.parametrize(
    ("start", "into"),
    [(0, torch.zeros(3, 6)), (0, torch.zeros(3, 5, dtype=torch.bfloat16)), (36, torch.zeros(2, 6).bfloat16())],
)
def test_memory_that_does_not_fit_a_table_is_refused(uri, start, into):
    run_saves(Store(uri), [1])
    with pytest.raises(ValueError, match="table 'bank': found memory for rows"):
        read_latest(Store(uri)).read_rows("bank", start, into)


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
    key = next(key for key in Store(uri).list("objects/") if "/bank/" in key)
    data = bytearray(Store(uri).get(key))
    data[0] ^= 1
    Store(uri).put(key, data)
    checkpoint = read_latest(Store(uri))
    with pytest.raises(DamagedObjectError, match=r"step 1 \(attempt 1\) is damaged: .* differs from its checksum"):
        checkpoint.rows("bank", 0, 1)
    assert torch.equal(checkpoint.rows("bank", 5), whole_tables(1)["bank"][5:])


@pytest.mark.parametrize("load", [None, lambda checkpoint: checkpoint.rows("bank")])
def test_a_restore_while_another_process_deletes_is_not_taken_for_damage(uri, load):
    run_saves(Store(uri), [1])

    class Deleting(Store):
        def get(self, key, start=None, stop=None):
            data = super().get(key, start, stop)
            if key.startswith("manifests/"):
                for other in Store(uri).list("manifests/") + Store(uri).list("objects/"):
                    Store(uri).delete(other)
            return data

    with pytest.raises(CheckpointError, match=r"another process still writes to this run|was deleted while it was"):
        start(Deleting(uri), coordinator=InlineCoordination(Store(uri)), load=load)
    # An attempt that found nothing to start from must not have started: it would hide what a copy could bring back.
    assert not Store(uri).exists("attempts/000002.start.json")


def test_every_rank_restores_the_same_checkpoint_where_one_of_them_finds_damage_while_loading(uri):
    run_saves(Store(uri), [10, 20], world_size=2)
    key = next(k for k in Store(uri).list("objects/000001/000000000020") if "/weights/000000000035" in k)
    Store(uri).delete(key)
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        seen = []

        def load(checkpoint):
            seen.append(checkpoint.step)
            checkpoint.rows("weights", 18 * worker.rank, 18 + 19 * worker.rank)

        checkpointer, checkpoint = start(Store(uri), worker, coordinator=coordinator, load=load)
        return seen, checkpoint.step, checkpointer.warnings

    outcomes = run_group(2, work)
    assert [outcome[:2] for outcome in outcomes] == [([20, 10], 10)] * 2
    assert all(key in outcome[2][0] for outcome in outcomes)


@pytest.mark.parametrize("load", [None, lambda checkpoint: None])
def test_a_checkpoint_of_a_newer_version_is_refused_and_not_skipped_and_nothing_is_deleted(uri, monkeypatch, load):
    run_saves(Store(uri), [10])
    checkpointer, _ = start(Store(uri))
    save(checkpointer, ThreadWorker(), 15)
    monkeypatch.setattr(cluster.manifest, "FORMAT", FORMAT + 1)
    save(checkpointer, ThreadWorker(), 20)
    monkeypatch.undo()
    before = {key: Store(uri).get(key) for key in Store(uri).list()}
    with pytest.raises(CheckpointError, match=r"has format 3, expected at most 2: .* update the package"):
        start(Store(uri), keep_last=1, load=load)
    assert before.items() <= {key: Store(uri).get(key) for key in Store(uri).list()}.items()


def test_an_attempt_of_a_newer_version_is_refused_with_advice(uri, monkeypatch):
    run_saves(Store(uri), [10])
    monkeypatch.setattr(cluster.manifest, "FORMAT", FORMAT + 1)
    run_saves(Store(uri), [20])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"attempts/000002.* has format 3, expected at most 2: .* update the"):
        start(Store(uri))


@pytest.mark.parametrize("load", [None, lambda checkpoint: None])
def test_a_checkpoint_of_another_configuration_is_refused_and_named(uri, load):
    run_saves(Store(uri), [10], digests={"data": "a", "order": "b"})
    with pytest.raises(CheckpointError, match="was saved with another order; put the checkpoints of this run back"):
        start(Store(uri), digests={"data": "a", "order": "c"}, load=load)
    _, checkpoint = start(Store(uri), digests={"data": "a", "order": "b", "new": "d"}, load=load)
    assert_holds(checkpoint, 10)


def test_restore_of_an_empty_store_finds_nothing(uri):
    checkpointer = Checkpointer(Store(uri), worker=ThreadWorker(), coordinator=InlineCoordination(Store(uri)))
    assert checkpointer.restore() is None
    assert read_latest(Store(uri)) is None


def test_the_ranks_of_a_machine_read_the_tensors_from_the_storage_once(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_saves(Store(uri), [10, 20], world_size=3)
    stores = [FaultyStore(uri) for _ in range(3)]
    coordinator = InlineCoordination(Store(uri))

    def work(worker: ThreadWorker):
        found = []
        _, checkpoint = start(
            stores[worker.rank], worker, coordinator=coordinator, load=lambda one: found.append(one.tensors())
        )
        return checkpoint.step, found[0]

    outcomes = run_group(3, work)
    assert [outcome[0] for outcome in outcomes] == [20] * 3
    reads = [key for store in stores for name, key in store.log if name == "read_into" and "tensors" in key]
    assert len(reads) == 1
    for _, tensors in outcomes:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(20).items())
    outcomes[0][1]["w"].zero_()
    assert torch.equal(outcomes[1][1]["w"], tensors_of(20)["w"]), "the memory of each is its own"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plant", ["a file", "a folder of others", "a wrong copy"])
def test_what_lies_in_the_place_of_shared_tensors_is_not_trusted(uri, tmp_path, monkeypatch, plant):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_saves(Store(uri), [10], world_size=2)
    shared = SharedReads(Store(uri))
    stored = read_latest(Store(uri)).manifest.tensors
    folder = tmp_path / Path(shared._folder).name
    if plant == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir(mode=0o777 if plant == "a folder of others" else 0o700)
        folder.chmod(0o777 if plant == "a folder of others" else 0o700)
        (folder / stored.checksum.replace(":", "-")).write_bytes(bytes(stored.num_bytes))
    assert shared.read(stored, 1) == Store(uri).get(stored.key)


def test_on_a_file_system_without_locks_every_rank_reads_for_itself(uri, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("cluster.shared_reads.fcntl.flock", flock)
    run_saves(Store(uri), [10], world_size=2)
    stored = read_latest(Store(uri)).manifest.tensors
    assert SharedReads(Store(uri)).read(stored, 1) == Store(uri).get(stored.key)
