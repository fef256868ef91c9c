"""What a run knows of its images: one rank looks at them, once; other ranks, later starts and commands take it."""

from __future__ import annotations

import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import fsspec
import pytest
import torch
from PIL import Image

import instdisc
from cluster.remote_objects import RemoteObjects
from cluster.store import Store
from cluster.worker import Worker
from dataloading.index import DatasetIndex
from instdisc.runs import Run, RunError
from instdisc.train.image_sets import open_images_of, open_train_set, require_same_images, share_test_set

ROOT = "memory://tars-of-a-run"
SIZES = {"train": 5, "test": 4}


@dataclass(frozen=True, kw_only=True)
class RankOfTwo(Worker):
    """A rank of two that are threads of this process."""

    meeting: threading.Barrier
    said: dict[int, object] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def all_gather_object(self, obj):
        self.said[self.rank] = obj
        self.meeting.wait(30)
        found = [self.said[rank] for rank in range(2)]
        self.meeting.wait(30)
        return found

    def emit(self, event):
        self.told.append(event["text"])


def write_tar(split, num, *, side=100):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(num):
            encoded = io.BytesIO()
            Image.new("RGB", (side + row, 120), (row, 0, 0)).save(encoded, "PNG")
            for ending, data in (("png", encoded.getvalue()), ("cls", str(row % 2).encode())):
                member = tarfile.TarInfo(f"{row}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    Store(ROOT).put(f"{split}-000000.tar", buffer.getvalue())


@pytest.fixture
def reads(monkeypatch):
    """Keys of the tars that are read, each time that they are."""
    found, get = [], RemoteObjects.get

    def counted(self, path, start, stop):
        found.append(path.rpartition("/")[2])
        return get(self, path, start, stop)

    monkeypatch.setattr(RemoteObjects, "get", counted)
    for split, num in SIZES.items():
        write_tar(split, num)
    yield found
    fsspec.filesystem("memory").rm(ROOT.removeprefix("memory:/"), recursive=True)


def config_of(**more):
    return instdisc.recipe("quickstart", **{"data.root": ROOT, "data.kind": "webdataset", "data.cache_gb": 0.0, **more})


def started(run, config):
    """Open the images on two ranks; return what each has, and what rank 0 told."""
    meeting, said, told = threading.Barrier(2), {}, []

    def rank(number):
        device = torch.device("cpu")
        worker = RankOfTwo(rank=number, world_size=2, device=device, meeting=meeting, said=said, told=told)
        train = open_train_set(replace(worker, told=[]), config, run)
        test = share_test_set(worker, config, run, told.append)
        require_same_images(worker, train, test)
        return train, test

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(rank, range(2))), told


def test_far_tars_of_both_splits_are_read_by_one_rank_at_the_first_start_only(reads, tmp_path):
    run, config = Run(str(tmp_path)), config_of()
    ((train, test), (_, of_other)), _ = started(run, config)
    num_reads = len(reads)
    assert (train.index.num_rows, test.index.num_rows) == (5, 4)
    assert [of_other.read(row) for row in range(4)] == [test.read(row) for row in range(4)]
    del reads[:]
    (_, (_, later)), told = started(run, config)
    assert (reads, told) == ([], [])
    assert later.index.difference(test.index) is None
    assert num_reads < 2 * (2 + 5 + 4)  # of each tar its content and its end, once, then the images for their headers


def test_commands_take_what_the_run_knows_and_write_nothing(reads, tmp_path):
    run, data = Run(str(tmp_path)), config_of().data
    started(run, config_of())
    del reads[:]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for split, num in SIZES.items():
        assert open_images_of(run, data, split, None).index.num_rows == num
    assert reads == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert open_images_of(run, data, "test", 2).index.num_rows == 2  # another question than the run's


def test_test_images_that_changed_are_told_and_other_ones_of_fewer_rows_are_not(reads, tmp_path):
    run = Run(str(tmp_path))
    started(run, config_of())
    ((_, test), (_, of_other)), told = started(run, config_of(**{"data.max_test_rows": 3}))
    assert (test.index.num_rows, of_other.index.num_rows, told) == (3, 3, [])
    write_tar("test", 3)
    ((_, test), (_, of_other)), told = started(run, config_of())
    assert (test.index.num_rows, of_other.index.num_rows, told) == (3, 3, [])
    write_tar("test", 4, side=101)
    ((_, test), (_, of_other)), told = started(run, config_of())
    assert (test.index.num_rows, of_other.index.num_rows) == (4, 4)
    assert "the test images are other ones than at the last start" in told[0]
    assert open_images_of(run, config_of().data, "test", None).index.widths_N.tolist() == [101, 102, 103, 104]


def test_a_run_that_begun_before_learns_where_its_images_are_with_its_digest_unchanged(reads, tmp_path):
    run, config = Run(str(tmp_path)), config_of()
    started(run, config)
    old = replace(run.index(), offsets_N=None, files={}, versions={}, asked="")
    run.store.put("dataset/index.parquet", old.to_bytes())
    run.store.delete("dataset/test_index.parquet")
    started(run, config)
    assert run.index().digest == old.digest
    assert run.index().offsets_N is not None
    del reads[:]
    started(run, config)
    assert reads == []


def test_training_images_that_changed_are_refused(reads, tmp_path):
    run = Run(str(tmp_path))
    started(run, config_of())
    write_tar("train", 5, side=101)
    worker = Worker(device=torch.device("cpu"))
    with pytest.raises(RunError, match="started on other images"):
        open_train_set(worker, config_of(), run)


def test_a_test_index_that_cannot_be_read_is_made_again(reads, tmp_path):
    run = Run(str(tmp_path))
    started(run, config_of())
    run.store.put("dataset/test_index.parquet", b"PAR1")
    started(run, config_of())
    assert isinstance(run.test_index(), DatasetIndex)
