"""What the cache keeps of a far data set: healed where it lost bytes, fetched without waste, given up at once."""

import contextlib
import hashlib
import os
import threading
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from made_images import encode, odd_sized_jpegs, picture

from cluster.parallel import ProcessMap
from cluster.store import Store
from dataloading.augment import AugmentConfig
from dataloading.cache import Fetched, ShardCache
from dataloading.cache_folder import MARK
from dataloading.downloads import HEAD_START_S, EvaluationDownloads, ShardDownloads
from dataloading.index import ShardLayout
from dataloading.loader import eval_batches, make_loader
from dataloading.order import OrderConfig, Permutation, make_order
from dataloading.pack import pack
from dataloading.shard_reader import DownloadStopped
from dataloading.sources import list_images, open_dataset
from dataloading.storage import Storage
from instdisc.cli.main import main
from instdisc.images import storage_of

NUM, FAR = 24, "s3://photos"


class Far:
    """A store that counts what is read, and where `gate` says, keeps whoever reads waiting."""

    def __init__(self, uri):
        self.store, self.gate, self.num_read, self.waiting = Store(uri), threading.Event(), 0, threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, *arguments):
        self.num_read += 1
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(60)
        return self.store.get(*arguments)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root, target = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("packed")
    (root / "train").mkdir()
    for row, encoded in enumerate(odd_sized_jpegs(NUM)):
        (root / "train" / f"{row:02d}.jpg").write_bytes(encoded)
    (root / "train" / f"{NUM - 1:02d}.jpg").rename(root / "gone")
    (root / "train" / f"{NUM - 1:02d}.png").write_bytes(encode(picture(90, 80, 1), "PNG"))
    images = list_images("folder", str(root), "train")
    pack(images, Store(str(target)), "train", parallel=ProcessMap(0), shard_mb=0.02)
    return target


@pytest.fixture
def far(packed):
    objects = Far(str(packed))
    yield objects
    objects.gate.set()


def opened(far, cache):
    return open_dataset("packed", FAR, "train", storage=Storage(lambda uri: far, cache))


def filled(far, folder):
    """Return the far data set with all its shards in the cache."""
    dataset = opened(far, ShardCache(folder))
    for number in range(len(dataset.read.source.shards)):
        assert dataset.read.source.fetch(number, time.time() + 60) is Fetched.THERE
    return dataset


def trained(dataset, augment=None, steps=4):
    """Return the hashes of the images of some batches, all of which must be valid."""
    augment = augment or AugmentConfig(size=16)
    loader = make_loader(
        dataset, augment, seed=1, global_batch=NUM, offsets=(0, NUM), device="cpu", num_threads=2, backend="torch"
    )
    try:
        batches = list(islice(loader.batches(0), steps))
    finally:
        loader.close()
    assert all(batch.valid_B.all() for batch in batches)
    assert loader.failed_rows() == []
    return [hashlib.sha1(batch.images_BCHW.numpy().tobytes()).hexdigest() for batch in batches]


def evaluated(dataset):
    batches = eval_batches(
        dataset, range(NUM), resize=16, crop=16, mean=(0,) * 3, std=(1,) * 3, batch_size=8, device="cpu", num_threads=2
    )
    found = [(batch.images_BCHW.numpy().tobytes(), bool(batch.valid_B.all())) for batch in batches]
    assert all(valid for _, valid in found)
    return [hashlib.sha1(images).hexdigest() for images, _ in found]


def damage(path, how):
    data = path.read_bytes()
    if how == "all zeros":
        path.write_bytes(bytes(len(data)))
    else:
        path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("how", ["all zeros", "cut off"])
@pytest.mark.parametrize("work", [trained, evaluated])
def test_shards_in_the_cache_that_lost_bytes_are_read_from_the_storage_and_fetched_again(far, tmp_path, work, how):
    expected = work(opened(far, None))
    dataset = filled(far, tmp_path)
    tars = sorted(tmp_path.rglob("*.tar"))
    whole = [tar.read_bytes() for tar in tars]
    for tar in tars[:2]:
        damage(tar, how)
    assert work(dataset) == expected
    again = opened(far, ShardCache(tmp_path))
    for number in range(2):
        assert again.read.source.fetch(number, time.time()) is Fetched.THERE
    assert [tar.read_bytes() for tar in tars] == whole


def test_local_views_get_the_storages_bytes_too(far, tmp_path):
    augment = AugmentConfig(size=16, num_local_views=2, local_size=8)
    expected = trained(opened(far, None), augment)
    dataset = filled(far, tmp_path)
    damage(next(tmp_path.rglob("*.tar")), "all zeros")
    assert trained(dataset, augment) == expected


def test_an_image_that_only_its_decoder_finds_wrong_is_healed(far, tmp_path):
    """Its header is whole."""
    dataset, row = filled(far, tmp_path), NUM - 1
    right = dataset.read(row)
    assert right.startswith(b"\x89PNG")
    path = dataset.read.source.cache.path(dataset.read.source.cache_key(int(dataset.read.shard_N[row])))
    with open(path, "r+b") as file:
        file.seek(int(dataset.read.offset_N[row]) + len(right) // 2)
        file.write(bytes(100))
    assert evaluated(dataset) == evaluated(opened(far, None))
    assert dataset.read(row) == right


def test_a_disk_that_loses_a_shard_again_and_again_gets_it_no_more(far, tmp_path):
    dataset = filled(far, tmp_path)
    source, row = dataset.read.source, 0
    shard = int(dataset.read.shard_N[row])
    for _ in range(2):
        damage(source.cache.path(source.cache_key(shard)), "all zeros")
        assert (
            dataset.read.repaired(row, b"wrong")
            == Store(far.uri).get(source.key(shard))[int(dataset.read.offset_N[row]) :][
                : int(dataset.read.length_N[row])
            ]
        )
        source.fetch(shard, time.time())
    assert source.fetch(shard, time.time()) is Fetched.REFUSED
    assert not source.is_here(shard)


@pytest.mark.parametrize("how", ["all zeros", "cut off", "no bytes"])
def test_a_manifest_in_the_cache_that_lost_bytes_is_fetched_again(far, tmp_path, how):
    expected = opened(far, None).index
    filled(far, tmp_path)
    (kept,) = (tmp_path / "manifests").iterdir()
    whole = kept.read_bytes()
    if how == "no bytes":
        kept.write_bytes(b"")
    else:
        damage(kept, how)
    found = opened(far, ShardCache(tmp_path)).index
    assert found.difference(expected) is None
    assert kept.read_bytes() == whole


def test_packing_does_not_write_down_what_a_cache_lost(far, tmp_path):
    """New checksums of wrong bytes would make them right for ever."""
    filled(far, tmp_path / "cache")
    for tar in (tmp_path / "cache").rglob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    images = list_images("packed", FAR, "train", storage=Storage(lambda uri: far, ShardCache(tmp_path / "cache")))
    report = pack(images, Store(str(tmp_path / "again")), "train", parallel=ProcessMap(0), shuffle=False)
    assert (report.num_rows, report.damaged) == (NUM, {})
    near, expected = open_dataset("packed", str(tmp_path / "again"), "train"), opened(far, None)
    assert [near.read(row) for row in range(NUM)] == [expected.read(row) for row in range(NUM)]


@pytest.mark.parametrize("block", [False, True])
def test_closing_a_loader_does_not_wait_for_a_storage(far, tmp_path, block):
    dataset = opened(far, ShardCache(tmp_path))
    far.gate.clear()
    order = OrderConfig("block", lanes=2, window=2) if block else None
    loader = make_loader(
        dataset, AugmentConfig(size=16), seed=1, global_batch=8, offsets=(0, 8), device="cpu", num_threads=2,
        backend="torch", order=order,
    )  # fmt: skip
    consumer = threading.Thread(target=lambda: _drain(loader.batches(0)), daemon=True)
    consumer.start()
    assert far.waiting.wait(10)
    started_s = time.monotonic()
    loader.close()
    assert time.monotonic() - started_s < 1.0


def _drain(batches):
    with contextlib.suppress(BaseException):  # the loader is closed under it
        next(batches)


def test_a_download_that_is_stopped_leaves_at_once_and_nothing_behind(far, tmp_path):
    source, stop = opened(far, ShardCache(tmp_path)).read.source, threading.Event()
    far.gate.clear()
    threading.Timer(0.2, stop.set).start()
    started_s = time.monotonic()
    with pytest.raises(DownloadStopped):
        source.fetch(0, time.time(), stop)
    assert time.monotonic() - started_s < 2.0
    assert os.listdir(tmp_path / MARK / "parts") == []
    far.gate.set()
    assert source.fetch(0, time.time()) is Fetched.THERE


def test_closing_an_evaluations_downloads_does_not_wait_for_a_storage(far, tmp_path):
    source = opened(far, ShardCache(tmp_path)).read.source
    far.gate.clear()
    downloads = EvaluationDownloads(source, range(3))
    threading.Thread(target=downloads.start, daemon=True).start()
    assert far.waiting.wait(10)
    started_s = time.monotonic()
    downloads.close()
    assert time.monotonic() - started_s < 0.5


def test_the_head_start_of_an_evaluation_ends_when_it_is_asked_to(far, tmp_path):
    source = opened(far, ShardCache(tmp_path)).read.source
    far.gate.clear()
    downloads, asked = EvaluationDownloads(source, range(3)), threading.Event()
    started_s = time.monotonic()
    threading.Timer(0.2, asked.set).start()
    downloads.start(asked.is_set)
    assert time.monotonic() - started_s < HEAD_START_S / 3
    downloads.close()


class FullCache:
    """Shards of which none finds room."""

    cache, num_lost = None, 0

    def __init__(self, num_shards):
        self.shards, self.calls = [SimpleNamespace(name=str(n)) for n in range(num_shards)], 0

    def is_here(self, shard):
        return False

    def fetch(self, shard, next_use, stop):
        self.calls += 1
        return Fetched.NO_ROOM


def downloads_of(source, num_shards, block):
    layout = ShardLayout(np.arange(num_shards), np.full(num_shards, 10), None)
    order = Permutation(10 * num_shards, 0)
    if block:
        dataset = SimpleNamespace(shards=layout, index=SimpleNamespace(num_rows=10 * num_shards, source="made"))
        order = make_order(dataset, OrderConfig("block", lanes=2, window=2), seed=0, global_batch=10)
    return ShardDownloads(source, layout, order, 10, (0, 10))


@pytest.mark.parametrize("block", [False, True])
def test_a_full_cache_is_asked_for_room_now_and_then_and_not_for_every_shard(block):
    """Each question looks at all files of the cache."""
    source = FullCache(500)
    downloads = downloads_of(source, 500, block)
    downloads.start(0)
    time.sleep(1.2)
    downloads.close()
    assert 1 <= source.calls <= 8


def test_a_shard_that_was_lost_is_fetched_again_while_training_goes_on(far, tmp_path):
    dataset = filled(far, tmp_path)
    source = dataset.read.source
    assert dataset.shards is not None
    downloads = ShardDownloads(source, dataset.shards, Permutation(NUM, 1), NUM, (0, NUM))
    downloads.start(0)
    time.sleep(0.2)
    damage(source.cache.path(source.cache_key(1)), "all zeros")
    row = int(np.flatnonzero(dataset.read.shard_N == 1)[0])
    assert dataset.read.repaired(row, b"wrong") is not None
    deadline = time.monotonic() + 10
    while not source.is_here(1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    downloads.close()
    assert replace(dataset).read(row) == opened(far, None).read(row)


def test_verify_reads_the_place_that_it_is_asked_about_and_no_copy_of_it(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTDISC_CACHE", str(tmp_path))
    place = Store(f"memory://{tmp_path.name}")
    for key, _ in Store(str(packed)).list_sizes():
        place.put(key, Store(str(packed)).get(key))
    source = open_dataset("packed", place.uri, "train", storage=storage_of()).read.source
    assert source.fetch(0, time.time() + 60) is Fetched.THERE
    damage(source.cache.path(source.cache_key(0)), "all zeros")
    assert main(["verify", place.uri, "--workers", "0"]) == 0
    place.put(source.key(0), bytes(source.shards[0].num_bytes))
    assert source.fetch(0, time.time() + 60) is Fetched.THERE
    assert main(["verify", place.uri, "--workers", "0"]) == 1
    assert source.shards[0].name in capsys.readouterr().out
