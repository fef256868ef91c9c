"""Manifests: kept bit for bit, damage noticed, and only the newest attempt's chain of parents visible."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.manifest import (
    FORMAT,
    Increment,
    Manifest,
    ManifestError,
    ManifestId,
    NewerFormatError,
    Segment,
    StoredTable,
    encode_document,
    visible_chain,
)
from cluster.row_table import block_ranges
from cluster.stored_object import StoredObject

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def segment(start: int, stop: int, row_bytes: int = 8) -> Segment:
    return Segment(
        start=start, stop=stop, key=f"objects/000001/{start}", num_bytes=(stop - start) * row_bytes, checksum="xxh3:ab"
    )


def manifest(state=None) -> Manifest:
    increment = Increment(
        start=1,
        stop=4,
        num_rows=2,
        index_dtype="int32",
        key="objects/000002/1",
        num_bytes=2 * (8 + 4),
        checksum="xxh3:ef",
    )
    table = StoredTable(
        num_rows=5,
        row_shape=(2,),
        dtype="float32",
        segments=(segment(0, 3), segment(3, 5)),
        increments=(increment,),
    )
    return Manifest(
        attempt=2,
        step=10,
        save=3,
        digests={"data": "ab"},
        metrics={"knn": 0.5},
        parent=ManifestId(1, 7),
        created="2025-01-01T00:00:00+00:00",
        versions={"torch": "2.11"},
        tables={"bank": table},
        tensors=StoredObject(key="objects/000002/t", num_bytes=8, checksum="xxh3:cd"),
        state=state or {},
    )


def bits(value):
    """The value with every float replaced by its 64 bits, so that 0.0 and -0.0 differ."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list) else (type(value), value)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_manifest_and_its_state_read_back_bit_for_bit(state):
    read = Manifest.from_bytes(manifest(state).to_bytes(), "here")
    assert bits(read.state) == bits(state)
    assert replace(read, state={}) == manifest()


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0.0, float("nan")]}}, r"state\['a'\]\['b'\]\[1\]: found nan"),
        ({"a": float("-inf")}, r"state\['a'\]: found -inf"),
        ({"a": (1, 2)}, r"state\['a'\]: found \(1, 2\)"),
        ({"a": {1: 2}}, r"state\['a'\]: found the key 1"),
        ({"a": b"x"}, r"state\['a'\]: found b'x'"),
    ],
)
def test_a_state_that_json_would_change_is_refused_and_the_place_is_named(state, place):
    with pytest.raises(ValueError, match=place):
        manifest(state).to_bytes()


def test_a_manifest_that_is_cut_short_anywhere_is_damaged():
    data = manifest({"lr": 0.1}).to_bytes()
    for length in range(len(data)):
        with pytest.raises(ManifestError, match="here is damaged"):
            Manifest.from_bytes(data[:length], "here")


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing():
    original = manifest({"lr": 1e-7, "name": "é"})
    data = original.to_bytes()
    num_noticed = 0
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            try:
                assert Manifest.from_bytes(bytes(damaged), "here") == original
            except ManifestError:
                num_noticed += 1
    assert num_noticed > 0.99 * 8 * len(data)


def test_a_manifest_of_a_newer_format_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr("cluster.manifest.FORMAT", FORMAT + 1)
    data = encode_document({"written_by": "the future"})
    monkeypatch.undo()
    with pytest.raises(NewerFormatError, match=r"here has format 3, expected at most 2.*update the package") as caught:
        Manifest.from_bytes(data, "here")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("tensors"),
        lambda d: d["tables"]["bank"]["segments"].pop(0),
        lambda d: d["tables"]["bank"]["segments"].pop(1),
        lambda d: d["tables"]["bank"].update(num_rows=6),
        lambda d: d["tables"]["bank"].update(dtype="object"),
        lambda d: d["tables"]["bank"]["segments"][0].update(num_bytes=25),
        lambda d: d["tables"]["bank"]["segments"][0].update(key="../../etc/passwd"),
        lambda d: d["tables"]["bank"]["increments"][0].update(stop=6),
        lambda d: d["tables"]["bank"]["increments"][0].update(num_rows=3),
        lambda d: d["tables"]["bank"]["increments"][0].update(index_dtype="int64"),
        lambda d: d["tables"]["bank"]["increments"][0].update(key="/etc/passwd"),
        lambda d: d["metrics"].update(knn="0.5"),
        lambda d: d.update(surprise=1),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_although_its_checksum_fits(change):
    document = json.loads(manifest().to_bytes())
    del document["sha256"], document["format"]
    assert Manifest.from_bytes(encode_document(document), "here") == manifest()
    change(document)
    with pytest.raises(ManifestError, match="here contradicts itself"):
        Manifest.from_bytes(encode_document(document), "here")


def test_an_id_is_its_key_and_keys_sort_as_ids_do():
    ids = [ManifestId(1, 9), ManifestId(1, 10), ManifestId(2, 3), ManifestId(10, 0)]
    assert sorted(id.key for id in ids) == [id.key for id in ids]
    assert [ManifestId.from_key(id.key) for id in ids] == ids
    assert ManifestId.from_key("manifests/notes.txt") is None


@given(num_rows=st.integers(0, 300), block_rows=st.integers(1, 50), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_the_blocks_of_all_ranks_tile_the_rows_and_begin_at_block_or_rank_boundaries(num_rows, block_rows, cuts):
    bounds = [0, *sorted(min(cut, num_rows) for cut in cuts), num_rows]
    ranges = [r for a, b in pairwise(bounds) for r in block_ranges(a, b, block_rows)]

    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(num_rows))
    for start, stop in ranges:
        assert start // block_rows == (stop - 1) // block_rows
        assert start % block_rows == 0 or start in bounds


@pytest.mark.parametrize("name", ["state", "metrics", "versions", "digests", "parent", "start", "key", "tables"])
def test_a_table_may_have_any_name(name):
    original = manifest()
    renamed = replace(original, tables={name: original.tables["bank"]})
    assert Manifest.from_bytes(renamed.to_bytes(), "here") == renamed


@given(st.sets(st.integers(0, 40), min_size=1).map(sorted), st.integers(0, 40), st.integers(1, 40), st.integers(1, 50))
def test_overlapping_segments_are_those_that_share_a_row(cuts, start, length, num_rows):
    bounds = sorted({0, num_rows, *(cut for cut in cuts if cut < num_rows)})
    segments = tuple(segment(a, b, 4) for a, b in pairwise(bounds))
    table = StoredTable(num_rows=num_rows, row_shape=(), dtype="int32", segments=segments)
    wanted = set(range(start, start + length))
    assert table.overlapping(start, start + length) == [s for s in segments if wanted & set(range(s.start, s.stop))]


def test_the_chain_of_a_run_without_attempts_is_empty():
    assert visible_chain({}, []) == []


def test_what_a_zombie_wrote_before_and_after_it_was_left_behind_is_told_apart():
    parents = {1: None, 2: ManifestId(1, 20), 4: ManifestId(2, 30)}
    manifests = [ManifestId(*id) for id in [(1, 10), (1, 20), (1, 30), (2, 30), (2, 40), (3, 35), (4, 50)]]
    assert visible_chain(parents, manifests) == [(1, 10), (1, 20), (2, 30), (4, 50)]


# An operation is a new attempt that starts `back` checkpoints before the newest (damaged ones are skipped), or a commit
# of any attempt, alive or left behind.
operations = st.lists(
    st.tuples(st.just("begin"), st.integers(0, 3)) | st.tuples(st.just("commit"), st.integers(1, 6)), max_size=40
)


@settings(max_examples=300)
@given(operations)
def test_zombies_that_keep_writing_never_become_visible(operations):
    parents: dict[int, ManifestId | None] = {}
    steps: dict[int, int] = {}
    written: list[ManifestId] = []
    history: list[ManifestId] = []
    for name, number in operations:
        if name == "begin":
            attempt = len(parents) + 1
            history = history[: max(len(history) - number, 0)]
            parents[attempt] = history[-1] if history else None
            steps[attempt] = history[-1].step if history else 0
        elif number in parents:
            steps[number] += 5
            written.append(ManifestId(number, steps[number]))
            if number == len(parents):
                history = [*history, written[-1]]
        assert visible_chain(parents, reversed(written)) == history
