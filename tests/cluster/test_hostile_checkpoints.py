"""Checkpoints that somebody made to harm whoever loads them, with checksums that fit: nothing of them is executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_content import assert_holds, run_saves, save, start, whole_tables
from checkpoint_fakes import ThreadWorker

import cluster
import dataloading
import instdisc
from cluster.attempts import read_attempts
from cluster.checkpoint import Checkpoint, CheckpointError, RowTable, SaveFailedError, read_latest
from cluster.manifest import encode_document
from cluster.store import Store
from cluster.stored_object import DamagedObjectError, write_object

PATIENCE_S = 5
# What travels between the processes of a run may be pickled (the same person starts both), what is stored may not.
BETWEEN_PROCESSES = {"failures.py", "local_child.py", "local_processes.py", "ray_trainer.py", "ray_worker.py"}
EXECUTING = re.compile(
    r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\.(load|loads|Unpickler|open)\b|(?<!safetensors\.)torch\.load\(|torch\.package"
    r"|allow_pickle\s*=\s*True|(?<![\w.])(eval|exec|__import__)\(|yaml\.(unsafe_)?load\(|np\.load\((?!.*allow_pickle=False)"
)


def test_nothing_in_the_packages_could_execute_what_is_stored():
    found = {}
    for package in (cluster, dataloading, instdisc):
        for path in Path(package.__path__[0]).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines() if EXECUTING.search(line)]
            if lines:
                found[path.name] = lines
    assert set(found) <= BETWEEN_PROCESSES, found
    assert found, "the expression finds what is there"


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "x = pickle.loads(data)", "y = eval(text)", "np.load(f)", "yaml.load(f)", "exec(code)"],
)
def test_the_expression_for_what_executes_finds_it(line):
    assert EXECUTING.search(line)
    assert not EXECUTING.search(line.replace("load", "lode").replace("eval", "model.eval").replace("exec", "m.exec"))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [None, lambda checkpoint: checkpoint.tensors()])
def test_a_pickle_in_place_of_tensors_is_not_executed(tmp_path, load):
    store = Store(tmp_path / "run")
    run_saves(store, [10, 20])
    stored = write_object(
        store, read_latest(store).manifest.tensors.key, [pickle.dumps({"w": Payload(tmp_path / "executed")})]
    )
    rewrite(store, lambda document: document["tensors"].update(num_bytes=stored.num_bytes, checksum=stored.checksum))
    with pytest.raises(
        DamagedObjectError, match=r"tensors.safetensors in .* is not in the safetensors format: .*header"
    ):
        read_latest(store).tensors()
    _, checkpoint = start(store, load=load)
    assert checkpoint.step == (10 if load else 20), "without load nobody has looked into it"
    assert not (tmp_path / "executed").exists()


def rewrite(store: Store, change: Callable[[dict[str, Any]], object], key: str | None = None) -> None:
    """Change a document (the newest manifest) and give it the checksum that fits."""
    key = key or store.list("manifests/")[-1]
    document = json.loads(store.get(key))
    del document["sha256"], document["format"]
    document = change(document) or document
    store.put(key, encode_document(document))


def segment(document: dict[str, Any]) -> dict[str, Any]:
    return document["tables"]["bank"]["segments"][0]


def put_first(document: dict[str, Any], **changes: Any) -> None:
    segment(document).update(changes)


HOSTILE = {
    "a key above the store": lambda d: put_first(d, key="../../etc/passwd"),
    "an absolute key": lambda d: put_first(d, key="/etc/passwd"),
    "a key with a hidden part": lambda d: put_first(d, key="objects/./../../../x"),
    "a key that is a number": lambda d: put_first(d, key=17),
    "a key that is empty": lambda d: put_first(d, key=""),
    "a checksum that is a list": lambda d: put_first(d, checksum=[1]),
    "negative bytes": lambda d: d["tensors"].update(num_bytes=-5),
    "bytes that no memory holds": lambda d: d["tensors"].update(num_bytes=2**70),
    "bytes that are a fraction": lambda d: d["tensors"].update(num_bytes=1.5),
    "bytes that are a text": lambda d: d["tensors"].update(num_bytes="x"),
    "bytes that are true": lambda d: d["tensors"].update(num_bytes=True),
    "rows beyond all numbers": lambda d: d["tables"]["bank"].update(num_rows=10**400),
    "rows that repeat": lambda d: d["tables"]["bank"]["segments"].insert(0, dict(segment(d))),
    "a shape beyond memory": lambda d: d["tables"]["bank"].update(row_shape=[2**40, 2**40]),
    "a negative shape": lambda d: d["tables"]["bank"].update(row_shape=[-6, -1]),
    "a shape that is deep": lambda d: d["tables"]["bank"].update(row_shape=[[[6]]]),
    "a dtype that is an object": lambda d: d["tables"]["bank"].update(dtype="object"),
    "a dtype that is code": lambda d: d["tables"]["bank"].update(dtype="__import__('os').abort()"),
    "an increment without rows": lambda d: add_increment(d, num_rows=0, num_bytes=0),
    "an increment of fewer than no rows": lambda d: add_increment(d, num_rows=-1, num_bytes=-16),
    "an increment of more rows than it spans": lambda d: add_increment(d, num_rows=5, num_bytes=80),
    "an increment of numbers of another kind": lambda d: add_increment(d, index_dtype="object"),
    "an increment outside the table": lambda d: add_increment(d, start=36, stop=39),
    "a table that is a list": lambda d: d.update(tables=[1, 2]),
    "a table that is a text": lambda d: d["tables"].update(bank="x"),
    "a step that is a text": lambda d: d.update(step="20"),
    "a step of another manifest": lambda d: d.update(step=21),
    "a parent that is deep": lambda d: d.update(parent=[[[[1]]]]),
    "a parent of three": lambda d: d.update(parent=[1, 2, 3]),
    "metrics that are texts": lambda d: d.update(metrics={"accuracy": "x"}),
    "metrics that are none": lambda d: d.update(metrics=None),
    "a field of dunder name": lambda d: d.update(__class__="os"),
    "a segment of dunder name": lambda d: put_first(d, __init__="os"),
    "no document at all": lambda d: {"surprise": 1},
    "digests that are a list": lambda d: d.update(digests=[1]),
    "digests that are numbers": lambda d: d.update(digests={"configuration": 1}),
    "versions that are a text": lambda d: d.update(versions="x"),
    "a state that is a list": lambda d: d.update(state=[1]),
    "a save that is a list": lambda d: d.update(save=[1]),
    "a parent of names": lambda d: d.update(parent={"a": 1, "b": 2}),
    "a time that is a list": lambda d: d.update(created=["now"]),
    "a number of rows that is a list": lambda d: d["tables"]["bank"].update(num_rows=[37]),
    "segments by name": lambda d: d["tables"]["bank"].update(segments={"a": 1}),
    "a shape of a hundred dimensions": lambda d: d["tables"]["bank"].update(row_shape=[1] * 100),
    "metrics beyond all numbers": lambda d: d.update(metrics={"accuracy": 10**400}),
    "a parent nested as deep as can be written": lambda d: d.update(parent=nested(900)),
    "a time nested as deep as can be written": lambda d: d.update(created=nested(900)),
}


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def add_increment(document: dict[str, Any], **changes: Any) -> None:
    table = document["tables"]["bank"]
    about = {"key": "objects/000001/x", "num_bytes": 32, "checksum": "xxh3:ab", "start": 3, "stop": 6, "num_rows": 2}
    table["increments"] = [{**about, "index_dtype": "int32", **changes}]


@pytest.mark.parametrize("load", [None, lambda checkpoint: checkpoint.rows("bank") and None])
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_skipped_for_the_checkpoint_before(tmp_path, change, load):
    store = Store(tmp_path / "run")
    run_saves(store, [10, 20])
    rewrite(store, change)
    outside = snapshot_of(tmp_path, "run")
    started_s = time.monotonic()

    assert_holds(read_latest(store), 10)
    load = None if load is None else lambda checkpoint: assert_holds(checkpoint, 10)
    checkpointer, checkpoint = start(store, load=load, keep_last=1)
    assert_holds(checkpoint, 10)
    assert "step 20 (attempt 1) is damaged and was skipped" in checkpointer.warnings[0]
    save(checkpointer, ThreadWorker(), 30)
    assert store.exists("manifests/000001-000000000020.json"), "kept for inspection"
    assert_holds(read_latest(store), 30)
    assert time.monotonic() - started_s < PATIENCE_S
    assert snapshot_of(tmp_path, "run") == outside


def snapshot_of(folder: Path, without: str) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != without
    }


TEXTS = {
    "a document nested a million deep": b"[" * 1_000_000,
    "a state nested a hundred thousand deep": b'{"state":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a number of a million digits": b'{"step": ' + b"9" * 1_000_000 + b"}",
    "not a number": b'{"step": NaN, "sha256": "x", "format": 2}',
    "no object": b"17",
    "no text": bytes(range(256)),
    "nothing": b"",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("key", ["manifests/000001-000000000020.json", "attempts/000001.start.json", "heartbeat.json"])
def test_a_hostile_text_ends_in_an_error_or_the_checkpoint_before_at_once(uri, text, key):
    store = Store(uri)
    run_saves(store, [10, 20])
    store.put(key, text)
    started_s = time.monotonic()
    if key.startswith("attempts/"):
        with pytest.raises(CheckpointError, match=f"put {key} in .* back from a copy"):
            start(store)
    else:
        _, checkpoint = start(store, coordinator=None)
        assert_holds(checkpoint, 10 if key.startswith("manifests/") else 20)
    assert time.monotonic() - started_s < PATIENCE_S


@pytest.mark.parametrize("number", [0, -1, "2", 2.5, True, None, [2], float("nan")])
def test_a_format_that_is_no_number_of_a_format_is_damage(uri, number):
    store = Store(uri)
    run_saves(store, [10, 20])
    key = "manifests/000001-000000000020.json"
    document = json.loads(store.get(key))
    del document["sha256"]
    document["format"] = number
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    store.put(key, json.dumps({**document, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode())
    _, checkpoint = start(store)
    assert_holds(checkpoint, 10)


RECORDS = {
    "a parent of texts": lambda d: d.update(parent=["../../x", "y"]),
    "a parent of one": lambda d: d.update(parent=[1]),
    "a parent in the future": lambda d: d.update(parent=[7, 1]),
    "damaged ones that are texts": lambda d: d.update(damaged=[["../../x", "y"]]),
    "damaged ones that are numbers": lambda d: d.update(damaged=[1]),
    "damaged ones of fractions": lambda d: d.update(damaged=[[1.5, 2]]),
    "another number": lambda d: d.update(number=1),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS.keys())
def test_a_hostile_record_of_an_attempt_is_refused(uri, change):
    store = Store(uri)
    run_saves(store, [10])
    run_saves(store, [20])
    rewrite(store, change, "attempts/000002.start.json")
    with pytest.raises(CheckpointError, match=r"put attempts/000002.start.json in .* back from a copy"):
        start(store)


@pytest.mark.parametrize("numbers", [[5, 5], [6, 5], [4, 7], [-1, 5], [2**31 - 1, 5]])
@pytest.mark.parametrize("load", [False, True])
def test_an_increment_whose_numbers_of_rows_are_wrong_is_damage_where_it_is_read(uri, numbers, load):
    store = Store(uri)
    rows = whole_tables(1)["weights"]
    last = torch.full((37,), 10, dtype=torch.int32)
    checkpointer, _ = start(store)
    checkpointer.save(10, {"t": RowTable(37, 0, rows, last)}, {}, {})
    last[:] = 1
    last[5:7] = 11
    checkpointer.save(11, {"t": RowTable(37, 0, rows, last)}, {}, {})
    table = read_latest(store).tables["t"]
    assert [i.num_rows for i in table.increments] == [2]
    data = bytearray(store.get(table.increments[0].key))
    data[-8:] = b"".join(int(number).to_bytes(4, "little", signed=True) for number in numbers)
    stored = write_object(store, table.increments[0].key, [data])
    rewrite(store, lambda d: d["tables"]["t"]["increments"][0].update(checksum=stored.checksum))

    with pytest.raises(CheckpointError, match="holds other rows than"):
        read_latest(store).rows("t")
    if load:
        checkpointer, checkpoint = start(store, load=lambda checkpoint: checkpoint.rows("t"))
        assert checkpoint.step == 10
        assert "holds other rows than" in checkpointer.warnings[0]


LARGE = 40 * 10**9


def test_objects_that_are_smaller_than_a_manifest_says_take_no_memory_and_are_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.checkpoint_reader._LOOKED_UP_BYTES", 1000)
    store = Store(tmp_path / "run")
    run_saves(store, [10, 20])
    tracemalloc.start()
    try:
        rewrite(store, lambda document: document["tensors"].update(num_bytes=LARGE))
        _, checkpoint = start(store, load=lambda checkpoint: checkpoint.tensors() and None)
        assert checkpoint.step == 10
        store = Store(tmp_path / "another")
        run_saves(store, [10, 20])
        rewrite(store, widen)
        with pytest.raises(DamagedObjectError, match=f"is missing or does not have its {LARGE} bytes"):
            read_latest(store).rows("bank")
        _, checkpoint = start(store, load=lambda checkpoint: [checkpoint.rows("bank")].clear())
        assert checkpoint.step == 10
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()


def widen(document: dict[str, Any]) -> None:
    """Say that the only segment of a table has 40 GB."""
    rows = LARGE // 2
    only = {**segment(document), "start": 0, "stop": rows, "num_bytes": LARGE}
    document["tables"]["bank"].update(num_rows=rows, row_shape=[], segments=[only])


def test_a_manifest_larger_than_any_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.manifest.MAX_BYTES", 10**6)
    store = Store(tmp_path / "run")
    run_saves(store, [10, 20])
    os.truncate(tmp_path / "run" / "manifests/000001-000000000020.json", 30 * 10**9)
    tracemalloc.start()
    try:
        assert_holds(read_latest(store), 10)
        checkpointer, checkpoint = start(store)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert_holds(checkpoint, 10)
    assert "has more than 1000000 bytes" in checkpointer.warnings[0]


def test_a_manifest_that_nobody_would_read_is_not_written(uri, monkeypatch):
    monkeypatch.setattr("cluster.manifest.MAX_BYTES", 10_000)
    checkpointer, _ = start(Store(uri))
    with pytest.raises(SaveFailedError, match="expected at most 10000: state is too large"):
        checkpointer.save(1, {}, {}, {"text": "x" * 10_000})
    save(checkpointer, ThreadWorker(), 2)
    assert_holds(read_latest(Store(uri)), 2)


HEADERS = {
    "no JSON": b"x" * 64,
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "a tensor that is a text": b'{"w": "x"}',
    "offsets that are texts": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
    "offsets behind the end": b'{"w": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}',
    "offsets that overlap": b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "a hole": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "bytes that nobody needs": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "a negative shape": b'{"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
    "a dtype that is none": b'{"w": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}}',
    "a dtype that is a list": b'{"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    "no dtype": b'{"w": {"shape": [2], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
@pytest.mark.parametrize("length", [None, 2**63, 0])
def test_a_hostile_header_of_tensors_is_damage(uri, header, length):
    store = Store(uri)
    run_saves(store, [10, 20])
    data = (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(8)
    stored = write_object(store, read_latest(store).manifest.tensors.key, [data])
    rewrite(store, lambda document: document["tensors"].update(num_bytes=stored.num_bytes, checksum=stored.checksum))
    _, checkpoint = start(store, load=lambda checkpoint: checkpoint.tensors() and None)
    assert checkpoint.step == 10


@pytest.mark.parametrize("change", [lambda d: d.update(about=nested(900)), lambda d: d.update(token=nested(900))])
def test_a_record_of_an_attempt_that_is_deep_is_read_or_refused(uri, change):
    store = Store(uri)
    run_saves(store, [10])
    rewrite(store, change, "attempts/000001.start.json")
    with suppress(CheckpointError):
        start(store)
    assert set(read_attempts(store)) <= {1, 2}


def take_over(checkpoint: Checkpoint) -> None:
    """As a run does: into memory of its own, by names that it knows."""
    checkpoint.read_rows("bank", 0, torch.zeros(37, 6, dtype=torch.bfloat16))
    assert checkpoint.state["step"] + checkpoint.tensors()["w"][2, 1] == 2 * checkpoint.step


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["state"].__delitem__("step"),
        lambda d: d["state"].update(step="x"),
        lambda d: d["state"].update(step={"deep": nested(50)}),
        lambda d: d["tables"].__delitem__("bank"),
        lambda d: d["tables"].update(bank=d["tables"]["weights"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_run_is_skipped_and_told(uri, change):
    store = Store(uri)
    run_saves(store, [10, 20])
    rewrite(store, change)
    checkpointer, checkpoint = start(store, load=take_over)
    assert_holds(checkpoint, 10)
    assert "000020.json" in checkpointer.warnings[0]
    assert "does not fit this run" in checkpointer.warnings[0]
