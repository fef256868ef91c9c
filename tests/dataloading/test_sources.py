import errno
import fcntl
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataloading import cifar, headers
from dataloading.index import DatasetChanged, DatasetError, DatasetIndex
from dataloading.parquet_reader import ParquetReader
from dataloading.sources import open_dataset
from instdisc.cli.main import main

RNG = np.random.default_rng(0)


def pixels_of(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels_HWC, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, kind)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def png_that_claims(width, height):
    """Return a PNG of a few bytes whose header claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def photos(tmp_path):
    """A folder with both splits, two classes, JPEG and PNG of several sizes."""
    root = tmp_path / "photos"
    for split, sizes in (("train", [(100, 120), (130, 90), (60, 70)]), ("val", [(100, 101)])):
        for name in ("cat", "dog"):
            for number, (height, width) in enumerate(sizes):
                kind = ("JPEG", "PNG")[number % 2]
                ending = ("JPEG", "png")[number % 2]
                write(root / split / name / "deep" / f"{number}.{ending}", encoded(pixels_of(height, width), kind))
    return root


def test_a_folder_has_its_images_sorted_with_sizes_and_labels(photos):
    dataset = open_dataset("auto", str(photos), "train")
    index = dataset.index
    names = [f"{name}/deep/{file}" for name in ("cat", "dog") for file in ("0.JPEG", "1.png", "2.JPEG")]
    assert list(index.names) == names
    assert index.heights_N.tolist() == [100, 130, 60] * 2
    assert index.widths_N.tolist() == [120, 90, 70] * 2
    assert index.labels_N is not None
    assert index.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.class_names == ("cat", "dog")
    assert index.num_bytes_N is not None
    assert index.num_bytes_N.tolist() == [(photos / "train" / name).stat().st_size for name in names]
    assert not index.bad_N.any()
    assert dataset.pixels_NHWC is None
    assert dataset.read is not None
    assert [dataset.read(row) for row in range(6)] == [(photos / "train" / name).read_bytes() for name in names]


def test_the_test_split_is_val_and_numbers_its_classes_as_train_does(photos):
    write(photos / "train" / "ant" / "x.png", encoded(pixels_of(9, 9)))
    test, train = (open_dataset("folder", str(photos), split).index for split in ("test", "train"))
    assert test.class_names == train.class_names == ("ant", "cat", "dog")
    assert test.labels_N is not None
    assert test.labels_N.tolist() == [1, 2]


def test_a_folder_without_images_is_no_class(photos):
    before = {split: open_dataset("folder", str(photos), split).index for split in ("train", "test")}
    write(photos / "val" / "zebra" / "deep" / "x.png", encoded(pixels_of(9, 9)))
    for split in ("train", "val"):
        (photos / split / "ant" / "deeper").mkdir(parents=True)
        write(photos / split / "bee" / "notes.txt", b"no image")
    for split, index in before.items():
        now = open_dataset("folder", str(photos), split).index
        assert now.class_names == ("cat", "dog", "zebra")
        assert now.labels_N.tolist()[: index.num_rows] == index.labels_N.tolist()
    (photos / "train").rename(photos / "classes")
    (photos / "val").rename(photos.parent / "val")
    assert open_dataset("folder", str(photos / "classes"), "train").index.class_names == ("cat", "dog")


def test_the_index_does_not_depend_on_where_the_folder_is(photos):
    before = open_dataset("folder", str(photos), "train").index
    moved = photos.rename(photos.parent / "moved")
    assert open_dataset("folder", str(moved), "train").index.digest == before.digest


def test_images_without_class_folders_have_no_labels(tmp_path):
    for name in ("b.png", "a.PNG", "sub/c.jpg"):
        write(tmp_path / name, encoded(pixels_of(100, 120)))
    index = open_dataset("auto", str(tmp_path), "train").index
    assert list(index.names) == ["a.PNG", "b.png", "sub/c.jpg"]
    assert index.labels_N is None
    assert index.class_names == ()


def test_a_class_called_train_is_refused_until_it_is_said_to_be_one(tmp_path):
    for name in ("bus", "train"):
        write(tmp_path / name / "1.png", encoded(pixels_of(8, 8)))
    with pytest.raises(DatasetError, match=r'a split, or one of the classes\? Classes: --data\.train_split "\."'):
        open_dataset("folder", str(tmp_path), "train")
    assert open_dataset("folder", str(tmp_path), ".").index.class_names == ("bus", "train")
    assert list(open_dataset("folder", str(tmp_path), "./train").index.names) == ["1.png"]
    assert open_dataset("folder", str(tmp_path), "train", layout_rule=1).index.class_names == ("bus", "train")


def test_hidden_files_other_files_and_pipes_are_ignored(photos):
    for name in (".hidden.png", ".git/x.png", "notes.txt", "._a.jpg"):
        write(photos / "train" / "cat" / name, b"x")
    os.mkfifo(photos / "train" / "cat" / "pipe.png")
    assert open_dataset("folder", str(photos), "train").index.num_rows == 6


def test_links_are_followed_inside_the_root_and_refused_outside(photos, tmp_path):
    os.symlink(photos / "val" / "cat", photos / "train" / "linked")
    os.symlink(photos / "train", photos / "train" / "cat" / "loop")
    index = open_dataset("folder", str(photos), "train").index
    assert "linked/deep/0.JPEG" in index.names
    assert index.num_rows == 7
    write(tmp_path / "outside.png", encoded(pixels_of(8, 8)))
    os.symlink(tmp_path / "outside.png", photos / "train" / "cat" / "evil.png")
    with pytest.raises(DatasetError, match=r"evil\.png is a link to .*outside\.png.*no path outside the data root"):
        open_dataset("folder", str(photos), "train")


def test_damaged_images_keep_their_rows_with_a_reason_and_without_warnings(photos):
    cat = photos / "train" / "cat" / "deep"
    write(cat / "3.png", b"")
    write(cat / "4.png", png_that_claims(60_000, 60_000))
    write(cat / "5.png", png_that_claims(12_000, 12_000))  # here Pillow only warns
    write(cat / "6.jpg", b"GIF89a" + bytes(50))
    whole = encoded(pixels_of(200, 200), "JPEG")
    write(cat / "7.jpg", whole[: len(whole) // 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = open_dataset("folder", str(photos), "train").index
    assert not caught
    assert index.num_rows == 11
    assert np.flatnonzero(index.bad_N).tolist() == sorted(index.reasons) == [3, 4, 5, 6]
    assert index.heights_N[3:8].tolist() == index.widths_N[3:8].tolist() == [0, 0, 0, 0, 200]
    assert "DecompressionBomb" in index.reasons[4]
    assert "12000 x 12000" in index.reasons[5]


def test_a_saved_index_spares_the_headers_and_is_checked(photos, tmp_path, monkeypatch):
    first = open_dataset("folder", str(photos), "train").index
    first.save(tmp_path / "index.parquet")
    saved = DatasetIndex.load(tmp_path / "index.parquet")

    def fail(*_args, **_kwargs):
        raise AssertionError("a header was read")

    with monkeypatch.context() as patch:
        patch.setattr(headers.Image, "open", fail)
        dataset = open_dataset("folder", str(photos), "train", index=saved)
    assert dataset.index is saved
    assert dataset.read is not None
    assert dataset.read(0) == (photos / "train/cat/deep/0.JPEG").read_bytes()
    (photos / "train/dog/deep/1.png").unlink()
    write(photos / "train/dog/deep/9.png", b"new")
    with pytest.raises(DatasetChanged, match=r"1 added \(dog/deep/9\.png\); 1 removed \(dog/deep/1\.png\)"):
        open_dataset("folder", str(photos), "train", index=saved)


def test_small_images_of_one_size_are_held_in_memory(tmp_path):
    images = [pixels_of(24, 16) for _ in range(150)]
    for number, image in enumerate(images):
        write(tmp_path / f"{number:03d}.png", encoded(image))
    done = []
    dataset = open_dataset("folder", str(tmp_path), "train", on_progress=lambda *counts: done.append(counts))
    assert dataset.read is None
    assert dataset.pixels_NHWC is not None
    np.testing.assert_array_equal(dataset.pixels_NHWC, np.stack(images))
    assert (done[0], done[-1]) == ((0, 150), (150, 150))
    assert done == sorted(done)
    write(tmp_path / "150.png", encoded(pixels_of(24, 17)))
    other = open_dataset("folder", str(tmp_path), "train")
    assert other.pixels_NHWC is None
    assert other.read is not None
    (tmp_path / "150.png").unlink()
    again = open_dataset("folder", str(tmp_path), "train", index=dataset.index)
    np.testing.assert_array_equal(again.pixels_NHWC, dataset.pixels_NHWC)


def test_a_damaged_small_image_is_bad_only_where_pixels_are_held(tmp_path):
    whole = encoded(pixels_of(30, 30))
    write(tmp_path / "0.png", whole[: len(whole) // 2])
    write(tmp_path / "1.png", whole)
    dataset = open_dataset("folder", str(tmp_path), "train")
    assert dataset.pixels_NHWC is not None
    assert dataset.index.bad_N.tolist() == [True, False]
    assert dataset.index.heights_N.tolist() == [30, 30]
    assert not dataset.pixels_NHWC[0].any()
    write(tmp_path / "2.png", encoded(pixels_of(30, 31)))
    assert not open_dataset("folder", str(tmp_path), "train").index.bad_N.any()


def test_grey_palette_and_16_bit_images_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey * 1000).save(tmp_path / "0.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint8)).convert("P").save(tmp_path / "2.png")
    pixels = open_dataset("folder", str(tmp_path), "train").pixels_NHWC
    assert pixels is not None
    for row, expected in enumerate((grey * 1000 >> 8, grey, grey)):
        np.testing.assert_array_equal(pixels[row], np.repeat(expected[:, :, None], 3, axis=2))


def write_cifar(root, kind, records_of_file, seed=0):
    """Write a small CIFAR in binary form; returns (images_NHWC, labels_N) per split."""
    rng = np.random.default_rng(seed)
    result = {}
    for split, files in kind.files.items():
        images, labels = [], []
        for file in files:
            raw = b""
            for _ in range(records_of_file):
                image, label = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), int(rng.integers(0, 10))
                planes = [image[:, :, channel].tobytes() for channel in range(3)]
                raw += bytes([7] * (kind.label_bytes - 1) + [label]) + b"".join(planes)
                images.append(image)
                labels.append(label)
            write(root / file, raw)
        result[split] = np.stack(images), labels
    return result


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_cifar_is_read_from_its_binary_form(tmp_path, name, in_folder):
    kind = cifar.KINDS[name]
    expected = write_cifar(tmp_path / kind.folder if in_folder else tmp_path, kind, 3)
    for split, (images, labels) in expected.items():
        dataset = open_dataset("auto", str(tmp_path), split)
        assert dataset.pixels_NHWC is not None
        np.testing.assert_array_equal(dataset.pixels_NHWC, images)
        assert dataset.index.labels_N is not None
        assert dataset.index.labels_N.tolist() == labels
        assert len(dataset.index.class_names) == {"cifar10": 10, "cifar100": 100}[name]
        assert dataset.index.names[2] == f"{kind.files[split][0]}/2"
    first = open_dataset("auto", str(tmp_path), "train", max_rows=2)
    np.testing.assert_array_equal(first.pixels_NHWC, expected["train"][0][:2])


def test_cifar_of_a_wrong_size_or_missing_or_changed_is_refused(tmp_path):
    kind = cifar.CIFAR10
    with pytest.raises(DatasetError, match=r"cifar-10-binary\.tar\.gz \(md5 c32a1d4ab5d03f1284b67883e8d87530\)"):
        open_dataset("cifar10", str(tmp_path), "train")
    write_cifar(tmp_path, kind, 1)
    saved = open_dataset("cifar10", str(tmp_path), "train").index
    write_cifar(tmp_path, kind, 1, seed=1)
    with pytest.raises(DatasetChanged, match=r"contents of the images differ; \d with another label"):
        open_dataset("cifar10", str(tmp_path), "train", index=saved)
    with open(tmp_path / "data_batch_3.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetError, match=r"data_batch_3\.bin: found 3,074 bytes, expected a multiple of 3,073"):
        open_dataset("cifar10", str(tmp_path), "train")
    write(tmp_path / "data_batch_3.bin", bytes([10]) + bytes(3072))
    with pytest.raises(DatasetError, match="row 2: found label 10, expected below 10"):
        open_dataset("cifar10", str(tmp_path), "train")


@pytest.fixture
def http_root(tmp_path):
    """The address of a web server on this machine that hands out `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_cifar_is_downloaded_only_on_request_and_checked(tmp_path, http_root, monkeypatch):
    images, _ = write_cifar(tmp_path / cifar.CIFAR10.folder, cifar.CIFAR10, 2)["train"]
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / cifar.CIFAR10.folder, cifar.CIFAR10.folder)
    md5 = hashlib.md5((tmp_path / "cifar.tar.gz").read_bytes()).hexdigest()
    kind = replace(cifar.CIFAR10, url=f"{http_root}/cifar.tar.gz", md5=md5)
    monkeypatch.setitem(cifar.KINDS, "cifar10", kind)
    new = tmp_path / "new"
    with pytest.raises(DatasetError, match=r"does not exist.* or fetch http.* and unpack it in .*new"):
        open_dataset("cifar10", str(new), "train")
    with ThreadPoolExecutor(4) as pool:  # as the workers of one machine: one of them fetches
        datasets = pool.map(lambda _: open_dataset("cifar10", str(new), "train", download=True), range(4))
    for dataset in datasets:
        np.testing.assert_array_equal(dataset.pixels_NHWC, images)
    assert [path.name for path in new.iterdir()] == [kind.folder]
    other = tmp_path / "other"
    monkeypatch.setitem(cifar.KINDS, "cifar10", replace(kind, md5="0" * 32))
    with pytest.raises(DatasetError, match=r"cannot download .*Without a network: fetch"):
        open_dataset("cifar10", str(other), "train", download=True)
    assert not other.exists()
    write(other / "cat.jpg", b"a folder of somebody's photographs")
    with pytest.raises(DatasetError, match=r"found cat.jpg in .*other"):
        open_dataset("cifar10", str(other), "train", download=True)
    assert os.listdir(other) == ["cat.jpg"]


def cifar_at(http_root, tmp_path, monkeypatch):
    """Have an archive on the web server be CIFAR-10."""
    write_cifar(tmp_path / cifar.CIFAR10.folder, cifar.CIFAR10, 2)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / cifar.CIFAR10.folder, cifar.CIFAR10.folder)
    md5 = hashlib.md5((tmp_path / "cifar.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.KINDS, "cifar10", replace(cifar.CIFAR10, url=f"{http_root}/cifar.tar.gz", md5=md5))


def test_cifar_is_downloaded_to_a_file_system_without_locks(tmp_path, http_root, monkeypatch):
    cifar_at(http_root, tmp_path, monkeypatch)

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    new = tmp_path / "new"
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: open_dataset("cifar10", str(new), "train", download=True), range(4)))
    assert {dataset.index.num_rows for dataset in datasets} == {10}
    assert os.listdir(new) == [cifar.CIFAR10.folder]


def test_a_download_of_cifar_that_hangs_ends_the_wait_of_others_and_what_a_killed_one_left_goes(
    tmp_path, http_root, monkeypatch
):
    cifar_at(http_root, tmp_path, monkeypatch)
    monkeypatch.setattr("dataloading.cifar_download._OTHER_S", 0.2)
    new = tmp_path / "new"
    write(new / ".download-killed" / "archive", b"half")
    descriptor = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match=r"another process has been at it in .*end it.*Without a network"):
            open_dataset("cifar10", str(new), "train", download=True)
    finally:
        os.close(descriptor)
    open_dataset("cifar10", str(new), "train", download=True)
    assert os.listdir(new) == [cifar.CIFAR10.folder]


def test_the_pickled_form_of_cifar_is_never_read(tmp_path):
    write(tmp_path / "cifar-10-batches-py" / "data_batch_1", pickle.dumps({"data": 1}))
    for kind in ("auto", "cifar10"):
        with pytest.raises(DatasetError, match="pickled form"):
            open_dataset(kind, str(tmp_path), "train")


@pytest.fixture
def parquet(tmp_path):
    """Two parquet files of the train split in row groups of 3, one of the test split; images of several sizes."""
    images = [encoded(pixels_of(100 + number, 110), "JPEG") for number in range(12)]
    for name, rows in (("train-00000-of-00002", range(7)), ("train-00001-of-00002", range(7, 10)), ("test", (10, 11))):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [images[row] for row in rows], [row % 3 for row in rows])
    return tmp_path, images


def write_parquet(path, images, labels, *, image="image", label="label", names=("x", "y", "z")):
    path.parent.mkdir(parents=True, exist_ok=True)
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {image: pa.array([{"bytes": data, "path": None} for data in images], struct_type), label: labels},
    )
    about = {"info": {"features": {label: {"names": list(names), "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path, row_group_size=3)


def test_parquet_rows_are_in_file_order_and_read_from_many_threads(parquet):
    root, images = parquet
    dataset = open_dataset("auto", str(root), "train")
    assert list(dataset.index.names) == [f"data/train-00000-of-00002.parquet/{row}" for row in range(7)] + [
        f"data/train-00001-of-00002.parquet/{row}" for row in range(3)
    ]
    assert dataset.index.heights_N.tolist() == list(range(100, 110))
    assert dataset.index.labels_N is not None
    assert dataset.index.labels_N.tolist() == [row % 3 for row in range(10)]
    assert dataset.index.class_names == ("x", "y", "z")
    assert dataset.read is not None
    assert dataset.pixels_NHWC is None
    rows = np.random.default_rng(1).integers(0, 10, 300).tolist()
    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(dataset.read, rows)) == [images[row] for row in rows]
    assert pickle.loads(pickle.dumps(dataset.read))(9) == images[9]
    assert open_dataset("parquet", str(root), "test").index.num_rows == 2


def test_the_parquet_reader_keeps_no_more_bytes_than_allowed(parquet):
    root, images = parquet
    paths = tuple(sorted((root / "data").glob("train-*.parquet")))
    reader = ParquetReader(paths, (0, 7, 10), "image.bytes", max_kept_bytes=3 * max(map(len, images)) + 100)
    assert [reader(row) for row in (9, 0, 5, 1, 6, 8)] == [images[row] for row in (9, 0, 5, 1, 6, 8)]
    assert len(reader._kept) == 1


def test_by_the_older_rule_max_rows_takes_the_first_rows_of_parquet(parquet):
    root, images = parquet
    dataset = open_dataset("parquet", str(root), "train", max_rows=8, layout_rule=1)
    assert dataset.index.num_rows == 8
    assert dataset.read is not None
    assert dataset.read(7) == images[7]


def test_one_parquet_file_is_a_data_set_and_small_images_are_decoded(tmp_path):
    images = [pixels_of(32, 32) for _ in range(10)]
    data = [encoded(image) for image in images]
    write_parquet(tmp_path / "some.parquet", [*data, None], [5] * 11, image="img", label="fine_label", names=())
    for root in (tmp_path / "some.parquet", tmp_path):
        dataset = open_dataset("auto", str(root), "train")
        assert dataset.pixels_NHWC is not None
        np.testing.assert_array_equal(dataset.pixels_NHWC[:10], np.stack(images))
        assert dataset.index.bad_N.tolist() == [False] * 10 + [True]
        assert "no bytes" in dataset.index.reasons[10]
        assert dataset.index.class_names == ("0", "1", "2", "3", "4", "5")
        with pytest.raises(DatasetError, match="no test split"):
            open_dataset("parquet", str(root), "test")


@pytest.mark.parametrize("side", [20, 100])
def test_a_saved_index_of_parquet_is_checked(tmp_path, side):
    images = [encoded(pixels_of(side, side)) for _ in range(4)]
    write_parquet(tmp_path / "train.parquet", images, [0] * 4)
    saved = open_dataset("parquet", str(tmp_path), "train").index
    assert open_dataset("parquet", str(tmp_path), "train", index=saved).index.digest == saved.digest
    write_parquet(tmp_path / "train.parquet", [*images, images[0]], [0] * 5)
    with pytest.raises(DatasetChanged, match=r"1 added .*; 1 files of another byte size \(train\.parquet\)"):
        open_dataset("parquet", str(tmp_path), "train", index=saved)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 3], "row 1: found label 3, expected below 3"), ([0, -1], None), ([0, None], None)],
)
def test_labels_are_checked_and_left_out_where_one_is_missing(tmp_path, labels, message):
    write_parquet(tmp_path / "train.parquet", [encoded(pixels_of(9, 9))] * 2, labels)
    if message:
        with pytest.raises(DatasetError, match=message):
            open_dataset("parquet", str(tmp_path), "train")
    else:
        assert open_dataset("parquet", str(tmp_path), "train").index.labels_N is None


def test_parquet_without_images_or_cut_off_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"found columns text \(string\); expected a column image or img"):
        open_dataset("parquet", str(tmp_path), "train")
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-20])
    with pytest.raises(DatasetError, match="not a whole parquet file"):
        open_dataset("auto", str(tmp_path), "train")


def test_the_demo_images_are_a_data_set():
    dataset = open_dataset("auto", None, "train")
    assert dataset.pixels_NHWC is not None
    assert dataset.index.labels_N is not None
    assert dataset.pixels_NHWC.shape == (dataset.index.num_rows, 32, 32, 3)
    assert dataset.index.labels_N.max() == len(dataset.index.class_names) - 1
    assert open_dataset("demo", None, "test", max_rows=5).index.num_rows == 5


def test_a_web_server_is_refused_by_every_command_that_reads_images(tmp_path, http_root, capsys):
    train = ["train", "imagenet-npid-r18", "--workers", "0", "--launcher", "local", "--run", str(tmp_path / "run")]
    for command in (
        ["index", f"{http_root}/photos"],
        ["verify", f"{http_root}/photos"],
        ["pack", f"{http_root}/photos", str(tmp_path / "packed")],
        [*train, "--data.root", f"{http_root}/photos"],
    ):
        assert main(command) == 2, command
        told = capsys.readouterr().err
        assert "found a web server" in told
        assert "expected a folder, file://, s3://" in told


def test_mistakes_are_named(tmp_path, photos):
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "broken" / "a.png", b"no image")
    root, nowhere = str(photos), str(tmp_path / "nowhere")
    for arguments, message in (
        (("tar", root, "train"), "kind of data: found 'tar', expected one of auto, folder"),
        (("auto", root, "dark"), "no dark split in .*: found train, val; expected a folder called dark.*--split NAME"),
        (("auto", root, "../dark"), "split: found '../dark', expected a name"),
        (("folder", None, "train"), "found no data root"),
        (("auto", nowhere, "train"), "nowhere does not exist; found beside it: broken, empty, photos"),
        (("folder", nowhere, "train"), "nowhere does not exist"),
        (("auto", str(empty), "train"), "no images in .*empty: found nothing"),
        (("folder", str(empty), "train"), "no images in .*empty: found nothing"),
        (
            ("parquet", str(empty), "train"),
            "no train split in .*empty: found nothing; expected parquet files",
        ),
        (("folder", str(photos / "train"), "test"), "no test split in .*: found cat, dog; expected a folder"),
        (("folder", str(photos / "train/cat/deep/0.JPEG"), "train"), "found a file, expected a folder"),
        (("auto", str(photos / "train/cat/deep/0.JPEG"), "train"), "found a file, expected a folder"),
        (("folder", str(tmp_path / "broken"), "train"), r"none of the 1 images .* a\.png: no image in a known format"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_dataset(*arguments)
    with pytest.raises(DatasetError, match="max_rows: found 0"):
        open_dataset("folder", root, "train", max_rows=0)
