"""Manifests in which a bit is another: refused with a message, whichever it is, and found by `verify`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_images import encode, picture

from cluster.store import Store
from dataloading.index import DatasetError
from dataloading.pack import pack
from dataloading.packed import open_manifest
from dataloading.sources import list_images, open_dataset
from dataloading.verify import verify

FLIP_EVERYWHERE = """
import resource, sys
import pyarrow as pa
from dataloading.index import DatasetError
from dataloading.shards import load_manifest

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
whole = open(sys.argv[1], "rb").read()
texts = []
for bit in range(0, 8 * len(whole), 29):
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        manifest = load_manifest("here", pa.py_buffer(bytes(flipped)))
        list(manifest.index.names), manifest.index.labels_N.max(), manifest.checksum_N.tobytes()
    except DatasetError as error:
        texts.append(str(error))
print(len(texts), all(text.startswith("here is not a whole manifest") for text in texts))
"""


@pytest.fixture
def packed(tmp_path) -> Path:
    """Return packed images of three classes."""
    for number in range(9):
        folder = tmp_path / f"images/class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encode(picture(100, 120, number)))
    images = list_images("folder", str(tmp_path / "images"), "train")
    pack(images, Store(str(tmp_path / "packed")), "train", parallel=map, shard_mb=0.01)
    return tmp_path / "packed"


def column(packed: Path, name: str) -> tuple[bytearray, int]:
    """Return the manifest's bytes and the place of a column's values in them."""
    whole = pa.py_buffer((packed / "train/manifest.arrow").read_bytes())
    with pa.ipc.open_file(pa.BufferReader(whole)) as reader:
        values = reader.get_batch(0).column(name).buffers()[-1]
    return bytearray(whole.to_pybytes()), values.address - whole.address


def rewrite(packed: Path, raw: bytearray) -> None:
    (packed / "train/manifest.arrow").write_bytes(raw)


def without_digests(packed: Path) -> None:
    """Make the manifest one of an older version, which stated no digests of itself."""
    path = packed / "train/manifest.arrow"
    with pa.ipc.open_file(str(path)) as reader:
        batch = reader.get_batch(0)
    about = json.loads(batch.schema.metadata[b"instdisc"])
    del about["columns"]
    batch = batch.replace_schema_metadata({"instdisc": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def problems(packed: Path) -> list[str]:
    return list(verify(*open_manifest(str(packed), "train", None), map))


def test_no_bit_of_a_manifest_ends_the_process(packed):
    command = [sys.executable, "-c", FLIP_EVERYWHERE, str(packed / "train/manifest.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    num_refused, all_named = done.stdout.split()
    assert int(num_refused) > 500
    assert all_named == "True"


@pytest.mark.parametrize("name", ["length", "height", "width", "bad", "shard", "offset", "label", "row_of_place"])
def test_a_changed_value_in_a_column_is_refused(name, packed):
    raw, start = column(packed, name)
    raw[start] ^= 1
    rewrite(packed, raw)
    with pytest.raises(DatasetError, match=f"column {name} differs from its digest"):
        open_dataset("packed", str(packed), "train")


def test_a_changed_name_or_checksum_is_found_by_verify(packed):
    assert problems(packed) == []
    whole = (packed / "train/manifest.arrow").read_bytes()
    for name in ("name", "checksum"):
        rewrite(packed, bytearray(whole))
        raw, start = column(packed, name)
        raw[start] ^= 1
        rewrite(packed, raw)
        assert any(f"column {name} differs from its digest" in problem for problem in problems(packed))


@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_labels_beyond_the_classes_are_refused_in_manifests_without_digests_too(label, packed):
    without_digests(packed)
    assert problems(packed) == []
    raw, start = column(packed, "label")
    raw[start : start + 8] = np.int64(label).tobytes()
    rewrite(packed, raw)
    with pytest.raises(DatasetError, match=r"labels from .* expected 0 to 2"):
        open_dataset("packed", str(packed), "train")


def test_a_label_that_is_another_than_its_member_says_is_found(packed):
    without_digests(packed)
    raw, start = column(packed, "label")
    assert raw[start] == 0
    raw[start] = 2
    rewrite(packed, raw)
    (problem,) = problems(packed)
    assert problem.endswith("class_0/0.jpg: found label 0, the manifest says 2")


def test_what_was_added_to_a_shard_or_beside_it_is_found(packed):
    shard = sorted((packed / "train").glob("*.tar"))[0]
    whole = shard.read_bytes()
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("foreign.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"\xff\xd8\xff\xd9"))
    assert any("1 members that the manifest does not know, for instance foreign" in p for p in problems(packed))
    shard.write_bytes(whole + whole)
    assert any(f"found {2 * len(whole):,} bytes, expected {len(whole):,}" in p for p in problems(packed))
    shard.write_bytes(whole)
    assert problems(packed) == []
    (packed / "train/other.tar").write_bytes(whole)
    assert any("1 tars that are none of its shards, for instance other.tar" in p for p in problems(packed))
