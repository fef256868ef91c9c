"""Which checkpoints are kept, and that removing the others never endangers those."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

import pytest
import torch
from checkpoint_content import assert_holds, run_saves, save, start
from checkpoint_fakes import FaultyStore, InlineCoordination, ThreadWorker
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoint import Checkpoint, Retention, RowTable, read_latest
from cluster.coordination import CoordinatorService
from cluster.coordinator import Coordinator
from cluster.inventory import State, take_stock
from cluster.lease import Holder, Lease
from cluster.manifest import Manifest, ManifestId, read_manifest
from cluster.retention import plan_removal, remove
from cluster.store import ObjectMissingError, Store, StoreError

chains = st.lists(st.integers(0, 99), unique=True).map(sorted).map(lambda steps: [ManifestId(1, s) for s in steps])


@given(chains, st.integers(1, 8))
def test_retention_keeps_the_last_n_and_gives_up_the_rest(chain, last):
    kept, deletable = Retention(last=last).keep(chain)
    assert deletable + kept == chain
    assert len(kept) == min(last, len(chain))


@given(chains, st.integers(1, 3), st.integers(1, 30))
def test_retention_keeps_the_first_at_or_after_each_multiple(chain, last, every):
    kept, deletable = Retention(last=last, every_steps=every).keep(chain)
    assert sorted(kept + deletable) == chain
    for multiple in range(0, 100, every):
        of_period = [id for id in chain if multiple <= id.step < multiple + every]
        assert set(of_period[:1]) <= set(kept)
        assert not set(of_period[1:]) & set(kept) - set(chain[-last:])


@given(chains, st.data(), st.integers(1, 3))
def test_retention_keeps_the_best_and_of_several_the_newest(chain, data, last):
    values = {id: data.draw(st.sampled_from([0.0, 0.5, 1.0]), label=str(id)) for id in chain}
    kept, deletable = Retention(last=last, best="knn").keep(chain, {id: {"knn": v} for id, v in values.items()})
    best = [id for id in chain if values[id] == max(values.values())]
    assert sorted(kept + deletable) == chain
    assert set(kept) == set(chain[-last:]) | set(best[-1:])


@given(chains, st.data())
def test_where_less_is_better_the_lowest_is_kept_and_what_is_not_finite_is_no_value(chain, data):
    drawn = st.sampled_from([0.25, 0.5, float("nan"), float("-inf"), float("inf"), None])
    values = {id: data.draw(drawn, label=str(id)) for id in chain}
    metrics = {id: {} if value is None else {"loss": value} for id, value in values.items()}
    kept, _ = Retention(last=1, best="loss", lower_is_better=True).keep(chain, metrics)
    best = [id for id in chain if values[id] == 0.25] or [id for id in chain if values[id] == 0.5]
    assert set(kept) == set(chain[-1:]) | set(best[-1:])


@pytest.mark.parametrize("rule", [{"last": 0}, {"every_steps": 0}])
def test_retention_refuses_to_keep_nothing(rule):
    with pytest.raises(ValueError, match=r"retention: found .*, expected at least 1"):
        Retention(**rule)


def test_the_last_checkpoints_stay_and_everything_else_goes(tmp_path):
    store = Store(tmp_path)
    run_saves(store, [1, 2], keep_last=2)
    run_saves(store, [3, 4], world_size=2, keep_last=2)
    assert store.list("manifests/") == ["manifests/000002-000000000003.json", "manifests/000002-000000000004.json"]
    assert {key.split("/")[2] for key in store.list("objects/")} == {"000000000003-0001", "000000000004-0002"}
    assert sorted(path.name for path in tmp_path.glob("objects/*/*")) == ["000000000003-0001", "000000000004-0002"]


def test_a_run_keeps_what_its_three_rules_name(uri):
    store = Store(uri)
    retention = Retention(last=1, every_steps=10, best="knn")
    checkpointer, _ = start(store, coordinator=InlineCoordination(store, retention))
    for step in range(1, 26):
        rows = torch.full((4, 1), float(step))
        metrics = {"knn": 1.0 if step == 17 else 0.5}
        checkpointer.save(step, {"t": RowTable(4, 0, rows)}, {}, {"step": step}, metrics if step % 2 else None)
    kept = [ManifestId.from_key(key).step for key in store.list("manifests/")]
    assert kept == [1, 10, 17, 20, 25]
    assert {int(key.split("/")[2][:12]) for key in store.list("objects/")} == set(kept)


def test_retention_does_not_touch_what_later_attempts_write(uri):
    zombie, _ = start(Store(uri), keep_last=1)
    save(zombie, ThreadWorker(), 10)
    successor, _ = start(Store(uri))
    save(successor, ThreadWorker(), 20)
    of_successor = [*Store(uri).list("manifests/000002"), *Store(uri).list("objects/000002")]

    history = [ManifestId(1, 10), ManifestId(2, 20)]
    removal = plan_removal(
        Store(uri), attempt=1, save=99, chain=[], manifests=history, damaged=[], retention=Retention(last=1)
    )
    assert history[0] in removal.manifests
    remove(Store(uri), removal)
    assert Store(uri).list("manifests/") + Store(uri).list("objects/") == of_successor


def test_retention_does_not_touch_a_save_that_is_on_its_way(uri):
    run_saves(Store(uri), [1, 2], keep_last=1)
    Store(uri).put("objects/000001/000000000003-0003/bank/0.bin", b"on its way")
    Store(uri).put("objects/000001/000000000001-0001/bank/0.bin", b"left behind")
    chain = [ManifestId(1, 2)]
    removal = plan_removal(
        Store(uri), attempt=1, save=2, chain=chain, manifests=chain, damaged=[], retention=Retention(last=1)
    )
    assert removal.manifests == []
    assert removal.objects == ["objects/000001/000000000001-0001/bank/0.bin"]


def test_a_failure_to_remove_older_checkpoints_is_a_warning(uri):
    class Undeletable(Store):
        def delete_many(self, keys):
            raise StoreError("cannot delete: no permission")

    checkpointer, _ = start(Undeletable(uri), keep_last=1)
    save(checkpointer, ThreadWorker(), 1)
    save(checkpointer, ThreadWorker(), 2)
    assert checkpointer.warnings == ["older checkpoints were not removed: cannot delete: no permission"]
    assert_holds(read_latest(Store(uri)), 2)


def test_a_base_stays_as_long_as_an_increment_needs_it_and_goes_when_nothing_does(uri):
    store = Store(uri)
    bases_seen = set()
    rows, last = torch.zeros(100, 4), torch.full((100,), -1, dtype=torch.int32)
    checkpointer, _ = start(store, keep_last=2, block_rows=30)
    for step in range(1, 120):
        rows[step % 100], last[step % 100] = float(step), step
        checkpointer.save(step, {"bank": RowTable(100, 0, rows, last)}, {}, {})
        checkpoint = read_latest(store)
        assert torch.equal(checkpoint.rows("bank"), rows)
        manifests = store.list("manifests/")
        assert len(manifests) == min(2, step)
        named = {stored.key for key in manifests for stored in manifest_under(store, key).objects()}
        assert set(store.list("objects/")) == named, "everything that is needed and nothing else"
        bases_seen.add(checkpoint.tables["bank"].segments[0].key)
    assert len(bases_seen) > 2
    assert not store.exists(min(bases_seen))


def manifest_under(store: Store, key: str) -> Manifest:
    return Manifest.from_bytes(store.get(key), key)


def test_a_checkpoint_that_is_kept_for_its_metric_keeps_its_base(uri):
    store = Store(uri)
    checkpointer, _ = start(store, coordinator=InlineCoordination(store, Retention(last=1, best="knn")), block_rows=30)
    rows, last = torch.zeros(100, 4), torch.full((100,), -1, dtype=torch.int32)
    then = None
    for step in range(1, 80):
        rows[step], last[step] = float(step), step
        metrics = {"knn": 1.0 if step == 5 else 0.1}
        checkpointer.save(step, {"bank": RowTable(100, 0, rows, last)}, {}, {}, metrics)
        then = rows.clone() if step == 5 else then
    best = manifest_under(store, ManifestId(1, 5).key)
    assert best.tables["bank"].increments, "it needs a base"
    newest = manifest_under(store, store.list("manifests/")[-1])
    assert best.tables["bank"].segments != newest.tables["bank"].segments, "nothing else needs that base"
    assert torch.equal(Checkpoint(store, best).rows("bank"), then)


def count(store: FaultyStore, name: str, part: str) -> int:
    return sum(name == found and part in key for found, key in store.log)


@given(st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_what_a_manifest_says_is_read_once_however_many_are_kept(last, every):
    store = FaultyStore(f"memory://{uuid.uuid4().hex}")
    rules = Retention(last=last, every_steps=every, best="knn")
    checkpointer, _ = start(store, coordinator=InlineCoordination(store, rules))
    for step in range(1, 30):
        store.log.clear()
        checkpointer.save(step, {}, {}, {}, {"knn": 1.0})
        # Whether it is there already, as after a restart of the coordinator.
        assert count(store, "get", "manifests/") == 1
    MemoryFileSystem.store.clear()


def test_keeping_ten_thousand_looks_at_each_of_them_once():
    chain = [ManifestId(1, step) for step in range(10_000)]
    looks = 0

    class Counted(dict):
        def __contains__(self, name):
            nonlocal looks
            looks += 1
            return super().__contains__(name)

    metrics = {id: Counted(knn=1.0) for id in chain}
    started_s = time.process_time()
    kept, _ = Retention(last=3, every_steps=1, best="knn").keep(chain, metrics)
    assert (len(kept), looks) == (10_000, 10_000)
    assert time.process_time() - started_s < 1


def test_a_save_is_told_before_anything_is_removed_and_the_next_one_need_not_wait(uri):
    """A removal that never ends: training goes on, and nobody is kept from ending."""
    going_on, started = threading.Event(), threading.Event()

    class Slow(Store):
        def delete_many(self, keys):
            started.set()
            going_on.wait(60)
            super().delete_many(keys)

    store = Slow(uri)
    coordinator = Coordinator(store, retention=Retention(last=1))
    service = CoordinatorService(store, coordinator, Lease(store, Holder.of_this_process()))
    checkpointer, _ = start(store, coordinator=service)
    try:
        for step in (1, 2, 3, 4):
            assert save(checkpointer, ThreadWorker(), step).step == step
        assert started.wait(60)
        assert store.list("manifests/")[0].endswith("000000000001.json"), "nothing was removed yet"
    finally:
        going_on.set()
    service.close()
    assert [ManifestId.from_key(key).step for key in Store(uri).list("manifests/")] == [4]
    assert {int(key.split("/")[2][:12]) for key in Store(uri).list("objects/")} == {4}


def test_a_removal_ends_in_the_middle_for_whoever_must_end_and_the_next_one_finds_the_rest(uri, monkeypatch):
    monkeypatch.setattr("cluster.retention.PIECE", 2)
    monkeypatch.setattr("cluster.coordination.REMOVAL_TIMEOUT_S", 0.0)
    is_held, going_on = threading.Event(), threading.Event()

    class Slow(Store):
        def delete_many(self, keys):
            super().delete_many(keys)
            if keys[0].startswith("objects/"):
                is_held.set()
                going_on.wait(60)

    store = Slow(uri)
    coordinator = Coordinator(store, retention=Retention(last=1))
    service = CoordinatorService(store, coordinator, Lease(store, Holder.of_this_process()))
    checkpointer, _ = start(store, coordinator=service)
    for step in (1, 2):
        save(checkpointer, ThreadWorker(), step)
    assert is_held.wait(60)
    service.close()
    going_on.set()
    left = [key for key in Store(uri).list("objects/") if "/000000000001-" in key]
    assert len(left) > 2
    checkpointer, _ = start(Store(uri), keep_last=1)
    save(checkpointer, ThreadWorker(), 3)
    assert {int(key.split("/")[2][:12]) for key in Store(uri).list("objects/")} == {3}


def growing(store: Store, retention: Retention) -> Callable[..., list[str]]:
    """Begin an attempt; return a function that saves a step, as an increment or a base, and returns what is told."""
    checkpointer, _ = start(store, coordinator=InlineCoordination(store, retention), block_rows=10)
    rows, last = torch.zeros(100, 4), torch.full((100,), -1, dtype=torch.int32)

    def save_step(step: int, metric: float = 0.0, *, is_base: bool = False) -> list[str]:
        rows[step], last[step] = float(step), step
        if is_base:
            checkpointer._growth = None
        checkpointer.save(step, {"bank": RowTable(100, 0, rows, last)}, {"w": torch.zeros(1)}, {}, {"knn": metric})
        told = list(checkpointer.warnings)
        checkpointer.warnings.clear()
        return told

    return save_step


@pytest.mark.parametrize("rules", [Retention(last=2, best="knn"), Retention(last=2, every_steps=2)])
@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_what_a_checkpoint_may_need_whose_manifest_cannot_be_read_stays_and_is_told(uri, rules, damage):
    store = Store(uri)
    growing(store, rules)(1)
    save_step = growing(store, rules)
    for step, metric in ((2, 9.0), (3, 2.0), (4, 3.0)):
        save_step(step, metric, is_base=step == 3)
    key = ManifestId(2, 2).key
    good = store.get(key)
    before = set(store.list("objects/"))

    # A coordinator that knows nothing from earlier.
    class Unreadable(Store):
        def get(self, key_of, start=None, stop=None):
            if key_of == key and damage is None:
                raise ObjectMissingError(f"{key}: it is not there")
            return super().get(key_of, start, stop)

    if damage is not None:
        store.put(key, damage)
    told = growing(Unreadable(uri), rules)(5, 4.0)
    store.put(key, good)
    assert len(told) == 1
    assert "nothing as old as the checkpoint of step 2 (attempt 2) was removed" in told[0]
    assert {object for object in before if "/000002/000000000002-" in object or "/000001/" in object} <= set(
        store.list("objects/")
    )
    checkpoint = Checkpoint(store, read_manifest(store, ManifestId(2, 2)))
    assert checkpoint.rows("bank")[2].tolist() == [2.0] * 4
    # With the manifest back everything goes as the rules say.
    assert growing(store, rules)(6, 5.0) == []
    assert all(entry.state in (State.VALID, State.NEWEST) for entry in take_stock(store).entries)


def test_the_only_checkpoint_loses_nothing_where_its_manifest_cannot_be_read_back(uri):
    key = ManifestId(1, 2).key

    class Hidden(Store):
        def get(self, key_of, start=None, stop=None):
            if key_of == key:
                raise ObjectMissingError(f"{key}: it is not there")
            return super().get(key_of, start, stop)

    save_step = growing(Hidden(uri), Retention(last=1))
    save_step(1)
    save_step(2)
    assert [entry.state for entry in take_stock(Store(uri)).entries] == [State.NEWEST]
    assert read_latest(Store(uri)).rows("bank")[2].tolist() == [2.0] * 4
