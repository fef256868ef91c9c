"""`max_rows` takes rows from the whole list, the same ones from every source."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_images import encode, picture

from cluster.parallel import ProcessMap
from cluster.store import Store
from dataloading.pack import pack
from dataloading.row_choice import chosen_rows
from dataloading.sources import list_images, open_dataset

KINDS = ["folder", "packed", "webdataset", "parquet"]


@given(num_rows=st.integers(1, 500), max_rows=st.integers(1, 500))
def test_one_row_is_taken_of_each_of_as_many_equal_parts(num_rows, max_rows):
    rows_R = chosen_rows(num_rows, max_rows, spread=True)
    num_chosen = min(num_rows, max_rows)
    borders = [part * num_rows // num_chosen for part in range(num_chosen + 1)]
    assert all(low <= row < high for row, low, high in zip(rows_R, borders[:-1], borders[1:], strict=True))
    np.testing.assert_array_equal(chosen_rows(num_rows, max_rows, spread=False), np.arange(num_chosen))


def test_classes_that_take_turns_are_all_met():
    assert len(np.unique(chosen_rows(10_000, 1_000, spread=True) % 10)) == 10


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, str]:
    """The same images of four classes in class folders, packed, in a tar and in a parquet file."""
    root = tmp_path_factory.mktemp("rows")
    files = [f"{name}/{number}.png" for name in "abcd" for number in range(8)]
    encoded = [encode(picture(130, 130, number), "PNG") for number in range(32)]
    for name, data in zip(files, encoded, strict=True):
        (root / "folder/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder/train" / name).write_bytes(data)
    images = list_images("folder", str(root / "folder"), "train")
    pack(images, Store(str(root / "packed")), "train", parallel=ProcessMap(0), shard_mb=0.1)
    for kind in ("webdataset", "parquet"):
        (root / kind).mkdir()
    with tarfile.open(root / "webdataset/train-000000.tar", "w") as tar:
        for number, image in enumerate(encoded):
            for ending, data in (("png", image), ("cls", b"%d" % (number // 8))):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    column = [{"bytes": image, "path": name} for image, name in zip(encoded, files, strict=True)]
    table = pa.table({"image": column, "label": [number // 8 for number in range(32)]})
    pq.write_table(table, root / "parquet/train-00000-of-00001.parquet", row_group_size=5)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_hold_all_classes_and_their_own_images(roots, kind):
    everything = open_dataset(kind, roots[kind], "train")
    some = open_dataset(kind, roots[kind], "train", max_rows=8)
    rows = chosen_rows(32, 8, spread=True).tolist()
    assert some.index.labels_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(some.index.names) == [everything.index.names[row] for row in rows]
    assert [some.read(place) for place in range(8)] == [everything.read(row) for row in rows]
    told = [note.text for note in some.index.notes if "32 images" in note.text]
    assert told == ["8 of 32 images, spread over all of them"]
    again = open_dataset(kind, roots[kind], "train", max_rows=8, index=some.index)
    assert again.index.digest == some.index.digest
    if kind == "packed":
        assert some.index.digest == open_dataset("folder", roots["folder"], "train", max_rows=8).index.digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_an_older_version_keeps_its_first_rows(roots, kind):
    everything = open_dataset(kind, roots[kind], "train")
    first = open_dataset(kind, roots[kind], "train", max_rows=8, layout_rule=1)
    assert list(first.index.names) == list(everything.index.names)[:8]
