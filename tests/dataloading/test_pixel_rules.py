"""Orientation and range of samples: one rule for every format and every decoder, judged by Pillow's transposition."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_images import encode, picture
from PIL import Image, ImageOps

from cluster.store import Store
from dataloading import pillow
from dataloading.index import DatasetError, DatasetIndex
from dataloading.loader import eval_batches
from dataloading.orientation import TURNS, orientation_in, stored_window, turned
from dataloading.pack import pack
from dataloading.pack_unit import look_at
from dataloading.packed import open_manifest
from dataloading.pixel_rules import BEFORE_RULES, PixelRules
from dataloading.sources import list_images, open_dataset

HEIGHT, WIDTH = 120, 160
GRAY = np.asarray(picture(HEIGHT, WIDTH, 3).convert("L"))
ORIENTATIONS = range(1, 9)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif.tobytes()


def oriented(kind: str, orientation: int) -> bytes:
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif_of(orientation)}
    return encode(picture(HEIGHT, WIDTH, 2), kind, **options)


def with_exif_behind(orientation: int) -> bytes:
    """Return a PNG whose EXIF data follow its pixels, which is allowed."""
    plain, data = encode(picture(HEIGHT, WIDTH, 2), "PNG"), exif_of(orientation).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    end = plain.rindex(b"IEND") - 4
    return plain[:end] + chunk + plain[end:]


def seen(encoded: bytes) -> np.ndarray:
    """Return what a viewer shows."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def tiff(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


def tiff_of_bits(bits: int, photometric: int = 1) -> bytes:
    """Return a gray TIFF of 12 or 16 bits, as Pillow cannot write it."""
    if bits == 12:
        pairs = (GRAY.reshape(-1, 2).astype(np.uint16) * 257) >> 4
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        data = packed.astype(np.uint8).tobytes()
    else:
        data = ((255 - GRAY if photometric == 0 else GRAY).astype("<u2") * 257).tobytes()
    tags = [(256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, HEIGHT), (279, 4, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def pgm(maximum: int) -> bytes:
    values = (GRAY.astype(np.uint32) * maximum // 255).astype(">u2" if maximum > 255 else "u1")
    return b"P5\n%d %d\n%d\n" % (WIDTH, HEIGHT, maximum) + values.tobytes()


DEEP = {
    "PGM of 16 bits": pgm(65535),
    "PGM of 12 bits": pgm(4095),
    "PGM of 10 bits": pgm(1023),
    "PGM of 7 bits": pgm(127),
    "plain PGM of 12 bits": b"P2\n%d %d\n4095\n" % (WIDTH, HEIGHT)
    + b" ".join(b"%d" % (value * 4095 // 255) for value in GRAY.reshape(-1).tolist()),
    "PNG of 16 bits": encode(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"),
    "TIFF of 16 bits": tiff(GRAY.astype(np.uint16) * 257),
    "TIFF of 12 bits": tiff_of_bits(12),
    "TIFF of 16 bits, 0 is white": tiff_of_bits(16, photometric=0),
    "JPEG 2000 of 16 bits": encode(Image.fromarray(GRAY.astype(np.uint16) * 257), "JPEG2000"),
}
WITHOUT_RANGE = {
    "32-bit values": tiff(GRAY.astype(np.int32) * 257),
    "floating-point values": tiff((GRAY / 255).astype(np.float32)),
    "signed values": encode(Image.fromarray(GRAY), "TIFF", tiffinfo={339: 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("oriented")
    for orientation in ORIENTATIONS:
        for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
            (root / f"{orientation}.{ending}").write_bytes(oriented(kind, orientation))
        (root / f"behind-{orientation}.png").write_bytes(with_exif_behind(orientation))
    return root


def centres(dataset, backend: str) -> torch.Tensor:
    """Return the central crops of all rows, 0 to 255, (N, C, 120, 120)."""
    batches = eval_batches(
        dataset,
        range(dataset.index.num_rows),
        resize=HEIGHT,
        crop=HEIGHT,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        batch_size=8,
        device="cpu",
        num_threads=1,
        backend=backend,
    )
    shown = list(batches)
    assert all(batch.valid_B.all() for batch in shown)
    return torch.cat([batch.images_BCHW for batch in shown]) * 255


def centre_of(pixels_HWC: np.ndarray) -> torch.Tensor:
    (height, width), side = pixels_HWC.shape[:2], HEIGHT
    top, left = (height - side) // 2, (width - side) // 2
    return torch.from_numpy(pixels_HWC[top : top + side, left : left + side].transpose(2, 0, 1).copy()).float()


@pytest.mark.parametrize("backend", ["torch", "nvimgcodec", "dali"])
def test_every_orientation_of_every_format_is_shown_upright_by_every_decoder(folder, backend):
    dataset = open_dataset("folder", str(folder), "train")
    crops_NCSS = centres(dataset, backend)
    for row, name in enumerate(dataset.index.names):
        expected_HWC = seen((folder / name).read_bytes())
        assert (dataset.index.heights_N[row], dataset.index.widths_N[row]) == expected_HWC.shape[:2], name
        assert (crops_NCSS[row] - centre_of(expected_HWC)).abs().mean() < 0.6, name


def test_by_the_rule_of_older_versions_only_tiff_is_turned(folder):
    dataset = open_dataset("folder", str(folder), "train", rules=BEFORE_RULES)
    crops_NCSS = centres(dataset, "nvimgcodec")
    for row, name in enumerate(dataset.index.names):
        with Image.open(folder / name) as image:
            stored_HWC = np.asarray(image.convert("RGB"))  # which has Pillow turn TIFF
        assert (dataset.index.heights_N[row], dataset.index.widths_N[row]) == stored_HWC.shape[:2], name
        assert (crops_NCSS[row] - centre_of(stored_HWC)).abs().max() < 0.6, name


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_window_of_the_upright_image_is_its_stored_window_turned(orientation):
    stored_HWC = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    image = Image.fromarray(stored_HWC)
    image.getexif()[0x112] = orientation
    upright_HWC = turned(stored_HWC, orientation)
    assert (upright_HWC == np.asarray(ImageOps.exif_transpose(image))).all()
    height, width = upright_HWC.shape[:2]
    for top, left in np.ndindex(height, width):
        size = (min(2, height - top), min(3, width - left))
        (y, x), (h, w) = stored_window((top, left), size, (height, width), orientation)
        part = turned(stored_HWC[y : y + h, x : x + w], orientation)
        assert (part == upright_HWC[top : top + size[0], left : left + size[1]]).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_exif_does_not_know_means_as_stored(orientation):
    assert orientation_in(exif_of(orientation)) == 1


def test_exif_data_that_are_cut_short_or_point_anywhere_mean_as_stored():
    whole = exif_of(6)
    assert orientation_in(whole) == 6
    assert {orientation_in(whole[:size]) for size in range(len(whole) - 6)} <= {1, 6}
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        assert orientation_in(bytes(damaged)) in TURNS


@pytest.mark.parametrize("name", DEEP)
def test_samples_are_scaled_by_the_range_that_their_format_states(name):
    pixels_HWC = pillow.decode(DEEP[name])
    assert np.abs(pixels_HWC.astype(int) - GRAY[:, :, None]).max() <= (2 if "7 bits" in name else 1)
    assert look_at(DEEP[name]).reason == ""


@pytest.mark.parametrize("name", WITHOUT_RANGE)
def test_an_image_without_a_range_is_listed_with_the_reason(name, tmp_path):
    encoded = WITHOUT_RANGE[name]
    assert f"{name} in a TIFF" in look_at(encoded).reason
    with pytest.raises(ValueError, match=f"{name} in a TIFF"):
        pillow.read_header(encoded)
    (tmp_path / "0.tif").write_bytes(encoded)
    (tmp_path / "1.png").write_bytes(DEEP["PNG of 16 bits"])
    index = open_dataset("folder", str(tmp_path), "train").index
    assert list(index.reasons) == [0]
    assert f"{name} in a TIFF" in index.reasons[0]


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (64, 64)])
def test_small_images_in_memory_and_encoded_ones_obey_the_same_rules(size, tmp_path):
    height, width = size
    image = picture(height, width, 5)
    for name, orientation in (("a.jpg", 3), ("b.jpg", 6), ("c.jpg", 2)):
        (tmp_path / name).write_bytes(encode(image, exif=exif_of(orientation)))
    dataset = open_dataset("folder", str(tmp_path), "train")
    assert (dataset.pixels_NHWC is not None) == (size == (64, 64))
    for row, name in enumerate(dataset.index.names):
        expected_HWC = seen((tmp_path / name).read_bytes())
        if dataset.pixels_NHWC is not None:
            assert (dataset.pixels_NHWC[row] == expected_HWC).all()
        assert (dataset.index.heights_N[row], dataset.index.widths_N[row]) == expected_HWC.shape[:2]


def in_process(function, tasks):
    return map(function, tasks)


def packed_from(folder, target, rules: PixelRules | None = None) -> str:
    pack(list_images("folder", str(folder), "train"), Store(str(target)), "train", parallel=in_process, rules=rules)
    return str(target)


def test_packed_images_state_their_rules_and_keep_to_them(folder, tmp_path):
    for rules in (PixelRules(), BEFORE_RULES):
        root = packed_from(folder, tmp_path / rules.orientation, rules)
        loose = open_dataset("folder", str(folder), "train", rules=rules)
        packed = open_dataset("packed", root, "train")
        assert packed.index.rules == rules
        assert packed.index.digest == loose.index.digest
        assert (packed.index.heights_N == loose.index.heights_N).all()
        assert torch.equal(centres(packed, "nvimgcodec"), centres(loose, "nvimgcodec"))


def test_packed_images_are_not_shown_by_rules_that_their_sizes_do_not_follow(folder, tmp_path):
    root = packed_from(folder, tmp_path / "packed")
    with pytest.raises(DatasetError, match=r"orientation 'exif', asked for 'tiff': .* of 28 images differ"):
        open_dataset("packed", root, "train", rules=BEFORE_RULES)


def test_packed_images_that_no_rule_changes_go_on_by_any(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"images/{number}.jpg").write_bytes(encode(picture(100, 120, number)))
    root = packed_from(tmp_path / "images", tmp_path / "packed")
    assert open_dataset("packed", root, "train", rules=BEFORE_RULES).index.rules == BEFORE_RULES


def test_a_manifest_without_rules_means_those_of_its_time(folder, tmp_path):
    root = packed_from(folder, tmp_path / "packed", BEFORE_RULES)
    path = tmp_path / "packed/train/manifest.arrow"
    with pa.ipc.open_file(str(path)) as reader:
        batch = reader.get_batch(0)
    about = json.loads(batch.schema.metadata[b"instdisc"])
    for name in ("pixels", "depending"):
        del about[name]
    batch = batch.replace_schema_metadata({"instdisc": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    manifest, _ = open_manifest(root, "train", None)
    assert manifest.index.rules == BEFORE_RULES
    with pytest.raises(DatasetError, match="asked for 'exif'"):
        open_dataset("packed", root, "train", rules=PixelRules())


def test_an_index_states_its_rules_and_one_that_does_not_is_older(folder, tmp_path):
    current = open_dataset("folder", str(folder), "train").index
    current.save(tmp_path / "index.parquet")
    assert DatasetIndex.load(tmp_path / "index.parquet").rules == PixelRules()

    table = pq.read_table(tmp_path / "index.parquet")
    about = json.loads(table.schema.metadata[b"index"])
    del about["pixels"]
    pq.write_table(table.replace_schema_metadata({"index": json.dumps(about)}), tmp_path / "older.parquet")
    older = DatasetIndex.load(tmp_path / "older.parquet")
    assert older.rules == BEFORE_RULES
    # Its rows are accepted, and the images are seen as they were.
    assert open_dataset("folder", str(folder), "train", index=older).index.rules == BEFORE_RULES
    # By other rules, the sizes in it do not count.
    again = open_dataset("folder", str(folder), "train", index=older, rules=PixelRules()).index
    assert (again.heights_N == current.heights_N).all()


def test_a_reader_of_older_rules_finds_the_pixels_of_older_versions():
    clipped = pillow.decode(DEEP["PGM of 16 bits"], BEFORE_RULES)
    with Image.open(io.BytesIO(DEEP["PGM of 16 bits"])) as image:
        assert (clipped == np.asarray(image.convert("RGB"))).all()
    assert look_at(WITHOUT_RANGE["floating-point values"], BEFORE_RULES).reason == ""
    assert replace(PixelRules(), deep_samples="clipped") == PixelRules("exif", "clipped")
