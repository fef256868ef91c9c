"""Tars are read from end to end once: what was found is kept with the run, which every other opening takes."""

import io
import tarfile

import numpy as np
import pytest
from made_images import encode, picture

from cluster.store import Store
from dataloading.cache import ShardCache
from dataloading.index import DatasetChanged, DatasetIndex
from dataloading.sources import open_dataset
from dataloading.storage import Storage
from instdisc.runs import Run


class Counting:
    """A store that counts the bytes that are read."""

    def __init__(self, uri):
        self.store, self.num_bytes = Store(uri), 0

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, *arguments):
        data = self.store.get(*arguments)
        self.num_bytes += len(data)
        return data


def tar_of(store, name, first, num=6, num_classes=3):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(first, first + num):
            for ending, data in (
                ("jpg", encode(picture(150 + row, 120, row))),
                ("cls", str(row % num_classes).encode()),
            ):
                member = tarfile.TarInfo(f"deep/{row:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    store.put(name, buffer.getvalue())
    return len(buffer.getvalue())


@pytest.fixture
def far(tmp_path):
    counting = Counting(str(tmp_path / "tars"))
    counting.total = sum(tar_of(counting, f"train-{number:06d}.tar", 6 * number) for number in range(3))
    return counting


def opened(far, root="s3://tars", **more):
    return open_dataset("webdataset", root, "train", storage=Storage(lambda uri: far), **more)


def test_a_start_with_the_saved_index_reads_no_tar(far, tmp_path):
    first = opened(far)
    assert far.num_bytes >= far.total
    run = Run(str(tmp_path / "run"))
    run.agree_on_dataset(first.index)
    far.num_bytes = 0
    later = opened(far, index=run.index())
    assert far.num_bytes == 0
    assert later.index.difference(first.index) is None
    assert [later.read(row) for row in range(18)] == [first.read(row) for row in range(18)]


def test_without_versions_a_start_reads_a_header_of_each_tar(far, monkeypatch):
    monkeypatch.setattr(far.store, "versions", dict)
    index = opened(far).index
    far.num_bytes = 0
    opened(far, index=index)
    assert far.num_bytes == 3 * 512


def test_near_tars_are_taken_from_the_index_as_well(far, tmp_path, monkeypatch):
    from dataloading import webdataset

    near = opened(far, str(tmp_path / "tars"))
    monkeypatch.setattr(webdataset, "_open_tar", None)
    again = opened(far, str(tmp_path / "tars"), index=near.index)
    assert [again.read(row) for row in range(18)] == [near.read(row) for row in range(18)]


def test_a_tar_that_changed_is_read_and_told(far):
    index = opened(far).index
    before = tar_of(far, "train-000001.tar", 6)
    assert tar_of(far, "train-000001.tar", 6, num=5) == before  # tars are filled up to 10 kB
    with pytest.raises(DatasetChanged, match="1 removed"):
        opened(far, index=index)


def test_tars_of_the_same_sizes_with_other_labels_are_other_tars(far):
    index = opened(far).index
    tar_of(far, "train-000001.tar", 6, num_classes=2)
    with pytest.raises(DatasetChanged, match="with another label"):
        opened(far, index=index)


def test_tars_that_moved_are_read_once_more(far, tmp_path):
    index = opened(far).index
    object.__setattr__(index, "versions", dict.fromkeys(index.files, "of another bucket"))
    far.num_bytes = 0
    moved = opened(far, index=index).index
    assert far.num_bytes >= far.total
    assert moved.difference(index) is None
    far.num_bytes = 0
    opened(far, index=moved)
    assert far.num_bytes == 0


def test_commands_on_a_machine_read_far_tars_once(far, tmp_path):
    cached = Storage(lambda uri: far, ShardCache(tmp_path / "cache"))
    first = open_dataset("webdataset", "s3://tars", "train", storage=cached)
    far.num_bytes = 0
    later = open_dataset("webdataset", "s3://tars", "train", storage=cached)
    assert far.num_bytes == 0
    assert later.index.difference(first.index) is None
    assert later.index.notes == first.index.notes
    assert [later.read(row) for row in range(18)] == [first.read(row) for row in range(18)]
    assert open_dataset("webdataset", "s3://tars", "train", max_rows=4, storage=cached).index.num_rows == 4
    tar_of(far, "train-000001.tar", 6, num=5)
    assert open_dataset("webdataset", "s3://tars", "train", storage=cached).index.num_rows == 17


def test_an_index_in_the_cache_that_lost_bytes_is_made_again(far, tmp_path):
    cached = Storage(lambda uri: far, ShardCache(tmp_path / "cache"))
    first = open_dataset("webdataset", "s3://tars", "train", storage=cached)
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    kept.write_bytes(bytes(kept.stat().st_size))
    again = open_dataset("webdataset", "s3://tars", "train", storage=cached)
    assert again.index.difference(first.index) is None
    far.num_bytes = 0
    open_dataset("webdataset", "s3://tars", "train", storage=cached)
    assert far.num_bytes == 0


def test_what_cannot_be_noticed_when_it_changes_is_not_kept(far, tmp_path, monkeypatch):
    monkeypatch.setattr(far.store, "versions", dict)
    open_dataset("webdataset", "s3://tars", "train", storage=Storage(lambda uri: far, ShardCache(tmp_path / "cache")))
    assert not (tmp_path / "cache" / "indexes").exists()


def test_an_index_of_an_earlier_version_still_fits_and_its_tars_are_read(far, tmp_path):
    index = opened(far).index
    object.__setattr__(index, "offsets_N", None)
    object.__setattr__(index, "files", {})
    index.save(tmp_path / "index.parquet")
    old = DatasetIndex.load(tmp_path / "index.parquet")
    assert old.offsets_N is None
    far.num_bytes = 0
    assert opened(far, index=old).read(3) == opened(far).read(3)
    assert far.num_bytes >= far.total


def test_places_outside_of_a_tar_are_not_believed(far):
    index = opened(far).index
    object.__setattr__(index, "offsets_N", np.full(18, far.total))
    assert opened(far, index=index).read(0) == opened(far).read(0)
