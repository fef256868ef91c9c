"""Parquet files that claim more than they hold, or hold what they should not: told by file, row group and row."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import encode, picture

from dataloading import parquet_reader
from dataloading.index import DatasetError
from dataloading.parquet_reader import ParquetReader
from dataloading.sources import open_dataset

IMAGES = [encode(picture(40, 50, seed)) for seed in range(6)]


@pytest.fixture
def small_limits(monkeypatch):
    """Make the limits a thousandth, so that bombs are small as well."""
    monkeypatch.setattr(parquet_reader, "MAX_ENCODED_BYTES", 256 << 10)
    monkeypatch.setattr(parquet_reader, "_MAX_UNPACKED_BYTES", 64 << 10)
    monkeypatch.setattr(parquet_reader, "_OVERHEAD_BYTES", 1 << 10)


def write(folder, images, *, kind=None, rows_in_group: int | None = None, **options):
    table = pa.table({"image": pa.array(images, kind or pa.large_binary())})
    pq.write_table(table, folder / "train-0.parquet", row_group_size=rows_in_group, compression="zstd", **options)
    return str(folder)


def test_a_row_of_zeros_is_refused_and_its_neighbours_are_not(small_limits, tmp_path):
    root = write(tmp_path, [*IMAGES[:5], bytes(400_000)], use_dictionary=False)
    dataset = open_dataset("parquet", root, "train")
    assert list(dataset.index.reasons) == [5]
    assert "train-0.parquet, row group 0, row 5: an image of some 400,0" in dataset.index.reasons[5]


def test_good_rows_beside_a_bomb_are_read(small_limits, tmp_path):
    write(tmp_path, [*IMAGES[:5], bytes(400_000)], use_dictionary=False)
    reader = ParquetReader((tmp_path / "train-0.parquet",), (0, 6), "image")
    assert [reader(row) for row in range(5)] == IMAGES[:5]
    with pytest.raises(ValueError, match="row group 0, row 5"):
        reader(5)


def test_a_group_that_claims_far_more_than_any_image_is_not_unpacked(small_limits, tmp_path, monkeypatch):
    root = write(tmp_path, [*IMAGES, bytes(3_000_000)], use_dictionary=False, rows_in_group=6)
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-1.parquet")
    write(tmp_path, [*IMAGES, bytes(3_000_000)][-2:], use_dictionary=False)
    dataset = open_dataset("parquet", root, "train")
    assert [row for row, why in dataset.index.reasons.items() if "decompression bomb" in why] == [0, 1, 8]


def test_one_image_for_very_many_rows_is_in_memory_once(tmp_path):
    write(tmp_path, [IMAGES[0]] * 20_000)
    reader = ParquetReader((tmp_path / "train-0.parquet",), (0, 20_000), "image")
    assert reader(19_999) == IMAGES[0]
    assert sum(kept.nbytes for kept in reader._kept.values()) < 20_000 * 8 + 2 * len(IMAGES[0])


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path):
    root = write(tmp_path, IMAGES, rows_in_group=2, use_dictionary=False)
    path = tmp_path / "train-0.parquet"
    chunk = pq.read_metadata(path).row_group(1).column(0)
    raw, start = bytearray(path.read_bytes()), chunk.data_page_offset
    raw[start + 40 : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size - 40)
    path.write_bytes(raw)
    dataset = open_dataset("parquet", root, "train")
    assert list(dataset.index.reasons) == [2, 3]
    assert all("train-0.parquet, row group 1" in why for why in dataset.index.reasons.values())
    assert dataset.read is None or dataset.read(4) == IMAGES[4]


def test_a_file_that_is_damaged_anywhere_gives_no_bare_error(tmp_path):
    write(tmp_path, IMAGES, rows_in_group=2)
    path = tmp_path / "train-0.parquet"
    whole, num_refused = path.read_bytes(), 0
    for place in range(0, len(whole), 101):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        try:
            open_dataset("parquet", str(tmp_path), "train")
        except DatasetError:
            num_refused += 1
    assert num_refused


@pytest.mark.parametrize(
    "struct",
    [
        pa.struct([("bytes", pa.string())]),
        pa.struct([("bytes", pa.list_(pa.uint8()))]),
        pa.struct([("bytes", pa.int64())]),
        pa.struct([("bytes", pa.struct([("bytes", pa.binary())]))]),
        pa.struct([("path", pa.string())]),
    ],
)
def test_a_struct_whose_bytes_are_none_is_no_image_column(struct, tmp_path):
    root = write(tmp_path, [None, None], kind=struct)
    with pytest.raises(DatasetError, match="expected a column image or img with the encoded images"):
        open_dataset("parquet", root, "train")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dictionary", [False, True])
def test_whole_files_of_every_layout_are_read(nested, dictionary, tmp_path):
    images = [*IMAGES, None, IMAGES[0]]
    shown = [image and {"bytes": image, "path": "x"} for image in images] if nested else images
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())]) if nested else pa.binary()
    root = write(tmp_path, shown, kind=kind, rows_in_group=3, use_dictionary=dictionary)
    dataset = open_dataset("parquet", root, "train")
    assert list(dataset.index.reasons) == [6]
    column = "image.bytes" if nested else "image"
    reader = ParquetReader((tmp_path / "train-0.parquet",), (0, 8), column)
    assert [reader(row) for row in (0, 5, 7)] == [IMAGES[0], IMAGES[5], IMAGES[0]]


def written(path, image=None, label=None, **options):
    path.mkdir()
    columns = {
        "image": pa.array([IMAGES[0]] * 3) if image is None else image,
        **({} if label is None else {"label": label}),
    }
    pq.write_table(pa.table(columns), path / "train.parquet", **options)
    return open_dataset("parquet", str(path), "train")


def test_texts_that_are_no_class_names_are_told_before_they_are_unpacked(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * 4_000_000]))
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([IMAGES[0]]))
    index = written(tmp_path / "d", images, texts).index  # 2 GB of texts
    assert index.labels_N is None
    assert "holds a text of 4,000,000 bytes" in index.notes[-1].text


def test_labels_of_types_that_are_no_labels_are_not_read(tmp_path):
    index = written(tmp_path / "d", label=pa.array([[1], [2], [3]])).index
    assert index.notes[-1].text.endswith("holds list<element: int64>; expected whole numbers or texts")


def test_a_number_without_a_sign_that_is_too_large_is_told_as_it_is(tmp_path):
    with pytest.raises(DatasetError, match=rf"row 1: found label {2**63}, expected below"):
        written(tmp_path / "d", label=pa.array([0, 2**63, 1], pa.uint64()))


def test_one_label_that_is_no_number_among_numbers_is_told(tmp_path):
    index = written(tmp_path / "d", label=pa.array(["0", "1_0", "1"])).index
    assert "2 of 3 are whole numbers, but column label of train.parquet, row 1 is '1_0'" in index.notes[-1].text


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY"])
def test_images_and_labels_are_read_in_encodings_that_are_no_dictionaries(tmp_path, encoding):
    encodings = {"image": encoding, "label": "DELTA_BYTE_ARRAY"}
    dataset = written(tmp_path / "d", label=pa.array(["a", "b", "a"]), use_dictionary=False, column_encoding=encodings)
    assert dataset.index.labels_N.tolist() == [0, 1, 0]
    assert not dataset.index.reasons


def test_images_that_may_unpack_to_any_number_of_bytes_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="encoding DELTA_BYTE_ARRAY, which is not read; write them in another"):
        written(tmp_path / "d", use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"})


def test_column_names_in_any_case_and_dictionaries_of_bytes_are_images(tmp_path):
    images = pa.array([IMAGES[0]] * 3).dictionary_encode()
    pq.write_table(pa.table({"Image": images, "Label": pa.array([0, 1, 0])}), tmp_path / "train.parquet")
    index = open_dataset("parquet", str(tmp_path), "train").index
    assert (index.num_rows, index.labels_N.tolist(), index.reasons) == (3, [0, 1, 0], {})


def test_class_names_that_are_no_list_are_not_taken_for_names(tmp_path):
    table = pa.table({"image": pa.array([IMAGES[0]] * 3), "label": pa.array([0, 1, 2])})
    about = {"huggingface": '{"info": {"features": {"label": {"names": "abc"}}}}'}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "train.parquet")
    assert open_dataset("parquet", str(tmp_path), "train").index.class_names == ("0", "1", "2")
