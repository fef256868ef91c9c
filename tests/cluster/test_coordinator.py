"""The coordinator: whatever comes late, twice or in another order, and however often it is started again."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from checkpoint_content import share
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.attempts import read_history, win_number
from cluster.checkpoint import SupersededError, read_latest
from cluster.checkpoint_reader import verify_share
from cluster.checkpoint_writer import write_part
from cluster.commits import SaveId
from cluster.coordinator import COLLECTING, COMMITTED, FAILED, SUPERSEDED, Coordinator
from cluster.manifest import ManifestId
from cluster.retention import Retention
from cluster.snapshot import SnapshotTaker
from cluster.store import Store
from cluster.uploads import Pace


def part(store: Store, id: SaveId, rank: int, world_size: int) -> dict:
    """Write a rank's part of a save as a worker does."""
    rows = torch.full((7, 2), float(id.step))
    tensors = {"w": torch.tensor([id.step])} if rank == 0 else None
    snapshot = SnapshotTaker().take(id.step, share({"t": rows}, rank, world_size), tensors, {"step": id.step}, {})
    written = write_part(store, id.prefix, snapshot, since=None, block_rows=3, num_threads=1, pace=Pace())
    return {"part": written}


def begin(coordinator: Coordinator) -> int:
    begun = coordinator.begin_attempt()
    parent = list(begun["chain"][-1]) if begun["chain"] else None
    coordinator.start_attempt(begun["attempt"], parent, [])
    return begun["attempt"]


def say(coordinator: Coordinator, id: SaveId, rank: int, world_size: int, message: dict) -> dict:
    return coordinator.acknowledge(id.attempt, id.step, id.number, rank, world_size, message)


# What happens to a save of several ranks: a rank says its part (again), the coordinator works, or is started again.
events = st.lists(
    st.tuples(st.just("say"), st.integers(0, 2)) | st.tuples(st.sampled_from(["work", "restart"]), st.just(0)),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(events, min_size=1, max_size=3), st.integers(1, 3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_every_rank_gets_the_same_answer_in_any_order_and_however_often_the_coordinator_starts_again(
    histories, world_size, failures
):
    uri = f"memory://{uuid.uuid4().hex}"
    store = Store(uri)
    coordinator = Coordinator(store, retention=Retention(last=2))
    attempt = begin(coordinator)
    committed = 0
    try:
        for number, history in enumerate(histories, 1):
            id = SaveId(attempt, number, number)
            messages = [part(store, id, rank, world_size) for rank in range(world_size)]
            if failures[number - 1]:
                messages[-1] = {"error": "the disk is full", "permanent": True}
            told: dict[int, str] = {}
            # A rank that has its answer says nothing more; in the end everybody who has none goes on asking.
            eventually = [("say", rank) for rank in range(world_size)] + [("work", 0)]
            for name, rank in [*history, *2 * eventually]:
                if name == "restart" and not failures[number - 1]:
                    coordinator = Coordinator(store, retention=Retention(last=2))
                elif name == "work":
                    while coordinator.work():
                        pass
                elif name == "say" and rank < world_size and rank not in told:
                    state = say(coordinator, id, rank, world_size, messages[rank])
                    if state["state"] != COLLECTING:
                        told[rank] = state["state"]
            assert told == dict.fromkeys(range(world_size), FAILED if failures[number - 1] else COMMITTED)
            committed = committed if failures[number - 1] else number
            checkpoint = read_latest(store)
            assert (checkpoint.step if checkpoint else 0) == committed
            for visible in read_history(store).chain:
                assert verify_share(store, visible, 0, 1, 1)[1] == []
    finally:
        MemoryFileSystem.store.clear()


def test_the_rank_that_missed_the_answer_gets_it_from_a_coordinator_that_was_started_again(uri):
    store = Store(uri)
    first = Coordinator(store)
    id = SaveId(begin(first), 5, 1)
    messages = [part(store, id, rank, 2) for rank in (0, 1)]
    for rank in (0, 1):
        say(first, id, rank, 2, messages[rank])
    assert first.work()
    told = say(first, id, 0, 2, messages[0])
    assert told["state"] == COMMITTED

    second = Coordinator(store)
    assert say(second, id, 1, 2, messages[1])["state"] == COLLECTING
    assert second.work()
    answer = say(second, id, 1, 2, messages[1])
    assert answer["state"] == COMMITTED
    figures = ("num_bytes", "table_bytes", "is_base", "growth")
    assert {name: answer[name] for name in figures} == {name: told[name] for name in figures}
    assert told["num_bytes"] == sum(size for _, size in store.list_sizes(id.prefix))


def test_a_save_of_which_a_part_is_missing_is_not_committed_by_a_restart(uri):
    store = Store(uri)
    id = SaveId(begin(Coordinator(store)), 5, 1)
    message = part(store, id, 1, 2)
    for _ in range(3):
        coordinator = Coordinator(store)
        say(coordinator, id, 1, 2, message)
        assert not coordinator.work()
        assert say(coordinator, id, 1, 2, message)["state"] == COLLECTING
    assert read_latest(store) is None
    say(coordinator, id, 0, 2, part(store, id, 0, 2))
    assert coordinator.work()
    assert read_latest(store).step == 5


def test_a_failure_ends_a_save_at_once_and_names_every_rank_that_failed(uri):
    coordinator = Coordinator(Store(uri))
    id = SaveId(begin(coordinator), 5, 1)
    say(coordinator, id, 2, 3, {"error": "no network", "permanent": False})
    say(coordinator, id, 0, 3, {"error": "the disk is full", "permanent": True})
    assert coordinator.work()
    assert coordinator.state_of(id.attempt, id.step, id.number) == {
        "state": FAILED, "error": "rank 0: the disk is full; rank 2: no network", "permanent": True,
    }  # fmt: skip
    late = say(coordinator, id, 1, 3, part(Store(uri), id, 1, 3))
    assert late["state"] == FAILED
    assert not coordinator.work()


def test_what_an_older_attempt_says_is_answered_with_superseded(uri):
    store = Store(uri)
    coordinator = Coordinator(store)
    old = SaveId(begin(coordinator), 5, 1)
    new = begin(coordinator)
    assert say(coordinator, old, 0, 1, part(store, old, 0, 1))["state"] == SUPERSEDED
    assert not coordinator.work()
    assert not coordinator.is_superseded()
    begin(Coordinator(store))
    assert coordinator.is_superseded()
    later = SaveId(new, 5, 1)
    say(coordinator, later, 0, 1, part(store, later, 0, 1))
    coordinator.work()
    assert coordinator.state_of(new, 5, 1)["state"] == SUPERSEDED
    with pytest.raises(SupersededError):
        coordinator.start_attempt(new, None, [])


def test_a_coordinator_that_wins_a_number_does_not_take_its_own_for_a_newer_attempt(uri):
    class SlowStore(Store):
        """A storage that answers late: others look at what was written before its writer knows that it was."""

        def claim(self, key, data):
            won = super().claim(key, data)
            looks.append(coordinator.is_superseded())
            return won

        def list(self, prefix):
            if coordinator.attempt:
                looks.append(prefix)
            return super().list(prefix)

    looks: list = []
    coordinator = Coordinator(SlowStore(uri))
    begin(coordinator)
    begin(coordinator)
    assert True not in looks
    assert looks.count("attempts/") > 3
    looks.clear()
    win_number(Store(uri))
    assert coordinator.is_superseded()


@pytest.mark.parametrize(
    "message", [{"part": {}}, {"part": {"tables": 3, "since": None}}, {"part": None}, {}, {"x": 1}]
)
def test_a_message_that_makes_no_sense_fails_its_save_and_not_the_coordinator(uri, message):
    store = Store(uri)
    coordinator = Coordinator(store)
    attempt = begin(coordinator)
    say(coordinator, SaveId(attempt, 5, 1), 0, 1, message)
    assert coordinator.work()
    assert coordinator.state_of(attempt, 5, 1)["state"] == FAILED
    assert store.list("manifests/") == []
    id = SaveId(attempt, 6, 2)
    say(coordinator, id, 0, 1, part(store, id, 0, 1))
    coordinator.work()
    assert coordinator.state_of(attempt, 6, 2)["state"] == COMMITTED
    assert read_latest(store).step == 6


@pytest.mark.parametrize("lack", ["snapshot_s", "write_s", "since", "metrics", "state"])
@pytest.mark.parametrize("odd", [None, [1], "x"])
def test_a_save_is_not_told_to_have_failed_for_a_part_of_which_a_manifest_was_written(uri, lack, odd):
    store = Store(uri)
    coordinator = Coordinator(store)
    id = SaveId(begin(coordinator), 5, 1)
    message = part(store, id, 0, 1)
    message["part"][lack] = odd
    say(coordinator, id, 0, 1, message)
    assert coordinator.work()
    told = coordinator.state_of(id.attempt, 5, 1)["state"]
    assert told == (COMMITTED if (lack, odd) == ("since", None) else FAILED)
    assert len(store.list("manifests/")) == (told == COMMITTED)


def test_the_coordinator_uses_no_torch_collectives():
    import cluster.coordination
    import cluster.coordinator
    import cluster.local_coordinator

    for module in (cluster.coordinator, cluster.coordination, cluster.local_coordinator):
        assert "distributed" not in Path(module.__file__).read_text()


def test_ids_of_saves_sort_in_the_order_of_saves():
    assert SaveId(1, 9, 9) < SaveId(1, 10, 1) < SaveId(2, 1, 1)
    assert SaveId(2, 3, 4).prefix == "objects/000002/000000000003-0004"
    assert SaveId(2, 3, 4).manifest == ManifestId(2, 3)
