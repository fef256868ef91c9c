"""Attempts: a number is won once and fences older ones, and records that vanished are never taken for an empty run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from checkpoint_content import assert_holds, run_saves, save, start
from checkpoint_fakes import FaultyStore, InlineCoordination, ThreadWorker

from cluster.attempts import read_history, record_start, win_number
from cluster.checkpoint import Checkpointer, CheckpointError, Retention, SupersededError, read_latest
from cluster.manifest import ManifestId
from cluster.store import Store


def begun(store: Store, keep_last: int = 3) -> Checkpointer:
    """A checkpointer that has won a number and restored, and not started."""
    checkpointer = Checkpointer(
        store, worker=ThreadWorker(), coordinator=InlineCoordination(store, Retention(last=keep_last)), block_rows=5
    )
    checkpointer.restore()
    return checkpointer


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


def test_a_number_that_was_won_fences_the_older_attempt_before_the_new_one_has_started(uri):
    zombie, _ = start(Store(uri))
    save(zombie, ThreadWorker(), 10)
    successor = begun(Store(uri))
    with pytest.raises(SupersededError, match="attempt 1 was left behind by attempt 2"):
        save(zombie, ThreadWorker(), 20)
    successor.begin_attempt()
    assert_holds(read_latest(Store(uri)), 10)


def test_an_attempt_that_died_before_it_started_hides_nothing(uri):
    run_saves(Store(uri), [10])
    begun(Store(uri))
    assert_holds(read_latest(Store(uri)), 10)
    successor, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 10)
    save(successor, ThreadWorker(), 11)
    assert read_latest(Store(uri)).attempt == 3


def test_a_zombie_that_commits_at_the_worst_moment_stays_invisible(uri):
    zombie, _ = start(Store(uri))
    save(zombie, ThreadWorker(), 10)
    successor, _ = start(Store(uri))
    records = {key: Store(uri).get(key) for key in Store(uri).list("attempts/000002")}
    assert len(records) == 2
    for key in records:
        Store(uri).delete(key)
    save(zombie, ThreadWorker(), 20)
    for key, record in records.items():
        Store(uri).put(key, record)

    assert_holds(read_latest(Store(uri)), 10)
    save(successor, ThreadWorker(), 15)
    assert_holds(read_latest(Store(uri)), 15)
    assert not Store(uri).exists(ManifestId(1, 20).key), "an orphan is collected"


class WinsANumberDuringACommit(Store):
    """Another attempt begins right before this store creates a manifest."""

    def create(self, key, data):
        if key.startswith("manifests/"):
            win_number(Store(self.uri))
        return super().create(key, data)


def test_an_attempt_that_is_left_behind_in_the_middle_of_a_commit_does_not_count_on_it(uri):
    run_saves(Store(uri), [10])
    zombie, _ = start(WinsANumberDuringACommit(uri))
    with pytest.raises(SupersededError, match="attempt 2 was left behind by attempt 3"):
        save(zombie, ThreadWorker(), 20)
    record_start(Store(uri), 3, ManifestId(1, 10))
    assert Store(uri).exists(ManifestId(2, 20).key)
    assert_holds(read_latest(Store(uri)), 10)


def test_attempts_that_begin_at_once_have_different_numbers(uri):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: win_number(Store(uri)), range(8)))
    assert sorted(numbers) == list(range(1, 9))


def test_of_attempts_that_begin_at_once_only_the_newest_starts(uri):
    numbers = [win_number(Store(uri)) for _ in range(3)]
    for number in numbers[:2]:
        with pytest.raises(SupersededError, match=f"attempt {number} was left behind by attempt 3"):
            record_start(Store(uri), number, None)
    assert record_start(Store(uri), 3, None) == record_start(Store(uri), 3, None), "said twice, recorded once"
    with pytest.raises(CheckpointError, match="names another checkpoint to start from"):
        record_start(Store(uri), 3, None, [ManifestId(1, 1)])


def test_an_attempt_whose_checkpoint_was_deleted_while_it_began_is_refused(uri):
    alive, _ = start(Store(uri), keep_last=1)
    save(alive, ThreadWorker(), 10)
    late = begun(Store(uri))
    Store(uri).delete(ManifestId(1, 10).key)
    with pytest.raises(CheckpointError, match="was deleted while this attempt began: another process still writes"):
        late.begin_attempt()


@pytest.mark.parametrize(
    ("steps", "missing", "text"),
    [
        (
            [[1]],
            ["attempts/000001.json", "attempts/000001.start.json"],
            "no record of that attempt: the run was changed",
        ),
        ([[1], [2]], ["attempts/000002.json", "attempts/000002.start.json"], "no record of that attempt: the run was"),
        ([[1], [2]], ["attempts/000002.start.json"], "no record of that attempt's start: the run was changed by hand"),
        ([[1], [2]], ["attempts/000001.start.json"], "record of attempt 1 cannot be used.*put attempts/000001.start"),
    ],
)
def test_records_that_vanished_are_not_taken_for_a_run_with_less(uri, steps, missing, text):
    for of_attempt in steps:
        run_saves(Store(uri), of_attempt)
    for key in missing:
        Store(uri).delete(key)
    manifests = Store(uri).list("manifests/")
    with pytest.raises(CheckpointError, match=text):
        read_latest(Store(uri))
    with pytest.raises(CheckpointError, match=r"no record of that attempt|cannot be used"):
        start(Store(uri))
    assert Store(uri).list("manifests/") == manifests


def test_a_run_whose_records_vanish_while_it_trains_says_so_at_the_next_save(uri):
    checkpointer, _ = start(Store(uri))
    save(checkpointer, ThreadWorker(), 10)
    records = {key: Store(uri).get(key) for key in Store(uri).list("attempts/")}
    for key in records:
        Store(uri).delete(key)
    with pytest.raises(CheckpointError, match=r"no record of attempt 1, which is running: .* put attempts/ back"):
        save(checkpointer, ThreadWorker(), 20)
    for key, record in records.items():
        Store(uri).put(key, record)
    save(checkpointer, ThreadWorker(), 30)
    assert_holds(read_latest(Store(uri)), 30)


def test_an_empty_run_has_no_history(uri):
    history = read_history(Store(uri))
    assert (history.attempts, history.chain, history.damaged, history.newest) == ({}, [], (), 0)


def test_a_restart_asks_the_storage_for_no_more_however_often_the_run_was_started(uri):
    asked: list[int] = []
    for number in range(1, 31):
        store = FaultyStore(uri)
        checkpointer, _ = start(store, keep_last=3)
        asked.append(sum(name in ("get", "list") for name, _ in store.log))
        save(checkpointer, ThreadWorker(), number)
    assert asked[-1] == asked[9] < 16, asked


def test_attempts_of_which_nothing_is_left_may_be_lost(uri):
    for number in range(1, 6):
        run_saves(Store(uri), [number], keep_last=2)
    for key in ("attempts/000001.start.json", "attempts/000002.start.json"):
        Store(uri).put(key, b"{")
    _, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 5)
    assert [id.step for id in read_history(Store(uri)).chain] == [4, 5]
