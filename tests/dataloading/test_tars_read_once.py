"""Tars are read from end to end once: what was found is kept with the run, which every other opening takes."""

import io
import tarfile

import numpy as np
import pytest
from made_images import encode, picture

from cluster.store import Store
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


def tar_of(store, name, first, num=6):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(first, first + num):
            for ending, data in (("jpg", encode(picture(150 + row, 120, row))), ("cls", str(row % 3).encode())):
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
    assert far.num_bytes <= 3 * 512  # a header of each tar
    assert later.index.difference(first.index) is None
    assert [later.read(row) for row in range(18)] == [first.read(row) for row in range(18)]


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
