"""Which checkpoints are kept, and that removing the others never endangers those."""

from __future__ import annotations

import pytest
import torch
from checkpoint_content import assert_holds, run_saves, save, start
from checkpoint_fakes import InlineCoordination, ThreadWorker
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint import Checkpoint, Retention, RowTable, read_latest
from cluster.manifest import Manifest, ManifestId
from cluster.retention import plan_removal, remove
from cluster.store import Store, StoreError

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
        def delete(self, key):
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
