"""Why a run's workers were started, counted from the records of its attempts, old records and odd ones among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_checkpoints import Alone, run_attempt, save

from cluster.attempts import read_attempt, read_attempts, read_history, record_start, win_number
from cluster.checkpoint import Checkpointer, Retention
from cluster.manifest import encode_document
from cluster.pruning import prune
from cluster.starts import about_workers, count, starts_of
from cluster.store import Store
from cluster.worker import Cause


def start_for(store: Store, kind: str, workers: int, steps: list[int]) -> None:
    """Let an attempt of so many workers, as it says, save these steps."""
    checkpointer = Checkpointer(store, worker=Alone(), block_rows=16)
    try:
        checkpointer.restore()
        cause = Cause(kind=kind, text=f"for {kind}", since=None if kind == "start" else 1.5)
        checkpointer.begin_attempt(about_workers(workers=workers, host=f"node-{workers}", cause=cause))
        for step in steps:
            save(checkpointer, step)
    finally:
        checkpointer.close()


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path))
    start_for(store, "start", 4, [2, 4])
    start_for(store, "failure", 3, [])  # dies before its first save: on no chain of parents
    start_for(store, "drain", 2, [6])
    start_for(store, "resize", 5, [8])
    start_for(store, "drain", 4, [10])
    return store


def test_restarts_are_counted_by_their_cause_those_that_saved_nothing_included(store):
    starts = starts_of(read_attempts(store))
    assert [(s.attempt, s.workers, s.host, s.from_step, s.kind) for s in starts] == [
        (1, 4, "node-4", 0, "start"),
        (2, 3, "node-3", 4, "failure"),
        (3, 2, "node-2", 4, "drain"),
        (4, 5, "node-5", 6, "resize"),
        (5, 4, "node-4", 8, "drain"),
    ]
    assert starts[1].text == "for failure"
    counts = count(starts)
    assert (counts.restarts, counts.failures, counts.preemptions, counts.resizes) == (4, 1, 2, 1)
    assert count([]).restarts == 0


def test_who_removes_old_checkpoints_starts_no_workers(store):
    _, is_done = prune(store, Retention(last=1))
    assert is_done
    start_for(store, "start", 2, [12])
    attempts = read_attempts(store)
    assert list(attempts) == [1, 2, 3, 4, 5, 6, 7]
    assert [start.attempt for start in starts_of(attempts)] == [1, 2, 3, 4, 5, 7]
    assert count(starts_of(attempts)).restarts == 5


def test_attempts_that_never_started_and_records_that_cannot_be_read_are_left_out(store):
    win_number(store)
    store.put("attempts/000002.start.json", b"not one of ours")
    assert list(read_attempts(store)) == [1, 3, 4, 5]


def test_records_without_a_word_about_workers_are_starts_of_which_nothing_is_known(tmp_path):
    old = Store(str(Path(__file__).parent / "format_1"))
    starts = starts_of(read_attempts(old))
    assert [(s.attempt, s.workers, s.host, s.kind, s.text) for s in starts] == [
        (1, None, "", "", ""),
        (2, None, "", "", ""),
    ]
    assert count(starts).restarts == 1
    store = Store(str(tmp_path))
    run_attempt(store, [3])
    assert starts_of(read_attempts(store))[0].kind == ""


@pytest.mark.parametrize("about", [[], "x", {"cause": 3}, {"workers": "many", "host": None, "cause": {"kind": []}}])
def test_odd_words_about_workers_do_no_harm(tmp_path, about):
    store = Store(str(tmp_path))
    number = win_number(store)
    record_start(store, number, None)
    document = json.loads(store.get("attempts/000001.start.json"))
    del document["sha256"], document["format"]
    store.put("attempts/000001.start.json", encode_document({**document, "about": about}))
    (start,) = starts_of(read_attempts(store))
    assert start.workers is None
    assert count([start, start]).preemptions == 0


def test_records_that_were_read_already_are_not_read_again(store):
    history = read_history(store)
    attempts = read_attempts(store)
    for key in store.list("attempts/"):
        store.put(key, b"gone")
    again = read_history(store, attempts)
    assert (again.chain, again.newest) == (history.chain, history.newest)
    assert again.attempts[5] == attempts[5]


def test_saying_twice_what_an_attempt_is_about_records_it_once(tmp_path):
    store = Store(str(tmp_path))
    number = win_number(store)
    about = about_workers(workers=2, host="a", cause=Cause())
    first = record_start(store, number, None, (), about)
    assert record_start(store, number, None, (), about) == first == read_attempt(store, number)
