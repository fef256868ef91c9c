"""Whatever becomes of stored bytes: damage is named, the checkpoint before is used, the damaged one is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoint_content import assert_holds, run_saves, save, start
from checkpoint_fakes import InlineCoordination, ThreadWorker, run_group

from cluster.attempts import read_history
from cluster.checkpoint import Checkpointer, CheckpointError, Retention, RowTable, read_latest
from cluster.coordination import CoordinatorService
from cluster.coordinator import Coordinator
from cluster.inventory import take_stock
from cluster.lease import Holder, Lease
from cluster.manifest import ManifestId
from cluster.store import ObjectMissingError, Store
from cluster.verification import verify


def remove(store: Store, key: str) -> None:
    store.delete(key)


def cut(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def empty(store: Store, key: str) -> None:
    store.put(key, b"")


def lengthen(store: Store, key: str) -> None:
    store.put(key, store.get(key) + b"\0")


def flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, data)


DAMAGES = [remove, cut, empty, lengthen, flip]
SAID = {
    remove: "is missing",
    cut: "bytes, expected",
    empty: "bytes, expected",
    lengthen: "bytes, expected",
    flip: "differs from its checksum",
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("where", ["/weights/000000000030", "tensors"])
def test_a_damaged_checkpoint_is_reported_skipped_and_kept_and_the_one_before_is_used(uri, world_size, damage, where):
    store = Store(uri)
    run_saves(store, [10, 20], world_size)
    of_step_20 = ManifestId(1, 20)
    key = next(k for k in store.list(of_step_20.objects_prefix) if where in k)
    damage(store, key)
    kept = [of_step_20.key, *store.list(of_step_20.objects_prefix)]
    coordinator = InlineCoordination(Store(uri), Retention(last=1))

    def work(worker: ThreadWorker):
        checkpointer, checkpoint = start(Store(uri), worker, coordinator=coordinator)
        assert_holds(checkpoint, 10)
        for step in (20, 30):
            save(checkpointer, worker, step)
        return checkpointer.warnings

    warnings = run_group(world_size, work)
    assert all(w == warnings[0] and len(w) == 1 for w in warnings)
    assert warnings[0][0].startswith("the checkpoint of step 20 (attempt 1) is damaged and was skipped: object ")
    assert key in warnings[0][0]
    assert SAID[damage] in warnings[0][0]
    assert set(kept) <= set(store.list())

    checkpointer, checkpoint = start(Store(uri), keep_last=1)
    assert_holds(checkpoint, 30)
    save(checkpointer, ThreadWorker(), 40)
    assert set(kept) <= set(store.list()), "the next attempt keeps it, too"


NUM_ROWS, FIRST, LAST = 120, 4, 11


def bank_after(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank of which each step has written three rows."""
    rows, last = torch.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2), torch.full((NUM_ROWS,), -1, dtype=torch.int32)
    for written in range(1, step + 1):
        places = torch.tensor([(7 * written + i) % NUM_ROWS for i in range(3)])
        rows[places], last[places] = 1000.0 * written, written
    return rows, last


def run_with_everything(uri: str) -> dict[str, bytes]:
    """Two attempts, a base with increments on it, a second driver's heartbeat; return the content of the store."""
    store = Store(uri)
    for steps in (range(1, FIRST + 1), range(FIRST + 1, LAST + 1)):
        lease = Lease(store, Holder.of_this_process())
        service = CoordinatorService(store, Coordinator(store, retention=Retention(last=4)), lease)
        checkpointer, _ = start(store, coordinator=service, block_rows=45)
        for step in steps:
            rows, last = bank_after(step)
            tables = {"bank": RowTable(NUM_ROWS, 0, rows, last), "last": RowTable(NUM_ROWS, 0, last, last)}
            checkpointer.save(step, tables, {"w": torch.full((5,), float(step))}, {"step": step})
        service.close()
    return {key: store.get(key) for key in store.list()}


def assert_is_as_it_was_after(checkpoint, step: int) -> None:
    rows, last = bank_after(step)
    assert checkpoint.state == {"step": step}
    assert torch.equal(checkpoint.rows("bank"), rows)
    assert torch.equal(checkpoint.rows("last"), last)
    assert torch.equal(checkpoint.tensors()["w"], torch.full((5,), float(step)))


def load_all(checkpoint) -> None:
    checkpoint.tensors()
    for name in checkpoint.tables:
        checkpoint.rows(name)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", [None, load_all])
def test_damage_to_any_single_object_is_skipped_or_refused_and_never_restored(uri, damage, load):
    content = run_with_everything(uri)
    assert {key.split("/")[0] for key in content} == {"attempts", "heartbeat.json", "manifests", "objects"}
    chain = [LAST - back for back in range(4)]
    users = {key: [step for step in chain if needs(Store(uri), step, key)] for key in content}
    assert any(key.endswith(".rows") and LAST in steps for key, steps in users.items()), "no increment is needed"
    assert any(key.endswith(".bin") and len(steps) in (2, 3) for key, steps in users.items()), "no base is shared"
    outcomes = []
    for number, key in enumerate(content):
        copy = Store(f"{uri}-{number}")
        for other, data in content.items():
            copy.put(other, data)
        damage(copy, key)
        checkpointer = Checkpointer(copy, worker=ThreadWorker(), coordinator=InlineCoordination(copy))
        # Of attempt 1 there are no manifests any more: nobody needs its record.
        if key == "attempts/000002.start.json":
            with pytest.raises(CheckpointError, match=r"put attempts/000002.start.json"):
                checkpointer.restore(load)
            with pytest.raises(CheckpointError, match=r"put attempts/000002.start.json"):
                read_latest(copy)
            outcomes.append("refused")
        else:
            checkpoint = checkpointer.restore(load)
            newest = max(set(chain) - set(users[key]))
            assert_is_as_it_was_after(checkpoint, newest)
            skipped = [step for step in chain if step > newest]
            is_unlisted = damage is remove and key.startswith("manifests/")
            assert len(checkpointer.warnings) == (0 if is_unlisted else len(skipped))
            assert all(key in warning for warning in checkpointer.warnings)
            checkpointer.begin_attempt()
            checkpointer.save(99, {}, {}, {})
            for step in [] if is_unlisted else skipped:
                assert copy.exists(ManifestId(2, step).key), "kept for inspection"
            outcomes.append("skipped" if skipped else "not needed")
    assert {"refused", "skipped", "not needed"} == set(outcomes)


def needs(store: Store, step: int, key: str) -> bool:
    """Whether a checkpoint cannot be restored without an object, according to its manifest as it was written."""
    id = ManifestId(1 if step <= FIRST else 2, step)
    return key == id.key or (key.startswith("objects/") and f'"{key}"'.encode() in store.get(id.key))


@pytest.mark.parametrize("damage", [cut, empty, lengthen, flip])
def test_a_damaged_manifest_is_named_and_skipped_by_a_reader_too(uri, damage: Callable[[Store, str], None]):
    store = Store(uri)
    run_saves(store, [10, 20])
    damage(store, "manifests/000001-000000000020.json")

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
    assert len(store.list("manifests/")) == 2


class OnceWrong(Store):
    """A store of which the next answer about some key is wrong, be it that a byte is or that it says 404."""

    part, how = "", ""

    def get(self, key, start=None, stop=None):
        data = super().get(key, start, stop)
        if self.is_due(key):
            data = bytes([data[0] ^ 1]) + data[1:]
        return data

    def read_into(self, key, target, start, seen):
        if not self.is_due(key):
            return super().read_into(key, target, start, seen)
        data = bytearray(super().get(key, start, start + len(target)))
        data[0] ^= 1
        target[: len(data)] = data
        seen(data)
        return len(data), False

    def is_due(self, key: str) -> bool:
        is_due = bool(self.part) and self.part in key
        if is_due:
            self.part = ""
            if self.how == "404":
                raise ObjectMissingError(f"{key}: it is not there")
        return is_due


@pytest.mark.parametrize("how", ["flip", "404"])
@pytest.mark.parametrize("part", ["/bank/", "tensors", "manifests/000001-000000000020", "attempts/000001.start.json"])
@pytest.mark.parametrize("load", [None, load_all])
def test_one_wrong_answer_is_no_damage(uri, part, how, load):
    run_saves(Store(uri), [10, 20])
    store = OnceWrong(uri)
    store.part, store.how = part, how
    checkpointer, checkpoint = start(store, load=load)
    assert not store.part, "the answer was wrong"
    assert (checkpoint.step, checkpointer.warnings) == (20, [])
    store.part = part
    assert verify(store, read_history(store).chain)[1].problems == ()
    store.part = part
    assert not take_stock(store).problem


def test_what_passes_marks_nothing_for_good(uri):
    """A gateway that answers 404 for as long as a restore looks: the next one finds the checkpoint intact."""
    run_saves(Store(uri), [10, 20])
    hidden = Store(uri).get("manifests/000001-000000000020.json")
    Store(uri).put("manifests/000001-000000000020.json", b"")
    _, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 10)
    Store(uri).put("manifests/000001-000000000020.json", hidden)

    checkpointer, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 20)
    assert checkpointer.warnings == []
    assert read_history(Store(uri)).damaged == ()
    save(checkpointer, ThreadWorker(), 30)
    assert [id.step for id in read_history(Store(uri)).chain] == [10, 20, 30]


def test_what_was_saved_since_is_not_given_up_for_what_was_unreadable_then(uri):
    run_saves(Store(uri), [10, 20])
    hidden = Store(uri).get("manifests/000001-000000000020.json")
    Store(uri).put("manifests/000001-000000000020.json", b"")
    checkpointer, _ = start(Store(uri))
    save(checkpointer, ThreadWorker(), 15)
    Store(uri).put("manifests/000001-000000000020.json", hidden)
    _, checkpoint = start(Store(uri))
    assert_holds(checkpoint, 15)
    assert Store(uri).get("manifests/000001-000000000020.json") == hidden, "it stays for inspection"
