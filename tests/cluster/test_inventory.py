"""Listing, verifying and pruning checkpoints: judged by what restores, and by the bytes that are there."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from checkpoint_fakes import FaultyStore, Killed
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_checkpoints import (
    Alone,
    bank_of,
    begin,
    damage,
    held_by_another_process,
    leave_orphan,
    metrics_of,
    run_attempt,
    save,
)

from cluster.attempts import read_history
from cluster.checkpoint import Checkpointer, CheckpointError, Retention, RunHeldError, SupersededError, read_latest
from cluster.checkpoint_reader import Checkpoint
from cluster.inventory import Inventory, State, take_stock
from cluster.lease import KEY as HEARTBEAT
from cluster.lease import Holder
from cluster.manifest import FORMAT, ManifestId, encode_document, read_manifest
from cluster.pruning import plan_after_next_save, plan_prune, prune, require_metric
from cluster.store import Store
from cluster.verification import choose, verify

HERE = Path(__file__).parent


@pytest.fixture
def store() -> Iterator[Store]:
    yield Store(f"memory://{uuid.uuid4().hex}")
    MemoryFileSystem.store.clear()


def states(inventory: Inventory) -> dict[int, State]:
    return {entry.id.step: entry.state for entry in inventory.entries}


def contents(store: Store) -> dict[str, bytes]:
    """Everything but the heartbeat, byte for byte."""
    return {key: store.get(key) for key in store.list() if key != HEARTBEAT}


def assert_restores(store: Store, id: ManifestId) -> None:
    """Check every byte of a checkpoint against the checksums, and every row against the reference."""
    (verified,) = verify(store, [id])
    assert verified.problems == ()
    checkpoint = Checkpoint(store, read_manifest(store, id))
    rows_ND, last_N = bank_of(id.step)
    assert torch.equal(checkpoint.rows("bank"), rows_ND)
    assert torch.equal(checkpoint.rows("bank_last_step"), last_N)
    assert torch.equal(checkpoint.tensors()["w"], torch.full((5,), float(id.step)))


def test_every_checkpoint_is_listed_with_what_its_save_wrote_and_what_it_needs(store):
    reports = [*run_attempt(store, [2, 4, 6]), *run_attempt(store, [8])]
    inventory = take_stock(store)
    assert [(e.id.attempt, e.id.step) for e in inventory.entries] == [(1, 2), (1, 4), (1, 6), (2, 8)]
    assert [entry.own_bytes for entry in inventory.entries] == [report.num_bytes for report in reports]
    assert [entry.num_increments for entry in inventory.entries] == [0, 1, 2, 3]
    assert [entry.base for entry in inventory.entries] == [None, *[ManifestId(1, 2)] * 3]
    tensors = read_manifest(store, ManifestId(2, 8)).tensors
    assert inventory.entries[-1].num_bytes == sum(report.table_bytes for report in reports) + tensors.num_bytes
    assert states(inventory) == {2: State.VALID, 4: State.VALID, 6: State.VALID, 8: State.NEWEST}
    assert (inventory.attempt, inventory.holding, inventory.remains, inventory.strays) == (2, None, (), ())
    assert sum(inventory.sizes.values()) == sum(len(store.get(key)) for key in store.list())


def test_whole_tables_of_their_own_have_no_base(store):
    run_attempt(store, [2, 4], incremental=False)
    assert [(entry.base, entry.num_increments) for entry in take_stock(store).entries] == [(None, 0)] * 2


def test_a_checkpoint_that_lacks_objects_is_incomplete_and_a_restart_takes_the_newest_listed(store):
    run_attempt(store, [2, 4, 6])
    manifest = read_manifest(store, ManifestId(1, 6))
    store.put(manifest.tensors.key, store.get(manifest.tensors.key)[:-1])
    inventory = take_stock(store)
    assert states(inventory) == {2: State.VALID, 4: State.NEWEST, 6: State.INCOMPLETE}
    assert manifest.tensors.key in inventory.entries[-1].problem

    restored = Checkpointer(store, worker=Alone()).restore()
    assert restored is not None
    assert inventory.newest is not None
    assert restored.step == inventory.newest.id.step == 4


def test_a_damaged_base_makes_every_checkpoint_that_needs_it_incomplete(store):
    run_attempt(store, [2, 4, 6])
    store.delete(read_manifest(store, ManifestId(1, 2)).tables["bank"].segments[0].key)
    assert set(states(take_stock(store)).values()) == {State.INCOMPLETE}
    assert take_stock(store).newest is None


def test_what_a_restore_found_damaged_is_on_record(store):
    run_attempt(store, [2, 4])
    damage(store, read_manifest(store, ManifestId(1, 4)).tensors.key)
    assert states(take_stock(store)) == {2: State.VALID, 4: State.NEWEST}, "a listing looks at sizes only"
    run_attempt(store, [5])
    assert states(take_stock(store)) == {2: State.VALID, 4: State.DAMAGED, 5: State.NEWEST}


def test_manifests_of_others_and_of_newer_versions_are_told_apart(store):
    run_attempt(store, [2, 4, 6])
    run_attempt(store, [9])
    leave_orphan(store, 1, 8)
    store.put(ManifestId(1, 2).key, b"{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.manifest.FORMAT", FORMAT + 1)
        store.put(ManifestId(1, 4).key, encode_document(asdict(read_manifest(store, ManifestId(1, 4)))))
    inventory = take_stock(store)
    assert states(inventory) == {
        2: State.UNREADABLE,
        4: State.NEWER,
        6: State.VALID,
        8: State.ORPHAN,
        9: State.NEWEST,
    }
    assert "newer version" in next(entry.problem for entry in inventory.entries if entry.id.step == 4)


def test_torn_saves_are_told_by_save_and_open_only_while_the_run_is_held(tmp_path):
    store = Store(tmp_path)
    run_attempt(store, [2, 4])
    store.put("objects/000001/000000000003-0002/bank/old.bin", b"x" * 10)
    store.put("objects/000001/000000000006-0003/bank/a.bin", b"x" * 100)
    store.put("objects/000001/000000000006-0003/bank/b.bin", b"x" * 23)
    store.put("notes.txt", b"mine")
    with held_by_another_process(store.uri) as process:
        inventory = take_stock(store)
        assert inventory.holding is not None
        assert inventory.holding.holder.pid == process.pid
        assert [(r.step, r.save, r.num_objects, r.num_bytes, r.is_open) for r in inventory.remains] == [
            (3, 2, 1, 10, False),
            (6, 3, 2, 123, True),
        ]
    inventory = take_stock(store)
    assert inventory.holding is None
    assert [remains.is_open for remains in inventory.remains] == [False, False]
    assert inventory.strays == ("notes.txt",)


def test_what_an_increment_needs_of_a_deleted_checkpoint_is_no_remainder(store):
    run_attempt(store, [2, 4, 6], retention=Retention(last=1))
    inventory = take_stock(store)
    assert states(inventory) == {6: State.NEWEST}
    assert inventory.entries[0].base == ManifestId(1, 2)
    assert inventory.remains == ()


class DeletingWhileListed(Store):
    """A run whose training replaces a checkpoint right before the objects are listed."""

    doomed: ManifestId

    def list_sizes(self, prefix=""):
        if prefix == "":
            for stored in read_manifest(self, self.doomed).objects():
                self.delete(stored.key)
            self.delete(self.doomed.key)
        return super().list_sizes(prefix)


def test_a_checkpoint_that_retention_deletes_meanwhile_is_left_out(store):
    run_attempt(store, [2, 4], incremental=False)
    deleting = DeletingWhileListed(store.uri)
    deleting.doomed = ManifestId(1, 2)
    assert states(take_stock(deleting)) == {4: State.NEWEST}


def test_without_records_of_attempts_everything_is_listed_as_unclear_and_nothing_is_removed(store):
    run_attempt(store, [2, 4])
    store.delete("attempts/000001.json")
    store.delete("attempts/000001.start.json")
    inventory = take_stock(store)
    assert states(inventory) == {2: State.UNCLEAR, 4: State.UNCLEAR}
    assert "no record of that attempt" in inventory.problem
    for plan in (plan_prune, plan_after_next_save):
        with pytest.raises(CheckpointError, match="no record of that attempt"):
            plan(store, inventory, Retention(last=1))
    before = contents(store)
    with pytest.raises(CheckpointError, match="no record of that attempt"):
        prune(store, Retention(last=1))
    assert contents(store) == before


def test_checkpoints_of_format_1_are_listed_and_verified_and_pruned(tmp_path):
    shutil.copytree(HERE / "format_1", tmp_path / "run")
    store = Store(tmp_path / "run")
    assert states(take_stock(store)) == {7: State.VALID, 9: State.NEWEST}
    assert [verified.problems for verified in verify(store, read_history(store).chain)] == [(), ()]
    assert all(entry.own_bytes == entry.num_bytes > 0 for entry in take_stock(store).entries)
    plan, done = prune(store, Retention(last=1))
    assert done
    assert [entry.id for entry in plan.deleted] == [ManifestId(1, 7)]
    assert verify(store, read_history(store).chain)[0].problems == ()
    assert not list((tmp_path / "run/objects/000001").rglob("*.bin"))


def test_verifying_names_every_damaged_object_and_reads_what_is_shared_once(store):
    run_attempt(store, [2, 4, 6])
    base, newest = (read_manifest(store, ManifestId(1, step)) for step in (2, 6))
    wrong = {
        base.tables["bank"].segments[0].key: "differs from its checksum",
        base.tables["bank"].segments[1].key: "is missing",
        newest.tables["bank"].increments[1].key: "bytes, expected",
    }
    keys = list(wrong)
    damage(store, keys[0])
    store.delete(keys[1])
    store.put(keys[2], store.get(keys[2]) + b"x")
    counting, told = FaultyStore(store.uri), []
    found = verify(counting, read_history(store).chain, on_progress=lambda *args: told.append(args))
    assert [len(verified.problems) for verified in found] == [2, 2, 3]
    for key, text in wrong.items():
        assert [p for p in found[2].problems if key in p and text in p], (key, found[2].problems)
    read = [key for name, key in counting.log if name == "read_into" and key.startswith("objects/")]
    assert set(read) == {s.key for v in found for s in read_manifest(store, v.id).objects()}
    assert sorted(key for key in set(read) if read.count(key) > 1) == sorted(keys), "what seems damaged is read again"
    assert told[0][0] == 0
    assert (
        told[-1][0]
        == told[-1][1]
        == sum(len(v) for k, v in contents(store).items() if k.startswith("objects/"))
        + (base.tables["bank"].segments[1].num_bytes - 1)
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_called_damaged(store):
    run_attempt(store, [2, 4], incremental=False)

    def on_progress(done: int, total: int) -> None:
        if done == 0:
            for key in (ManifestId(1, 2).key, *store.list(ManifestId(1, 2).objects_prefix)):
                store.delete(key)

    found = verify(store, read_history(store).chain, on_progress=on_progress)
    assert [(verified.id.step, verified.problems) for verified in found] == [(4, ())]


def test_a_file_that_the_disk_does_not_give_is_a_problem_of_its_own(tmp_path):
    store = Store(tmp_path)
    run_attempt(store, [2])
    key = read_manifest(store, ManifestId(1, 2)).tensors.key
    (tmp_path / key).unlink()
    (tmp_path / key).mkdir()
    (verified,) = verify(store, [ManifestId(1, 2)])
    assert len(verified.problems) == 1
    assert key in verified.problems[0]


def test_of_several_checkpoints_of_a_step_the_valid_one_is_chosen(store):
    run_attempt(store, [2, 4, 6])
    damage(store, read_manifest(store, ManifestId(1, 6)).tensors.key)
    run_attempt(store, [6])
    leave_orphan(store, 1, 9)
    leave_orphan(store, 2, 9)
    leave_orphan(store, 2, 11)
    run_attempt(store, [12])
    leave_orphan(store, 1, 13)
    leave_orphan(store, 2, 13)
    history = read_history(store)
    assert choose(history, store.uri) == ManifestId(3, 12)
    assert choose(history, store.uri, step=6) == ManifestId(2, 6)
    assert choose(history, store.uri, step=6, attempt=1) == ManifestId(1, 6)
    assert choose(history, store.uri, step=13, attempt=1) == ManifestId(1, 13)
    assert choose(history, store.uri, attempt=2) == ManifestId(2, 11)
    with pytest.raises(CheckpointError, match=r"step 13 \(attempt 1\), step 13 \(attempt 2\).*say which attempt"):
        choose(history, store.uri, step=13)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; expected one of step 4 \(attempt 1\), step 6"):
        choose(history, store.uri, step=5)


retentions = st.builds(
    Retention,
    last=st.integers(1, 4),
    every_steps=st.none() | st.integers(1, 8),
    best=st.none() | st.just("knn_top1"),
)


def kept_by_the_rules(steps: list[int], retention: Retention) -> set[int]:
    """The three rules, written down once more."""
    kept = set(steps[len(steps) - min(len(steps), retention.last) :])
    if retention.every_steps is not None:
        for multiple in range(0, max(steps) + 1, retention.every_steps):
            at_or_after = [step for step in steps if multiple <= step < multiple + retention.every_steps]
            kept.update(at_or_after[:1])
    if retention.best is not None:
        kept.add(max(steps, key=lambda step: (metrics_of(step)["knn_top1"], step)))
    return kept


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attempts=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=3),
    incremental=st.booleans(),
    orphans=st.booleans(),
    torn=st.booleans(),
    retention=retentions,
)
def test_after_any_prune_exactly_what_the_rules_keep_is_there_and_restores(
    attempts, incremental, orphans, torn, retention
):
    store, step, steps = Store(f"memory://{uuid.uuid4().hex}"), 0, []
    for strides in attempts:
        mine = []
        for stride in strides:
            step += stride
            mine.append(step)
        run_attempt(store, mine, incremental=incremental)
        steps += mine
    run_attempt(store, [step + 1])
    steps.append(step + 1)
    if torn:
        for number in range(1, len(attempts) + 2):
            store.put(f"objects/{number:06d}/{step + 9:012d}-0099/bank/x.bin", b"torn")
    if orphans:
        leave_orphan(store, 1, step + 50)
    plan, done = prune(store, retention)
    expected = kept_by_the_rules(steps, retention)
    inventory = take_stock(store)
    assert {entry.id.step for entry in inventory.entries} == {entry.id.step for entry in plan.kept} == expected
    assert done == (orphans or torn or len(expected) < len(steps))
    for entry in inventory.entries:
        assert_restores(store, entry.id)
    needed = {stored.key for entry in inventory.entries for stored in read_manifest(store, entry.id).objects()}
    assert set(store.list("objects/")) == needed, "neither more nor less than what the kept ones need"
    checkpointer = begin(store)
    save(checkpointer, step + 2)
    checkpointer.close()
    assert_restores(store, read_latest(store).manifest.id)
    MemoryFileSystem.store.clear()


def test_death_between_any_two_operations_of_a_prune_leaves_every_kept_checkpoint(store):
    run_attempt(store, [2, 4, 6])
    run_attempt(store, [8, 9], incremental=False)
    leave_orphan(store, 1, 7)
    before = {key: store.get(key) for key in store.list()}
    complete = FaultyStore(store.uri)
    assert prune(complete, Retention(last=2))[1]
    after = {key for key in store.list() if not key.startswith("attempts/")}
    assert len(complete.log) > 40
    for number in range(len(complete.log)):
        MemoryFileSystem.store.clear()
        for key, data in before.items():
            store.put(key, data)
        with pytest.raises(Killed):
            prune(FaultyStore(store.uri, kill_at=number), Retention(last=2))
        for entry in take_stock(store).chain:
            assert_restores(store, entry.id)
        prune(store, Retention(last=2))
        assert {entry.id.step for entry in take_stock(store).entries} == {8, 9}
        assert {key for key in store.list() if not key.startswith("attempts/")} == after


def test_a_run_that_another_process_trains_is_refused_and_nothing_of_it_changes(tmp_path):
    store = Store(tmp_path)
    run_attempt(store, [2, 4, 6])
    with held_by_another_process(store.uri) as process:
        before = contents(store)
        with pytest.raises(RunHeldError, match=rf"process {process.pid} on .* since 20\d\d-"):
            prune(store, Retention(last=1))
        assert contents(store) == before
    assert prune(store, Retention(last=1))[1], "it ended in order"
    assert take_stock(store).holding is None, "and was released again"


def test_a_run_whose_process_was_killed_is_pruned_at_once(tmp_path):
    store = Store(tmp_path)
    run_attempt(store, [2, 4, 6])
    with held_by_another_process(store.uri) as process:
        os.kill(process.pid, signal.SIGKILL)
    assert take_stock(store).holding is not None
    assert take_stock(store).holding.is_dead
    started_s = time.monotonic()
    assert prune(store, Retention(last=1))[1]
    assert time.monotonic() - started_s < 5


def test_a_training_that_lost_the_run_unawares_commits_nothing_after_a_prune(store):
    zombie = begin(store)
    for step in (2, 4, 6):
        save(zombie, step)
    assert prune(store, Retention(last=1))[1]
    with pytest.raises(SupersededError):
        save(zombie, 8)
    zombie.close()
    assert states(take_stock(store)) == {6: State.NEWEST}
    leave_orphan(store, 1, 8)
    assert states(take_stock(store))[8] is State.ORPHAN, "even what was on its way at that moment"
    assert_restores(store, ManifestId(1, 6))


def test_what_is_committed_while_a_person_thinks_counts_as_the_newest(store):
    zombie = begin(store)
    for step in (2, 4, 6):
        save(zombie, step)

    def agree(plan) -> bool:
        assert [entry.id.step for entry in plan.kept] == [6]
        save(zombie, 8)
        return True

    prune(store, Retention(last=1), agree=agree)
    zombie.close()
    assert states(take_stock(store)) == {8: State.NEWEST}
    assert_restores(store, ManifestId(1, 8))


def test_a_no_changes_nothing(store):
    run_attempt(store, [2, 4, 6])
    before = contents(store)
    plan, done = prune(store, Retention(last=1), agree=lambda plan: False)
    assert not done
    assert [entry.id.step for entry in plan.deleted] == [2, 4]
    assert contents(store) == before
    assert take_stock(store).holding is None


class TakenOver(Store):
    """A store in which another holder takes the run at the first deletions; the later ones take their time."""

    num_deleted = 0

    def delete_many(self, keys):
        super().delete_many(keys)
        self.num_deleted += len(keys)
        if self.num_deleted == len(keys):
            other = replace(Holder.of_this_process(), token="other", host="elsewhere", boot="another")
            document = {"holder": asdict(other), "since": "now", "beats": 1, "released": False, "renewed": "now"}
            self.put(HEARTBEAT, encode_document(document))
        threading.Event().wait(0.1)


def test_a_prune_that_lost_the_run_stops_deleting(store, monkeypatch):
    monkeypatch.setattr("cluster.pruning.BEAT_S", 0.02)
    monkeypatch.setattr("cluster.retention.PIECE", 2)
    run_attempt(store, range(1, 40, 2), incremental=False)
    taken = TakenOver(store.uri)
    with pytest.raises(RunHeldError, match="taken over by another process"):
        prune(taken, Retention(last=1))
    assert taken.num_deleted < 10
    holding = take_stock(store).holding
    assert holding is not None
    assert holding.holder.host == "elsewhere", "what the other wrote was not released"
    assert_restores(store, ManifestId(1, 39))


def test_damaged_and_incomplete_checkpoints_stay_and_do_not_count_unless_they_are_to_go(store):
    run_attempt(store, [2, 4, 6], incremental=False)
    damage(store, read_manifest(store, ManifestId(1, 6)).tensors.key)
    run_attempt(store, [7, 8, 9], incremental=False)
    store.delete(read_manifest(store, ManifestId(2, 9)).tensors.key)
    before = take_stock(store)
    assert states(before)[6] is State.DAMAGED
    assert states(before)[9] is State.INCOMPLETE
    prune(store, Retention(last=1))
    assert states(take_stock(store)) == {6: State.DAMAGED, 8: State.NEWEST, 9: State.INCOMPLETE}
    assert store.exists(read_manifest(store, ManifestId(1, 6)).tables["bank"].segments[0].key)
    prune(store, Retention(last=1), damaged=True)
    assert states(take_stock(store)) == {8: State.NEWEST}
    assert take_stock(store).damaged == ()
    assert_restores(store, ManifestId(2, 8))
    assert take_stock(store).remains == ()


def test_a_manifest_that_cannot_be_read_stops_a_prune_unless_it_is_to_go(store):
    run_attempt(store, [2, 4, 6])
    store.put(ManifestId(1, 4).key, b"{}")
    before = contents(store)
    with pytest.raises(CheckpointError, match=r"not known what the checkpoint of step 4 .*--damaged"):
        prune(store, Retention(last=1))
    assert contents(store) == before
    prune(store, Retention(last=2), damaged=True)
    assert states(take_stock(store)) == {2: State.VALID, 6: State.NEWEST}
    assert_restores(store, ManifestId(1, 6))


def test_a_prune_that_would_leave_nothing_to_go_on_from_is_refused(store):
    run_attempt(store, [2, 4])
    store.delete(read_manifest(store, ManifestId(1, 2)).tables["bank"].segments[0].key)
    before = contents(store)
    for damaged in (False, True):
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* is complete"):
            prune(store, Retention(last=1), damaged=damaged)
    assert contents(store) == before


def test_an_unknown_metric_is_told_with_those_that_there_are(store):
    run_attempt(store, [2, 4])
    with pytest.raises(ValueError, match=r"found 'knn_top', .* expected one of knn_top1"):
        require_metric(take_stock(store), "knn_top")
    require_metric(take_stock(store), "knn_top1")


def test_what_goes_after_the_next_save_is_what_that_save_removes(tmp_path):
    store = Store(tmp_path)
    rules = Retention(last=2, every_steps=4)
    checkpointer = begin(store, retention=rules)
    for step in (2, 4, 6, 8):
        save(checkpointer, step)
    assert take_stock(store).is_held
    plan = plan_after_next_save(store, take_stock(store), rules)
    goes = {entry.id.step for entry in plan.deleted}
    before = {entry.id.step for entry in take_stock(store).entries}
    save(checkpointer, 9)
    checkpointer.close()
    assert before - {entry.id.step for entry in take_stock(store).entries} == goes == {6}
    assert not set(plan.removal.objects) & set(store.list("objects/"))


def test_a_run_that_was_deleted_while_it_trains_ends_its_saves_with_that_cause(store):
    checkpointer = begin(store)
    save(checkpointer, 2)
    MemoryFileSystem.store.clear()
    with pytest.raises(CheckpointError, match="was deleted or moved"):
        save(checkpointer, 4)
    checkpointer.close()
