import hashlib
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataloading.index import (
    DatasetChanged,
    DatasetError,
    DatasetIndex,
    Names,
    dataset_of_pixels,
    list_digest,
)


def index_of(names, *, num_bytes=None, labels=None, class_names=(), digest=None, files=None, reasons=None):
    num_bytes_N = np.array(num_bytes or [100 + row for row in range(len(names))], dtype=np.int64)
    bad_N = np.zeros(len(names), dtype=np.bool_)
    bad_N[list(reasons or {})] = True
    return DatasetIndex(
        source="test",
        names=Names.of(names),
        heights_N=np.full(len(names), 20, dtype=np.int32),
        widths_N=np.full(len(names), 30, dtype=np.int32),
        labels_N=None if labels is None else np.array(labels, dtype=np.int64),
        class_names=class_names,
        bad_N=bad_N,
        digest=digest or list_digest(Names.of(names), num_bytes_N),
        reasons=reasons or {},
        num_bytes_N=num_bytes_N,
        files=files or {},
    )


def assert_same_index(found, expected):
    for name in ("source", "class_names", "digest", "reasons", "files"):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.names) == list(expected.names)
    for name in ("heights_N", "widths_N", "labels_N", "bad_N", "num_bytes_N"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if theirs is None:
            assert mine is None, name
        else:
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("labels", [None, [1, 0, 1]])
def test_a_saved_index_is_loaded_as_it_was(tmp_path, labels):
    saved = index_of(
        ["a/ü.jpg", "b/2.jpg", os.fsdecode(b"b/\xff.jpg")],
        labels=labels,
        class_names=("a", "b") if labels else (),
        reasons={1: "OSError: broken"},
        files={"x.parquet": 12},
    )
    saved.save(tmp_path / "split=train.parquet")
    assert_same_index(DatasetIndex.load(tmp_path / "split=train.parquet"), saved)
    assert os.listdir(tmp_path) == ["split=train.parquet"]


def test_an_index_without_sizes_and_with_a_list_of_names_is_saved_too(tmp_path):
    ones = np.ones(2, dtype=np.int32)
    saved = DatasetIndex("test", ["a", "b"], ones, ones, None, (), np.zeros(2, dtype=np.bool_), "00")
    saved.save(tmp_path / "index")
    assert_same_index(DatasetIndex.load(tmp_path / "index"), saved)


def test_a_file_that_is_no_index_is_refused(tmp_path):
    pq.write_table(pa.table({"label": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    for name in ("other.parquet", "text.parquet"):
        with pytest.raises(DatasetError, match=f"{name} is not a dataset index"):
            DatasetIndex.load(tmp_path / name)


def test_the_digest_is_the_documented_hash():
    names, num_bytes_N = ["b", "ää", ""], np.array([5, 6, 7])
    expected = hashlib.sha256(b"instdisc dataset index 1 3 ")
    for length in (1, 4, 0):
        expected.update(length.to_bytes(8, "little"))
    expected.update("bää".encode())
    for size in num_bytes_N:
        expected.update(int(size).to_bytes(8, "little"))
    expected.update(b"content")
    assert list_digest(Names.of(names), num_bytes_N, b"content") == expected.hexdigest()


def test_a_slice_of_a_longer_list_has_the_digest_of_the_short_list():
    names = Names.of(f"{number}.jpg" for number in range(100))
    sizes_N = np.arange(100)
    assert list_digest(names[40:60], sizes_N[40:60]) == list_digest(Names.of(list(names)[40:60]), sizes_N[40:60])


@pytest.mark.parametrize(
    ("names", "num_bytes"),
    [(["ab", "c"], [1, 2]), (["a", "bc"], [1, 3]), (["bc", "a"], [1, 2]), (["a", "bc", ""], [1, 2, 0])],
)
def test_the_digest_tells_lists_apart(names, num_bytes):
    other = list_digest(Names.of(["a", "bc"]), np.array([1, 2]))
    assert list_digest(Names.of(names), np.array(num_bytes)) != other


def test_the_digest_of_pixels_changes_with_one_pixel():
    pixels_NHWC = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    before = dataset_of_pixels("p", pixels_NHWC, None, (), "abc").index
    changed = pixels_NHWC.copy()
    changed[2, 3, 3, 2] = 1
    after = dataset_of_pixels("p", changed, None, (), "abc").index
    assert before.digest == dataset_of_pixels("elsewhere", pixels_NHWC.copy(), None, (), "abc").index.digest
    assert before.digest != after.digest
    assert before.difference(after) == (
        "3 images before, 3 now: the names and byte sizes are the same, but the contents of the images differ"
    )


def test_an_index_does_not_differ_from_itself():
    index = index_of(["a", "b"], labels=[0, 1], class_names=("x", "y"), files={"f": 1})
    assert index.difference(index) is None


def test_added_and_removed_images_are_counted_and_named():
    before = index_of(["a", "b", "c", "d", "e"], num_bytes=[1, 2, 3, 4, 5])
    now = index_of(["a", "c", "v", "w", "x", "y"], num_bytes=[1, 9, 1, 1, 1, 1])
    assert before.difference(now) == (
        "5 images before, 6 now: 4 added (v, w, x, …); 3 removed (b, d, e); 1 of another byte size (c)"
    )


def test_another_order_other_labels_and_other_files_are_named():
    before = index_of(["a", "b", "c"], num_bytes=[1, 2, 3], labels=[0, 0, 1], class_names=("x", "y"), files={"f": 1})
    swapped = index_of(["a", "c", "b"], num_bytes=[1, 3, 2], labels=[0, 1, 0], class_names=("x", "y"), files={"f": 1})
    relabelled = index_of(["a", "b", "c"], num_bytes=[1, 2, 3], labels=[1, 0, 1], class_names=("x", "z"))
    assert before.difference(swapped) == "3 images before, 3 now: the order differs (row 1 is the first)"
    assert before.difference(relabelled) == (
        "3 images before, 3 now: 1 files removed (f); 1 with another label (a); the classes were x, y and are x, z"
    )


def test_a_lost_file_at_the_end_is_a_difference():
    before, now = index_of(["a", "b", "c"]), index_of(["a", "b"])
    assert before.difference(now) == "3 images before, 2 now: 1 removed (c)"
    assert now.difference(before) == "2 images before, 3 now: 1 added (c)"


def test_names_are_a_sequence_of_str_and_small():
    names = Names.of(f"n{number:08d}.jpg" for number in range(1000))
    assert names[-1] == "n00000999.jpg"
    assert names[np.int64(3)] == "n00000003.jpg"
    assert list(names[998:]) == ["n00000998.jpg", "n00000999.jpg"]
    assert "n00000500.jpg" in names
    assert names == Names.of(list(names))
    assert names != Names.of(["a"])
    assert names.array.nbytes < 25 * len(names)
    with pytest.raises(IndexError):
        names[1000]


@pytest.mark.parametrize("kind", [DatasetError, DatasetChanged])
def test_errors_can_be_sent_to_another_process(kind):
    error = pickle.loads(pickle.dumps(kind("what, where")))
    assert type(error) is kind
    assert str(error) == "what, where"
    assert isinstance(error, ValueError)
