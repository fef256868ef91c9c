"""Images on a real S3 server: the same pixels as from a folder, read once, whatever is killed meanwhile."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import botocore.session
import numpy as np
import pytest
from made_images import encode, picture
from PIL import Image
from seaweed import Seaweed

from cluster.parallel import ProcessMap
from cluster.store import Store
from dataloading.augment import AugmentConfig
from dataloading.cache import Fetched, ShardCache
from dataloading.downloads import HEAD_START_S
from dataloading.index import DatasetError
from dataloading.loader import eval_batches, make_loader
from dataloading.order import OrderConfig
from dataloading.pack import pack
from dataloading.sources import list_images, open_dataset
from dataloading.storage import Storage
from dataloading.verify import verify
from instdisc.cli.main import main

NUM, GLOBAL_BATCH, BUCKET = 90, 16, "s3://images"
BLOCK = OrderConfig("block", lanes=4, window=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        seaweed = Seaweed(tmp_path_factory.mktemp("seaweed"))
        patch = pytest.MonkeyPatch()
        for name, value in seaweed.environment.items():
            patch.setenv(name, value)
        seaweed.start()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield seaweed
    seaweed.kill()
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, num in (("train", NUM), ("val", 12)):
        for number in range(num):
            place = root / split / ("cat" if number % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            image = picture(200 + number, 330 - number, seed=number + len(split))
            (place / f"{number:03d}.jpg").write_bytes(encode(image, quality=92))
    return root


@pytest.fixture(scope="module")
def packed(server, folder):
    """The folder, packed into some twenty shards on the server."""
    uri = f"{BUCKET}/packed"
    for split in ("train", "test"):
        pack(list_images("auto", str(folder), split), Store(uri), split, parallel=ProcessMap(0), shard_mb=0.1)
    return uri


def storage(cache=None):
    return Storage(Store, cache)


def pixels(dataset, steps=12, order=None, offsets=None, pause_s=0.0, global_batch=GLOBAL_BATCH):
    """Return the hash of every image's pixels by (position, row)."""
    offsets = offsets or (0, global_batch)
    loader = make_loader(
        dataset, AugmentConfig(size=32), seed=1, global_batch=global_batch, offsets=offsets, device="cpu",
        num_threads=2, order=order,
    )  # fmt: skip
    found = {}
    try:
        for step, batch in enumerate(islice(loader.batches(0), steps)):
            for place, (row, image) in enumerate(zip(batch.indices_B.tolist(), batch.images_BCHW, strict=True)):
                position = step * global_batch + offsets[0] + place
                found[position, row] = hashlib.sha1(image.numpy().tobytes()).hexdigest()
            time.sleep(pause_s)
    finally:
        loader.close()
    return found


def wait_for_cache(dataset, num_shards, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    source = dataset.read.source
    while sum(source.is_here(number) for number in range(len(source.shards))) < num_shards:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("order", [None, BLOCK], ids=["permutation", "block"])
def test_pixels_are_those_of_the_folder_with_a_cold_cache_a_warm_one_and_none(folder, packed, tmp_path, order):
    near = open_dataset("auto", str(folder), "train")
    expected = pixels(near) if order is None else None
    cache = ShardCache(tmp_path / "cache")
    seen = []
    for place in (cache, cache, None):
        far = open_dataset("auto", packed, "train", storage=storage(place))
        assert far.index.digest == near.index.digest
        seen.append(pixels(far, order=order))
    assert seen[0] == seen[1] == seen[2]
    assert expected is None or seen[0] == expected
    assert far.read.source.traffic.images >= 12 * GLOBAL_BATCH


@pytest.mark.parametrize("order", [None, BLOCK], ids=["permutation", "block"])
def test_the_second_epoch_reads_nothing_from_the_server(packed, tmp_path, order):
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path)))
    traffic, num_shards = far.read.source.traffic, len(far.read.source.shards)
    loader = make_loader(
        far, AugmentConfig(size=32), seed=1, global_batch=GLOBAL_BATCH, offsets=(0, GLOBAL_BATCH), device="cpu",
        num_threads=2, order=order,
    )  # fmt: skip
    batches = loader.batches(0)
    try:
        for _ in range(-(-NUM // GLOBAL_BATCH)):
            next(batches)
        wait_for_cache(far, num_shards)
        for _ in range(6):  # what was planned before the last shard came
            next(batches)
        before = (traffic.images, traffic.shards)
        for _ in range(2 * NUM // GLOBAL_BATCH):
            next(batches)
    finally:
        loader.close()
    assert (traffic.images, traffic.shards) == before
    assert traffic.shards == num_shards


def evaluated(dataset, rows=None):
    """Return the pixels of rows as evaluations see them."""
    batches = eval_batches(
        dataset, range(dataset.index.num_rows) if rows is None else rows, resize=40, crop=32, mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2), batch_size=8, device="cpu", num_threads=2,
    )  # fmt: skip
    return np.concatenate([batch.images_BCHW.numpy().copy() for batch in batches])


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_evaluation_downloads_its_shards_once_and_later_ones_read_nothing_from_the_server(
    folder, packed, tmp_path, split
):
    expected = evaluated(open_dataset("auto", str(folder), split))
    far = open_dataset("auto", packed, split, storage=storage(ShardCache(tmp_path)))
    traffic, num_shards = far.read.source.traffic, len(far.read.source.shards)
    for _ in range(3):
        assert np.array_equal(evaluated(far), expected)
        assert (traffic.images, traffic.shards) == (0, num_shards)
    later = open_dataset("auto", packed, split, storage=storage(ShardCache(tmp_path)))
    assert np.array_equal(evaluated(later), expected)
    assert (later.read.source.traffic.images, later.read.source.traffic.shards) == (0, 0)


def test_an_evaluation_fetches_only_the_shards_of_its_rows(packed, tmp_path):
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path)))
    source, rows = far.read.source, range(5)
    wanted = set(far.read.shard_N[:5].tolist())
    evaluated(far, rows)
    assert {number for number in range(len(source.shards)) if source.is_here(number)} == wanted


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_evaluation_takes_no_room_from_training(folder, packed, tmp_path):
    expected = evaluated(open_dataset("auto", str(folder), "test"))
    cache = ShardCache(tmp_path)
    train, roomy = (open_dataset("auto", packed, split, storage=storage(cache)) for split in ("train", "test"))
    train = train.read.source
    soon = time.time() + 600
    for number in range(3):
        train.fetch(number, soon)
    full = ShardCache(tmp_path, bytes_below(tmp_path))
    test = open_dataset("auto", packed, "test", storage=storage(full))
    started = time.monotonic()
    assert np.array_equal(evaluated(test), expected)
    assert time.monotonic() - started < HEAD_START_S / 2
    assert all(train.is_here(number) for number in range(3))
    # And training takes back what an evaluation has.
    evaluated(roomy)
    assert roomy.read.source.is_here(0)
    tight = ShardCache(tmp_path, bytes_below(tmp_path))
    again = open_dataset("auto", packed, "train", storage=storage(tight)).read.source
    assert again.fetch(3, soon) is Fetched.THERE
    assert not all(roomy.read.source.is_here(number) for number in range(len(roomy.read.source.shards)))
    assert all(train.is_here(number) for number in range(4))


def test_two_jobs_that_share_a_cache_download_every_shard_once(packed, tmp_path):
    script = (
        "import sys, json\nsys.path[:0] = [p for p in sys.argv[2:]]\n"
        "from test_remote import *\n"
        "far = open_dataset('auto', sys.argv[1], 'train', storage=storage(ShardCache(sys.argv[2])))\n"
        "found = pixels(far, steps=40, order=BLOCK, pause_s=0.05)\n"
        "print(json.dumps([far.read.source.traffic.shards, sorted(found.values())]))\n"
    )
    command = [sys.executable, "-c", script, packed, str(tmp_path), os.path.dirname(__file__)]
    command.append(os.path.dirname(os.path.dirname(__file__)))
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(job.communicate(timeout=120)[0]) for job in jobs]
    far = open_dataset("auto", packed, "train", storage=storage())
    assert sum(answer[0] for answer in answers) == len(far.read.source.shards)
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_in_block_order_a_node_downloads_its_share(packed, tmp_path, world_size):
    for rank in range(world_size):
        offsets = (GLOBAL_BATCH * rank // world_size, GLOBAL_BATCH * (rank + 1) // world_size)
        far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path / str(rank))))
        source = far.read.source
        num_shards = len(source.shards)
        pixels(far, steps=3 * NUM // GLOBAL_BATCH, order=BLOCK, offsets=offsets, pause_s=0.1)
        # Two shards at the borders of its lanes may be its neighbours' as well.
        assert source.traffic.shards <= -(-num_shards // world_size) + 2
        assert source.traffic.shards >= num_shards // world_size - 1


def test_a_cache_smaller_than_the_data_is_kept_within_its_limit(folder, packed, tmp_path):
    sizes = [size for key, size in Store(packed).list_sizes("train/") if key.endswith(".tar")]
    limit = sum(sizes) // 2
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path, limit)))
    most, stop = [0], threading.Event()
    narrow = OrderConfig("block", lanes=2, window=2)

    def watch():
        while not stop.is_set():
            sizes_of, seen = {}, set(tmp_path.rglob("*.tar*"))
            for path in seen:
                with contextlib.suppress(FileNotFoundError):
                    sizes_of[path] = path.stat().st_size
            # A walk is no snapshot: one counts during which no file came or went.
            if seen == sizes_of.keys() == set(tmp_path.rglob("*.tar*")):
                most[0] = max(most[0], sum(sizes_of.values()))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = pixels(far, steps=3 * NUM // 2, order=narrow, pause_s=0.05, global_batch=2)
    finally:
        stop.set()
        watcher.join()
    assert 0 < most[0] <= limit
    uncached = open_dataset("auto", packed, "train", storage=storage())
    assert found == pixels(uncached, steps=3 * NUM // 2, order=narrow, global_batch=2)
    # Shards come and go: more downloads than shards, but fewer images read one by one than in all.
    assert far.read.source.traffic.shards > len(sizes)
    assert far.read.source.traffic.images < len(found) // 4


def test_the_server_is_killed_in_mid_download_and_comes_back(server, packed, tmp_path):
    expected = pixels(open_dataset("auto", packed, "train", storage=storage()), steps=20, order=BLOCK)
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path)))

    def cut():
        time.sleep(0.3)
        server.kill()
        time.sleep(2)
        server.start()

    killer = threading.Thread(target=cut)
    killer.start()
    found = pixels(far, steps=20, order=BLOCK, pause_s=0.05)
    killer.join()
    assert found == expected


def test_a_worker_that_is_killed_in_mid_download_is_followed_by_another(packed, tmp_path):
    script = (
        "import sys\nsys.path[:0] = [p for p in sys.argv[3:]]\n"
        "from test_remote import *\n"
        "far = open_dataset('auto', sys.argv[1], 'train', storage=storage(ShardCache(sys.argv[2])))\n"
        "print('started', flush=True)\npixels(far, steps=1000, pause_s=0.01)\n"
    )
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", script, packed, str(tmp_path / "cache"), here, os.path.dirname(here)]
    generator = np.random.default_rng()
    for _ in range(3):
        job = subprocess.Popen(command, stdout=subprocess.PIPE)
        job.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.6))
        job.send_signal(signal.SIGKILL)
        job.communicate()
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path / "cache")))
    assert pixels(far) == pixels(open_dataset("auto", packed, "train", storage=storage()))
    wait = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path / "cache")))
    for number, shard in enumerate(wait.read.source.shards):
        if wait.read.source.is_here(number):
            assert wait.read.source.cache.path(wait.read.source.cache_key(number)).stat().st_size == shard.num_bytes


def test_a_shard_that_is_damaged_on_the_server_never_enters_the_cache(packed, tmp_path, caplog):
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path)))
    source = far.read.source
    key = source.key(2)
    whole = Store(packed).get(key)
    try:
        Store(packed).put(key, whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        with pytest.raises(OSError, match="differ from the manifest"):
            source.fetch(2, time.time())
        assert not source.is_here(2)
        assert [line for line in verify_lines(packed) if "000002.tar" in line]
    finally:
        Store(packed).put(key, whole)
    assert verify_lines(packed) == []


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_that_is_damaged_on_the_server_is_not_trained_on_and_named(packed, tmp_path, caplog, cached):
    far = open_dataset("auto", packed, "train", storage=storage(ShardCache(tmp_path) if cached else None))
    source, row = far.read.source, int(np.flatnonzero(far.read.shard_N == 2)[1])
    key, place = source.key(2), int(far.read.offset_N[row]) + int(far.read.length_N[row]) // 2
    whole = Store(packed).get(key)
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    Image.open(io.BytesIO(damaged[int(far.read.offset_N[row]) :])).convert("RGB")  # it decodes all the same
    try:
        Store(packed).put(key, damaged)
        loader = make_loader(
            far, AugmentConfig(size=32), seed=1, global_batch=NUM, offsets=(0, NUM), device="cpu", num_threads=2
        )
        try:
            batches = list(islice(loader.batches(0), 2))
        finally:
            loader.close()
        for batch in batches:
            assert batch.indices_B[~batch.valid_B].tolist() == [row]
        (bad,) = loader.failed_rows()
        assert (bad.row, bad.name) == (row, far.index.names[row])
        assert "000002.tar differ from the manifest's checksum" in bad.reason
        images = list_images("auto", packed, "train", storage=storage())
        report = pack(images, Store(str(tmp_path / "again")), "train", parallel=ProcessMap(0))
        assert report.num_rows == NUM - 1
        assert "checksum" in report.damaged[far.index.names[row]]
    finally:
        Store(packed).put(key, whole)


def verify_lines(uri):
    from dataloading.packed import open_manifest

    return list(verify(*open_manifest(uri, "train", storage()), ProcessMap(0)))


def test_loose_objects_are_read_like_the_folder(server, folder):
    uri, store = f"{BUCKET}/loose", Store(f"{BUCKET}/loose")
    for path in sorted(folder.rglob("*.jpg")):
        store.put(str(path.relative_to(folder)), path.read_bytes())
    for split in ("train", "test"):
        near = open_dataset("auto", str(folder), split)
        far = open_dataset("auto", uri, split, storage=storage())
        assert near.index.difference(far.index) is None
        assert far.index.digest == near.index.digest
        assert far.index.heights_N.tolist() == near.index.heights_N.tolist()
    assert pixels(open_dataset("auto", uri, "train", storage=storage()), steps=4) == pixels(
        open_dataset("auto", str(folder), "train"), steps=4
    )
    packed_again = pack(
        list_images("auto", uri, "train", storage=storage()), Store(f"{BUCKET}/again"), "train",
        parallel=ProcessMap(2), shard_mb=0.1,
    )  # fmt: skip
    assert packed_again.digest == open_dataset("auto", str(folder), "train").index.digest


ODD_NAMES = ("9.41\u202fAM.jpg", "no-break\u00a0space.jpg", "tab\tnewline\n.jpg", "50% #1 ü?.jpg")


def test_objects_with_odd_names_are_images_like_others(server, folder, tmp_path):
    uri = f"{BUCKET}/odd"
    files = sorted(folder.rglob("*.jpg"))[: len(ODD_NAMES)]
    client = botocore.session.get_session().create_client("s3", endpoint_url=server.endpoint)
    for name, path in zip(ODD_NAMES, files, strict=True):
        client.put_object(Bucket=BUCKET.removeprefix("s3://"), Key=f"odd/{name}", Body=path.read_bytes())
    far = open_dataset("auto", uri, "train", storage=storage())
    assert sorted(far.index.names) == sorted(ODD_NAMES)
    assert far.index.reasons == {}
    source = list_images("auto", uri, "train", storage=storage())
    report = pack(source, Store(str(tmp_path)), "train", parallel=ProcessMap(0), shard_mb=0.1)
    assert report.damaged == {}
    near = open_dataset("auto", str(tmp_path), "train")
    assert near.index.digest == far.index.digest
    by_name = dict(zip(ODD_NAMES, files, strict=True))
    assert [near.read(row) for row in range(4)] == [by_name[name].read_bytes() for name in near.index.names]


ODD_PLACES = (
    "cat/1.jpg",
    "dog/2.JPG",
    "dog/jpg",
    "dog/.hidden.jpg",
    ".git/3.jpg",
    "jpg",
    "some.tar",
    "tar",
    "cat/x.txt",
)


def test_names_mean_the_same_in_a_folder_and_in_a_bucket(server, folder, tmp_path):
    store, image = Store(f"{BUCKET}/places"), sorted(folder.rglob("*.jpg"))[0].read_bytes()
    for name in ODD_PLACES:
        store.put(name, image)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    near = open_dataset("auto", str(tmp_path), "train")
    far = open_dataset("auto", store.uri, "train", storage=storage())
    assert list(near.index.names) == list(far.index.names) == ["cat/1.jpg", "dog/2.JPG"]
    assert near.index.class_names == far.index.class_names == ("cat", "dog")
    assert near.index.difference(far.index) is None
    assert near.index.digest == far.index.digest


def test_tars_on_the_server_are_read_in_place(packed):
    store = Store(f"{BUCKET}/tars")
    for key, _ in Store(packed).list_sizes("train/"):
        if key.endswith(".tar"):
            store.put(key, Store(packed).get(key))
    tars = open_dataset("auto", f"{BUCKET}/tars", "train", storage=storage())
    far = open_dataset("auto", packed, "train", storage=storage())
    assert tars.index.num_rows == NUM
    by_name = {name.split(".tar/", 1)[1]: row for row, name in enumerate(tars.index.names)}
    for row in range(0, NUM, 17):
        assert tars.read(by_name[far.index.names[row]]) == far.read(row)


@pytest.mark.parametrize("kind", ["auto", "webdataset", "packed"])
def test_a_pack_to_the_server_that_was_interrupted_is_not_taken_for_a_whole_webdataset(packed, folder, kind):
    uri = f"{BUCKET}/interrupted-{kind}"

    def end_after_two(function, items):
        yield from map(function, islice(items, 2))
        raise KeyboardInterrupt

    images = list_images("auto", str(folder), "train")
    with pytest.raises(KeyboardInterrupt):
        pack(images, Store(uri), "train", parallel=end_after_two, shard_mb=0.1)
    with pytest.raises(DatasetError, match=r"not packed to the end \(s3://.*/train/\.parts/plan\)"):
        open_dataset(kind, uri, "train", storage=storage())
    pack(images, Store(uri), "train", parallel=ProcessMap(0), shard_mb=0.1)
    assert open_dataset(kind, uri, "train", storage=storage()).index.num_rows == NUM


def test_verify_names_both_splits_where_a_uri_is_mistyped(packed, capsys):
    assert main(["verify", f"{packed}-not", "--workers", "0"]) == 2
    assert "train/manifest.arrow nor test/manifest.arrow; correct the path or URI" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        (f"{BUCKET}/nothing-here", "train", "found no objects"),
        (f"{BUCKET}/packed", "elsewhere", "split"),
        ("s3://no-such-bucket/x", "train", "found no objects|no-such-bucket"),
    ],
)
def test_a_place_without_images_is_refused(packed, uri, split, message):
    with pytest.raises((DatasetError, OSError), match=message):
        open_dataset("auto", uri, split, storage=storage())


def test_a_wrong_secret_is_told_at_once(packed, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter3hunter3")
    started = time.monotonic()
    with pytest.raises(OSError, match="cannot") as caught:
        open_dataset("auto", packed, "train", storage=storage())
    assert time.monotonic() - started < 8
    assert "hunter3" not in str(caught.value)


def test_a_server_that_never_answered_is_given_up_soon(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    started = time.monotonic()
    with pytest.raises(OSError, match="cannot"):
        open_dataset("auto", f"{BUCKET}/packed", "train", storage=storage())
    assert time.monotonic() - started < 40
