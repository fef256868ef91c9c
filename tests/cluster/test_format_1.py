"""Runs that the package saved before it had increments and a coordinator: they load and go on.

format_1 is such a store: step 7 by attempt 1 on two ranks and step 9 by attempt 2.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_content import assert_holds, run_saves, save, start
from checkpoint_fakes import ThreadWorker

from cluster.checkpoint import CheckpointError, read_latest
from cluster.store import Store

FORMAT_1 = Path(__file__).parent / "format_1"
LOADS = [None, lambda checkpoint: assert_holds(checkpoint, checkpoint.step)]


@pytest.fixture
def old(tmp_path) -> Store:
    shutil.copytree(FORMAT_1, tmp_path / "run")
    documents = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert [document["format"] for document in documents] == [1] * 4
    return Store(tmp_path / "run")


@pytest.mark.parametrize("load", LOADS)
def test_it_restores(old, load):
    assert_holds(read_latest(old), 9)
    checkpointer, checkpoint = start(old, load=load)
    assert_holds(checkpoint, 9)
    assert checkpointer.warnings == []


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "key", ["objects/000002/000000000009-0001/tensors.safetensors", "manifests/000002-000000000009.json"]
)
def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(old, load, key):
    data = bytearray(old.get(key))
    data[-5] ^= 1
    old.put(key, data)
    checkpointer, checkpoint = start(old, load=load)
    assert_holds(checkpoint, 7)
    assert "step 9 (attempt 2) is damaged and was skipped" in checkpointer.warnings[0]
    assert key in checkpointer.warnings[0]


def test_a_new_attempt_goes_on_from_it_in_the_present_format_and_removes_it_in_its_turn(old):
    checkpointer, _ = start(old, keep_last=2)
    assert save(checkpointer, ThreadWorker(), 12).attempt == 3
    assert json.loads(old.get("manifests/000003-000000000012.json"))["format"] == 2
    assert json.loads(old.get("manifests/000003-000000000012.json"))["parent"] == [2, 9]
    assert_holds(read_latest(old), 12)
    assert old.list("manifests/") == ["manifests/000002-000000000009.json", "manifests/000003-000000000012.json"]

    for reports in run_saves(old, [13, 14], world_size=3, keep_last=2):
        assert [report.attempt for report in reports] == [4, 4]
    assert_holds(read_latest(old), 14)
    assert len(old.list("manifests/")) == 2
    assert {key.split("/")[1] for key in old.list("objects/")} == {"000004"}


@pytest.mark.parametrize("key", ["attempts/000001.json", "attempts/000002.json"])
def test_a_damaged_record_of_an_attempt_is_refused(old, key):
    old.put(key, old.get(key).replace(b'"damaged"', b'"dAmaged"'))
    with pytest.raises(CheckpointError, match=f"put {key} in .* back from a copy"):
        start(old)
