"""Errors of reading are no errors of images: they end what is being done, and nothing is recorded as damaged."""

import errno
import io
import os
import resource
import threading
import time
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_images import encode, odd_sized_jpegs, picture
from PIL import Image

from cluster.parallel import ProcessMap
from cluster.store import Store, StoreError
from dataloading import shard_reader
from dataloading.augment import AugmentConfig
from dataloading.encoded import Window
from dataloading.folder import FolderReader
from dataloading.image_decoder import ImageDecoder
from dataloading.index import DatasetError
from dataloading.loader import eval_batches, make_loader
from dataloading.pack import pack
from dataloading.pack_unit import look_at
from dataloading.packed import open_manifest
from dataloading.sources import list_images, open_dataset
from dataloading.storage import Storage
from dataloading.verify import verify
from instdisc.cli.main import main

NUM, HERE = 24, ProcessMap(0)
FAILURES = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    StoreError("cannot read '0.jpg' in s3://photos: nothing answers"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "train").mkdir()
    for row, encoded in enumerate(odd_sized_jpegs(NUM)):
        (root / "train" / f"{row:02d}.jpg").write_bytes(encoded)
    return root


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed")
    pack(list_images("auto", str(root), "train"), Store(str(target)), "train", parallel=HERE, shard_mb=0.02)
    return target


class FailsAfter:
    """A reader whose storage goes away after some reads."""

    def __init__(self, read, num_good, error):
        self.read, self.num_good, self.error, self.calls = read, num_good, error, count()

    is_remote = False

    def __call__(self, row):
        if next(self.calls) >= self.num_good:
            raise self.error
        return self.read(row)

    def subset(self, rows_R):
        inner = self.read.subset(rows_R)
        return FailsAfter(inner, self.num_good, self.error)


def trained(dataset, steps=NUM, global_batch=4, offsets=(0, 1)):
    """Return the loader after some steps."""
    loader = make_loader(
        dataset, AugmentConfig(size=16), seed=0, global_batch=global_batch, offsets=offsets, device="cpu", num_threads=2
    )
    try:
        for batch in islice(loader.batches(0), steps):
            assert batch.valid_B.all()
    finally:
        loader.close()
        assert loader.failed_rows() == []
    return loader


def evaluated(dataset):
    batches = eval_batches(
        dataset, range(NUM), resize=16, crop=16, mean=(0,) * 3, std=(1,) * 3, batch_size=NUM, device="cpu",
        num_threads=2,
    )  # fmt: skip
    return [batch.valid_B.tolist() for batch in batches]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__ + str(error.errno))
@pytest.mark.parametrize("work", [trained, evaluated])
def test_a_storage_that_goes_away_ends_the_work_with_its_own_error(root, work, error):
    dataset = open_dataset("folder", str(root), "train")
    failing = replace(dataset, read=FailsAfter(dataset.read, NUM - 3, error))
    with pytest.raises(type(error)) as caught:
        work(failing)
    assert caught.value is error


def test_a_file_that_is_gone_ends_training_and_is_named(root, tmp_path):
    for row in range(4):
        (tmp_path / f"{row}.jpg").write_bytes((root / "train" / f"{row:02d}.jpg").read_bytes())
    dataset = open_dataset("folder", str(tmp_path), "train")
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"put it back.*2\.jpg"):
        trained(dataset)


def test_what_was_read_whole_and_does_not_decode_is_damaged_all_the_same(root, tmp_path):
    for row in range(4):
        (tmp_path / f"{row}.jpg").write_bytes((root / "train" / f"{row:02d}.jpg").read_bytes())
    dataset = open_dataset("folder", str(tmp_path), "train")
    (tmp_path / "2.jpg").write_bytes(b"")
    assert [valid.tolist() for valid in _valid(dataset)] == [[row != 2 for row in range(4)]]


def _valid(dataset):
    batches = eval_batches(
        dataset, range(dataset.index.num_rows), resize=16, crop=16, mean=(0,) * 3, std=(1,) * 3, batch_size=NUM,
        device="cpu", num_threads=1,
    )  # fmt: skip
    return [batch.valid_B for batch in batches]


@pytest.fixture
def take_all_descriptors():
    """A function that takes all but some of the file descriptors that this process may have."""
    taken, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)

    def take(num_left=0):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, limits[1]))
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for _ in range(num_left):
            os.close(taken.pop())

    yield take
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_descriptors_end_a_folders_listing_its_training_and_its_packing(root, tmp_path, take_all_descriptors):
    dataset, images = open_dataset("folder", str(root), "train"), list_images("folder", str(root), "train")
    trained(dataset, steps=1)  # which imports what is needed
    take_all_descriptors()
    for work in (
        lambda: open_dataset("folder", str(root), "train"),
        lambda: trained(dataset),
        lambda: images.read.subset(np.arange(3))(0),
    ):
        with pytest.raises(OSError, match="Too many open files") as caught:
            work()
        assert caught.value.errno == errno.EMFILE


def test_a_file_that_cannot_be_opened_is_not_listed_as_damaged(root, capsys, monkeypatch):
    """`index` reads the header of every image."""
    from dataloading import folder

    def fails(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(folder, "_open", fails)
    assert main(["index", str(root)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"instdisc: error: {root}/train/")
    assert told.err.endswith("jpg: Too many open files\n")


def test_a_file_that_breaks_off_while_its_header_is_read_is_not_listed_as_damaged(root, monkeypatch):
    """Whatever a decoder makes of it: Pillow takes some errors for another format."""
    from dataloading import folder

    class Breaks:
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

        def __getattr__(self, name):
            return lambda *arguments: 0

    monkeypatch.setattr(folder, "_open", lambda path: Breaks())
    with pytest.raises(OSError, match="Input/output"):
        open_dataset("folder", str(root), "train")


def test_packed_images_are_read_with_as_few_descriptors_as_there_are(packed, take_all_descriptors):
    """Shards are kept open; where the limit is low, fewer of them."""
    dataset = open_dataset("packed", str(packed), "train")
    assert len(dataset.read.source.names) > 4
    take_all_descriptors(num_left=2)
    for row in range(NUM):
        assert dataset.read(row)


def test_a_file_server_that_forgot_an_open_shard_is_asked_for_it_again(packed, monkeypatch):
    dataset = open_dataset("packed", str(packed), "train")
    expected, stale = dataset.read(0), set()
    pread = os.pread

    def forgets(descriptor, length, offset):
        if not stale:
            stale.add(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(shard_reader.os, "pread", forgets)
    assert dataset.read(0) == expected
    assert stale


class FailingObjects:
    """A store of which reads fail after some; one like it is what a server does that goes away."""

    def __init__(self, uri, num_good):
        self.store, self.num_good, self.calls = Store(uri), num_good, count()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, *arguments):
        if next(self.calls) >= self.num_good:
            raise StoreError("cannot read 'x' in s3://photos: nothing answers")
        return self.store.get(*arguments)


@pytest.mark.parametrize("num_good", [0, NUM // 2])
def test_a_server_that_goes_away_ends_the_listing_of_loose_objects(root, num_good):
    objects = FailingObjects(f"{root}/train", num_good)
    with pytest.raises(StoreError, match="nothing answers"):
        open_dataset("folder", "s3://photos", "train", storage=Storage(lambda uri: objects))


def test_a_storage_that_goes_away_interrupts_packing_which_goes_on_later(root, tmp_path):
    images, target = list_images("folder", str(root), "train"), Store(str(tmp_path))
    with pytest.raises(StoreError):
        pack(replace(images, read=FailsAfter(images.read, 2, FAILURES[-1])), target, "train", parallel=HERE)
    report = pack(images, target, "train", parallel=HERE)
    assert (report.num_rows, report.damaged) == (NUM, {})


def test_verify_ends_where_a_shard_cannot_be_read_and_lists_one_that_is_gone_or_cut_short(packed, tmp_path):
    manifest, source = open_manifest(str(packed), "train", None)

    class Fails:
        is_remote = True

        def other_tars(self):
            return []

        def read(self, *arguments, **more):
            raise StoreError("nothing answers")

    with pytest.raises(StoreError):
        list(verify(manifest, Fails(), HERE))
    for name in os.listdir(packed / "train"):
        (tmp_path / name).write_bytes((packed / "train" / name).read_bytes())
    os.truncate(tmp_path / manifest.shards[0].name, 700)
    (tmp_path / manifest.shards[1].name).unlink()
    problems = list(verify(manifest, type(source)(tmp_path, source.names), HERE))
    assert len(problems) == 2
    assert "cut short" in problems[0]
    assert "No such file" in problems[1]


def test_a_row_of_parquet_without_bytes_is_damaged_and_a_file_that_is_gone_is_not(tmp_path):
    images = [encode(picture(100 + row, 90, row)) for row in range(4)] + [None]
    table = pa.table({"image": pa.array([{"bytes": image} for image in images])})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=1)
    dataset = open_dataset("parquet", str(tmp_path), "train")
    assert list(dataset.index.reasons) == [4]
    with pytest.raises(ValueError, match="holds no bytes"):
        dataset.read(4)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        trained(dataset)


def test_a_reader_of_a_folder_names_the_file_and_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        FolderReader(tmp_path, ["a.jpg"])(0)  # pyright: ignore[reportArgumentType]
    assert caught.value.filename == f"{tmp_path}/a.jpg"
    assert "put it back, or list the images again" in str(caught.value)


def test_cifar_files_that_are_links_out_of_the_root_are_refused(tmp_path):
    (tmp_path / "root/cifar-10-batches-bin").mkdir(parents=True)
    for number in range(1, 6):
        file = tmp_path / f"root/cifar-10-batches-bin/data_batch_{number}.bin"
        file.write_bytes(bytes(3073 * 2))
    assert open_dataset("auto", str(tmp_path / "root"), "train").index.num_rows == 10
    (tmp_path / "elsewhere").symlink_to(tmp_path / "root")  # the root itself may be a link
    assert open_dataset("auto", str(tmp_path / "elsewhere"), "train").index.num_rows == 10
    file.rename(tmp_path / "outside.bin")
    file.symlink_to(tmp_path / "outside.bin")
    for kind in ("auto", "cifar10"):
        with pytest.raises(DatasetError, match=r"data_batch_5\.bin is a link to .*outside\.bin"):
            open_dataset(kind, str(tmp_path / "root"), "train")


def no_memory(*_):
    raise MemoryError


def test_too_little_memory_is_no_damage_of_an_image(tmp_path, monkeypatch):
    encoded = encode(picture(60, 50, 1))
    (tmp_path / "0.jpg").write_bytes(encoded)
    monkeypatch.setattr("dataloading.headers.decode_stored", no_memory)
    decoder = ImageDecoder(None, size=8, device=torch.device("cpu"), num_threads=1)
    decoder.submit([Window(encoded, (0, 0), (20, 20))])
    for decode in (decoder.collect, lambda: look_at(encoded), lambda: open_dataset("folder", str(tmp_path), "train")):
        with pytest.raises(OSError, match=r"Cannot allocate memory.*it is no damage of it") as caught:
            decode()
        assert caught.value.errno == errno.ENOMEM
    decoder.close()


def test_an_image_that_claims_too_much_is_left_out_where_memory_is_short(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (6000, 5000)).save(file, "PNG")
    monkeypatch.setattr("dataloading.headers.decode_stored", no_memory)
    assert look_at(file.getvalue()).reason == (
        "too large: 6000 x 5000 pixels need more memory than there is; make it smaller"
    )


def test_a_decoder_that_is_closed_decodes_nothing_more():
    begun, go_on, num_decoded = threading.Event(), threading.Event(), []

    def slow(window):
        begun.set()
        go_on.wait(30)
        num_decoded.append(window)
        return torch.zeros((8, 8, 3), dtype=torch.uint8)

    decoder = ImageDecoder(slow, size=8, device=torch.device("cpu"), num_threads=2)
    for _ in range(3):
        decoder.submit([Window(b"", (0, 0), (8, 8), is_plain=True)] * 40)
    assert begun.wait(30)
    closing = threading.Thread(target=decoder.close)
    closing.start()
    while not decoder._is_closed:
        time.sleep(0.001)
    go_on.set()
    closing.join(30)
    assert len(num_decoded) <= 2


def test_too_little_memory_for_a_parquet_file_is_no_damage_of_it(tmp_path, monkeypatch):
    encoded = [encode(picture(60, 50, row)) for row in range(2)]
    pq.write_table(pa.table({"image": encoded}), tmp_path / "train.parquet")

    def no_memory_for_groups(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", no_memory_for_groups)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", no_memory_for_groups)
    with pytest.raises(OSError, match=r"Cannot allocate memory"):
        open_dataset("parquet", str(tmp_path), "train")
