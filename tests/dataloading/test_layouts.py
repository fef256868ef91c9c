"""The rule by which splits, configurations and classes are found: the same images laid out in many ways."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.store import Store
from dataloading.index import DatasetError, DatasetIndex, NoSplit
from dataloading.layout import AmbiguousLayout, Part
from dataloading.pack import pack
from dataloading.pack_unit import look_at
from dataloading.sources import list_images, open_dataset
from dataloading.storage import Storage
from instdisc.cli.main import main


def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def lay_out(root, *paths):
    """Write one image for each path."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG)
    return str(root)


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    num = max([1, *map(len, columns.values())])
    pq.write_table(pa.table({"image": pa.array([PNG] * num, pa.binary()), **columns}), path)


def far(root):
    """Return the URI of what lies in a folder, put into an S3-like store in memory, and how to reach it."""
    store = Store(f"memory://{root}")
    for file in Path(root).rglob("*"):
        if file.is_file():
            store.put(file.relative_to(root).as_posix(), file.read_bytes())
    return f"memory://{root}", Storage(open=Store)


def opened(root, split, kind, **options):
    if kind == "objects":
        uri, storage = far(root)
        return open_dataset("folder", uri, split, storage=storage, **options).index
    return open_dataset("folder", str(root), split, **options).index


def notes_of(index, kind):
    return [note.text for note in index.notes if note.kind == kind]


FOLDERS = {
    "any case": (("Train/a/1.png", "Train/b/1.png", "Test/a/2.png"), "Train", "Test", ("a", "b")),
    "-ing": (("training/a/1.png", "training/b/1.png", "testing/a/2.png"), "training", "testing", ("a", "b")),
    "numbers": (("train2017/1.png", "val2017/2.png"), "train2017", "val2017", ()),
    "words": (("train_images/1.png", "test_images/2.png"), "train_images", "test_images", ()),
    "beside others": (("train/1.png", "train_masks/1.png", "dev/2.png"), "train", "dev", ()),
    "one folder above": (
        ("CLS/train/a/1.png", "CLS/train/b/1.png", "CLS/val/a/1.png"),
        "CLS/train",
        "CLS/val",
        ("a", "b"),
    ),
    "two folders above": (("x/y/Train/1.png", "x/y/Valid/1.png"), "x/y/Train", "x/y/Valid", ()),
}


@pytest.mark.parametrize("kind", ["folder", "objects"])
@pytest.mark.parametrize("layout", FOLDERS)
def test_the_folder_of_a_split_is_found_and_told(tmp_path, layout, kind):
    paths, train, test, classes = FOLDERS[layout]
    lay_out(tmp_path, *paths)
    for split, folder in (("train", train), ("test", test)):
        index = opened(tmp_path, split, kind)
        assert list(index.names) == sorted(p.removeprefix(f"{folder}/") for p in paths if p.startswith(f"{folder}/"))
        assert index.class_names == classes
        assert notes_of(index, "taken")[0].startswith(f"from the folder {folder}")


AMBIGUOUS = {
    "a split or a class": (("train/1.png", "bus/1.png"), r'Classes: --data\.train_split "\."', ".", "bus/1.png"),
    "images or masks": (
        ("train_images/1.png", "train_masks/1.png"),
        "2 folders for the train split.*--data.train_split NAME",
        "train_images",
        "1.png",
    ),
    "splits beside a class": (
        ("seg_train/1.png", "seg_test/1.png", "seg_pred/1.png"),
        "splits, or classes",
        "seg_train",
        "1.png",
    ),
    "two data sets": (
        ("a/train/1.png", "a/val/1.png", "b/train/1.png", "b/val/1.png"),
        r"splits in 2 folders: a, b.*--data\.config NAME",
        "./b/train",
        "1.png",
    ),
    "classes with splits": (
        ("cat/train/1.png", "cat/test/1.png", "dog/train/1.png", "dog/test/1.png"),
        r"--data\.config",
        ".",
        "cat/test/1.png",
    ),
    "editions": (
        ("2019/train/1.png", "2019/val/1.png", "2020/train/1.png", "2020/val/1.png"),
        r"--data\.config",
        "./2020/train",
        "1.png",
    ),
}


@pytest.mark.parametrize("kind", ["folder", "objects"])
@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_folders_that_can_be_read_in_two_ways_are_refused_with_the_option_that_decides(tmp_path, layout, kind):
    paths, message, option, first = AMBIGUOUS[layout]
    lay_out(tmp_path, *paths)
    with pytest.raises(AmbiguousLayout, match=message):
        opened(tmp_path, "train", kind)
    assert opened(tmp_path, option, kind).names[0] == first


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_a_configuration_of_folders_is_chosen_by_its_name(tmp_path, kind):
    lay_out(tmp_path, "v1/A/train/x.png", "v1/A/test/x.png", "v1/B/train/y.png", "v1/B/test/y.png")
    for name in ("B", "b", "v1/B"):
        index = opened(tmp_path, "train", kind, config=name)
        assert list(index.names) == ["y.png"]
    with pytest.raises(NoSplit, match="no configuration 'C'"):
        opened(tmp_path, "train", kind, config="C")


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_a_split_of_any_name_is_taken(tmp_path, kind):
    lay_out(tmp_path, "unlabeled/1.png", "train/a/1.png", "train/b/1.png", "test/a/1.png", "Dark/2.png")
    assert list(opened(tmp_path, "unlabeled", kind).names) == ["1.png"]
    assert list(opened(tmp_path, "dark", kind).names) == ["2.png"]
    with pytest.raises(NoSplit, match=r"no light split.*found Dark, test, train, unlabeled"):
        opened(tmp_path, "light", kind)
    lay_out(tmp_path / "deep", "site/day/1.png", "site/night/1.png", "site/night/2.png")
    assert opened(tmp_path / "deep", "night", kind).num_rows == 2


def test_a_class_may_be_called_like_a_split_where_many_are_not(tmp_path):
    root = lay_out(tmp_path, "bullet_train/1.png", "bus/1.png", "car/train/1.png")
    index = open_dataset("folder", root, "train").index
    assert index.class_names == ("bullet_train", "bus", "car")


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_folders_named_by_time_are_no_classes_until_they_are_named(tmp_path, kind):
    lay_out(tmp_path, "2019/1.png", "2020-05/1.png", "20200517/1.png")
    index = opened(tmp_path, "train", kind)
    assert index.labels_N is None
    assert "named by time" in notes_of(index, "labels")[0]
    assert opened(tmp_path, ".", kind).class_names == ("2019", "2020-05", "20200517")
    assert opened(tmp_path, "train", kind, layout_rule=1).class_names == ("2019", "2020-05", "20200517")
    assert opened(tmp_path, "2019", kind).num_rows == 1


@pytest.mark.parametrize("kind", ["folder", "objects", "tars", "parquet", "packed"])
def test_a_test_split_without_labels_does_not_hide_a_labelled_val(tmp_path, kind):
    if kind == "tars":
        for name, label in (("test", None), ("val", b"1"), ("train", b"0")):
            tar(tmp_path / f"{name}-0.tar", [("x.png", PNG), *([("x.cls", label)] if label else [])])
        index = open_dataset("auto", str(tmp_path), "test").index
    elif kind == "parquet":
        for name, label in (("test", -1), ("validation", 1), ("train", 0)):
            parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", label=[label])
        index = open_dataset("auto", str(tmp_path), "test").index
    else:
        lay_out(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png", "val/a/2.png", "val/b/2.png")
        index = opened(tmp_path, "test", kind) if kind != "packed" else None
        if kind == "packed":
            for split in ("./test", "val"):
                images = list_images("folder", str(tmp_path), split)
                pack(images, Store(str(tmp_path / "packed")), split.strip("./"), parallel=_here)
            index = open_dataset("auto", str(tmp_path / "packed"), "test").index
    assert index.labels_N is not None
    assert "having no labels" in notes_of(index, "unused")[-1]


def _here(function, items):
    return map(function, items)


NAMES = {
    "in the middle": (["imagenet-train-000000", "imagenet-val-000000"], 0, 1),
    "with digits": (["imagenet1k-train-0000", "imagenet1k-validation-00"], 0, 1),
    "underscores": (["shard_train_0", "shard_test_0"], 0, 1),
    "any case": (["TRAIN-0", "Test-0"], 0, 1),
    "capitals inside": (["shardTrain0", "shardEval0"], 0, 1),
    "folders": (["train/part1/0", "Testing/part1/0"], 0, 1),
    "folder of a split and a set": (["c/imagenet-train/0", "c/imagenet-val/0"], 0, 1),
    "hub": (["data/train-00000-of-00002-ab12cd34ef", "data/test-00000-of-00001-0011aa22bb"], 0, 1),
}


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize("layout", NAMES)
def test_the_split_is_a_word_anywhere_in_the_name_of_a_tar_or_parquet_file(tmp_path, layout, ending):
    names, train, test = NAMES[layout]
    for name in names:
        _file(tmp_path, name, ending)
    for split, place in (("train", train), ("test", test)):
        index = open_dataset("auto", str(tmp_path), split).index
        assert [name.partition(f".{ending}/")[0] for name in index.names] == [names[place]]
        assert notes_of(index, "taken")[0].endswith(f"{names[place]}.{ending}")
        assert notes_of(index, "unused")[0].endswith(f"{names[1 - place]}.{ending}")


def _file(root, name, ending):
    if ending == "tar":
        tar(root / f"{name}.tar", [("x.png", PNG)])
    else:
        parquet(root / f"{name}.parquet")


SETS = {
    "folders": (["a/train-0", "b/train-0"], "b", "b/train-0"),
    "snapshots of a hub": (
        ["snapshots/1a2b/data/train-0", "snapshots/ffee/data/train-0"],
        "ffee",
        "snapshots/ffee/data/train-0",
    ),
    "data beside another": (["data/train-0", "other/train-0"], "data", "data/train-0"),
    "words before the split": (["cifar10-train", "cifar100-train"], "cifar100", "cifar100-train"),
    "words behind it": (["train-images-0", "train-masks-0"], "images", "train-images-0"),
    "editions": (["coco-2014-train", "coco-2017-train"], "2017", "coco-2017-train"),
    "editions beside the word": (["train2014", "train2017"], "2014", "train2014"),
    "no split at all": (["a/0", "b/0"], "b", "b/0"),
    "two names": (["cats", "dogs"], "dogs", "dogs"),
}


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize("layout", SETS)
def test_files_of_several_data_sets_are_never_put_together_unasked(tmp_path, layout, ending):
    names, config, expected = SETS[layout]
    for name in names:
        _file(tmp_path, name, ending)
    with pytest.raises(AmbiguousLayout, match=r"2 configurations.*--data\.config NAME"):
        open_dataset("auto", str(tmp_path), "train")
    chosen = open_dataset("auto", str(tmp_path), "train", config=config).index
    assert [name.partition(f".{ending}")[0] for name in chosen.names] == [expected]
    assert open_dataset("auto", str(tmp_path), "train", config=".").index.num_rows == 2


def test_shards_of_one_set_stay_together_however_they_are_numbered(tmp_path):
    names = ["x-train-0000", "x-train-1999", "x-train-2000-of-2001", "x-train-part7", "x-train-c-deadbeef12"]
    for name in names:
        _file(tmp_path, name, "tar")
    assert open_dataset("auto", str(tmp_path), "train").index.num_rows == len(names)


@pytest.mark.parametrize("names", [["trainval-x/train_val-0"], ["train/test-0"]])
def test_a_name_that_says_two_splits_is_refused(tmp_path, names):
    for name in names:
        _file(tmp_path, name, "tar")
    with pytest.raises(AmbiguousLayout, match=r"say two splits.*--data\.train_split NAME"):
        open_dataset("auto", str(tmp_path), "train")
    assert open_dataset("auto", str(tmp_path), "*-0.tar").index.num_rows == 1


def test_a_run_that_began_before_the_rule_keeps_its_rows(tmp_path):
    for name in ("imagenet-train-0", "imagenet-val-0"):
        tar(tmp_path / "tars" / f"{name}.tar", [("x.png", PNG), ("._x.png", PNG)])
    old = open_dataset("auto", str(tmp_path / "tars"), "train", layout_rule=1).index
    assert old.num_rows == 4
    root = lay_out(tmp_path / "folder", "Train/1.png", "Test/1.png", "train_masks/1.png")
    assert open_dataset("auto", root, "train", layout_rule=1).index.class_names == ("Test", "Train", "train_masks")
    old.save(tmp_path / "index.parquet")
    again = open_dataset(
        "auto", str(tmp_path / "tars"), "train", layout_rule=1, index=DatasetIndex.load(tmp_path / "index.parquet")
    )
    assert again.index.digest == old.digest


def test_what_is_left_out_of_a_folder_or_bucket_is_counted_by_its_ending(tmp_path):
    lay_out(tmp_path, "train/a/1.png", "train/a/._1.png", "train/b/1.png", "stray.png")
    for name in ("x.GIF", "y.gif", "z.heic", "w.CR2", "deadbeef"):
        (tmp_path / "train" / "a" / name).write_bytes(b"x")
    for kind in ("folder", "objects"):
        index = opened(tmp_path, "train", kind)
        (told,) = notes_of(index, "left_out")
        assert told.startswith("6 other ")
        assert told.endswith("left out: 2 .gif, 1 .cr2, 1 .heic, 1 hidden, 1 without an ending")
        assert "stray.png" in notes_of(index, "unused")[-1]


def test_links_that_lead_nowhere_are_counted(tmp_path):
    lay_out(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    index = open_dataset("folder", str(tmp_path), "train").index
    assert notes_of(index, "left_out") == ["1 other file left out: 1 broken links or no files"]


def test_hidden_members_of_a_tar_are_no_images_and_other_members_are_counted(tmp_path):
    members = [("a.png", PNG), ("._a.png", PNG), ("a.json", b"{}"), ("__MACOSX/._b.png", PNG), ("b.png", PNG)]
    tar(tmp_path / "train-0.tar", members)
    index = open_dataset("auto", str(tmp_path), "train").index
    assert list(index.names) == ["train-0.tar/a.png", "train-0.tar/b.png"]
    assert notes_of(index, "left_out") == ["3 other members of the tars left out: 2 hidden, 1 .json"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a/1.png", "b/1.png", "banner.png"], "banner.png is in no class folder"),
        (["a/1.png", "a/2.png"], "all images are in one folder, a"),
        (["1.png"], "the images are in no class folders"),
    ],
)
def test_why_a_folder_has_no_labels_is_told(tmp_path, names, reason):
    index = open_dataset("folder", lay_out(tmp_path, *names), "train").index
    assert index.labels_N is None
    assert notes_of(index, "labels")[0].startswith(f"no labels: {reason}")


TAR_LABELS = {
    "apart": ([("x.png", PNG), ("y.png", PNG), ("x.cls", b"1"), ("y.cls", b"0")], [1, 0], "2 labels stand apart"),
    "texts": (
        [("x.png", PNG), ("x.cls", b"n02"), ("y.png", PNG), ("y.cls", b" n01\n")],
        [1, 0],
        "2 classes from the texts",
    ),
    "floats": ([("x.png", PNG), ("x.cls", b"2.0"), ("y.png", PNG), ("y.cls", b"0")], [2, 0], None),
    "no numbers": (
        [("x.png", PNG), ("x.cls", b"1_0"), ("y.png", PNG), ("y.cls", b"10")],
        [1, 0],
        "2 classes from the texts",
    ),
    "longer endings": ([("x.input.png", PNG), ("x.target.cls", b"1"), ("y.png", PNG), ("y.CLS", b"0")], [1, 0], None),
    "missing": ([("x.png", PNG), ("x.cls", b"1"), ("y.png", PNG)], None, "no labels: train-0.tar/y.png has no label"),
    "empty": ([("x.png", PNG), ("x.cls", b" ")], None, "no labels: train-0.tar/x.cls holds no text"),
    "negative": ([("x.png", PNG), ("x.cls", b"-1")], None, "no labels: the label of train-0.tar/x.png is -1"),
}


@pytest.mark.parametrize("case", TAR_LABELS)
def test_labels_of_tars_are_read_or_it_is_told_why_not(tmp_path, case):
    members, labels, note = TAR_LABELS[case]
    tar(tmp_path / "train-0.tar", members)
    index = open_dataset("webdataset", str(tmp_path), "train").index
    assert (None if index.labels_N is None else index.labels_N.tolist()) == labels
    assert [text for text in notes_of(index, "labels") if not note or note not in text] == []
    assert bool(note) == bool(notes_of(index, "labels"))


COLUMNS = {
    "texts": ({"label": ["dog", "cat"]}, [1, 0], ("cat", "dog"), "2 classes from the texts"),
    "dictionary": ({"label": pa.array(["dog", "cat"]).dictionary_encode()}, [1, 0], ("cat", "dog"), "2 classes"),
    "another name": ({"Labels": [1, 0]}, [1, 0], ("0", "1"), None),
    "whole floats": ({"label": [1.0, 0.0]}, [1, 0], ("0", "1"), None),
    "booleans": ({"label": [True, False]}, [1, 0], ("0", "1"), None),
    "halves": ({"label": [1.0, 0.5]}, None, (), "column label is 0.5 in train.parquet, row 1, no whole number"),
    "null": ({"label": [1, None]}, None, (), "column label is null in train.parquet, row 1 (1 of 2 rows)"),
    "negative": ({"label": [0, -1]}, None, (), "column label of train.parquet, row 1 is -1"),
    "lists": ({"labels": [[1], [2]]}, None, (), "column labels of train.parquet holds list<"),
    "none": ({"caption": ["a", "b"]}, None, (), "train.parquet has no column of labels"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_labels_of_parquet_files_are_read_or_it_is_told_why_not(tmp_path, case):
    columns, labels, classes, note = COLUMNS[case]
    parquet(tmp_path / "train.parquet", **columns)
    index = open_dataset("parquet", str(tmp_path), "train").index
    assert (None if index.labels_N is None else index.labels_N.tolist()) == labels
    assert index.class_names == classes
    assert [note in text for text in notes_of(index, "labels")] == ([True] if note else [])
    assert notes_of(index, "unused") == (["1 column not used: caption"] if case == "none" else [])


def test_packed_images_tell_what_was_told_of_their_source(tmp_path):
    lay_out(tmp_path / "photos", "train/a/1.png", "train/a/2.png", "train/banner.png")
    (tmp_path / "photos/train/a/broken.png").write_bytes(b"no image")
    images = list_images("folder", str(tmp_path / "photos"), "train")
    pack(images, Store(str(tmp_path / "packed")), "train", parallel=_here)
    index = open_dataset("packed", str(tmp_path / "packed"), "train").index
    assert index.notes[: len(images.index.notes)] == images.index.notes
    assert notes_of(index, "labels") == ["no labels: banner.png is in no class folder"]
    assert notes_of(index, "left_out")[-1].startswith("1 damaged images were left out when")


def test_notes_are_kept_with_the_index(tmp_path):
    index = open_dataset(
        "folder", lay_out(tmp_path, "train/1.png", "extra/1.png", "extra/x/2.png", "test/3.png"), "train"
    ).index
    assert index.notes
    index.save(tmp_path / "index.parquet")
    assert DatasetIndex.load(tmp_path / "index.parquet").notes == index.notes


def test_a_split_that_is_no_name_is_refused(tmp_path):
    for name in ("", " ", "../x", "/etc"):
        with pytest.raises(DatasetError, match="split: found"):
            open_dataset("folder", lay_out(tmp_path, "1.png"), name)


def test_a_file_of_another_format_is_named_and_a_large_image_is_not_called_damaged(tmp_path, capsys):
    Image.new("L", (120, 100)).save(tmp_path / "0.png")
    contents = {
        "1.jpg": b"GIF89a" + bytes(40), "2.jpg": b"\0\0\0\x1cftypavif", "3.jpg": b"version https://git-lfs.github.com/x",
        "4.jpg": b"<!DOCTYPE html><html>", "5.jpg": b"", "6.jpg": b"who knows",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (9500, 9500)).save(tmp_path / "7.png")
    reasons = list(open_dataset("folder", str(tmp_path), "train").index.reasons.values())
    found = (
        "a GIF, which",
        "AVIF, which",
        "a Git LFS pointer",
        "a web page",
        "an empty file",
        "no image in a",
        "too large: 9500 x",
    )
    assert [reason for reason, begin in zip(reasons, found, strict=True) if not reason.startswith(begin)] == []
    assert main(["index", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "6 with damaged headers, 1 too large" in printed
    assert "no labels: the images are in no class folders" in printed.splitlines()[0]
    assert "only the headers were read" in printed


def test_index_tells_in_json_what_was_taken_and_what_not(tmp_path, capsys):
    lay_out(tmp_path, "b/Train/1.png", "b/Test/2.png", "a/Train/1.png", "a/Test/2.png")
    assert main(["index", str(tmp_path), "--config", "b", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note["kind"] for note in notes] == ["taken", "unused", "labels"]
    assert notes[0]["text"] == "from the folder b/Train; other splits: b/Test"
    assert main(["index", str(tmp_path)]) == 2
    assert "--data.config NAME (index and pack: --config NAME)" in capsys.readouterr().err


RELATIVES = {
    "numbers beside the word": (("sets/train/1.png", "sets/test1/2.png"), "sets/train", "sets/test1"),
    "words grown together": (("trainset/1.png", "testset/2.png"), "trainset", "testset"),
    "as archives unpack": (
        ("seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png"),
        "seg_train/seg_train",
        "seg_test/seg_test",
    ),
    "train and val together": (("trainval/1.png", "test/2.png"), "trainval", "test"),
}


@pytest.mark.parametrize("kind", ["folder", "objects"])
@pytest.mark.parametrize("layout", RELATIVES)
def test_a_split_is_found_below_folders_with_its_name_and_beside_numbers(tmp_path, layout, kind):
    paths, train, test = RELATIVES[layout]
    lay_out(tmp_path, *paths)
    for split, folder, path in (("train", train, paths[0]), ("test", test, paths[1])):
        index = opened(tmp_path, split, kind)
        assert list(index.names) == [path.removeprefix(f"{folder}/")]
        assert notes_of(index, "taken")[0].startswith(f"from the folder {folder}")


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ("train", "--data.train_split NAME"),
        ("val", "--data.test_split NAME"),
        ("night", "--data.train_split NAME or --data.test_split NAME"),
    ],
)
def test_the_options_that_may_name_a_split_are_told(split, options):
    assert Part(split).option == f"{options} (index, pack and embed: --split NAME)"


def test_a_test_folder_without_images_does_not_hide_val_nor_make_splits_of_classes(tmp_path):
    lay_out(tmp_path / "a", "train/1.png", "val/2.png")
    (tmp_path / "a/test").mkdir()
    assert notes_of(opened(tmp_path / "a", "test", "folder"), "taken")[0].startswith("from the folder val")
    lay_out(tmp_path / "b", "cat/1.png", "dog/2.png")
    (tmp_path / "b/eval").mkdir()
    (tmp_path / "b/eval/scores.json").write_text("{}")
    assert opened(tmp_path / "b", "train", "folder").class_names == ("cat", "dog")


def test_folders_that_only_begin_like_splits_are_no_classes_without_a_word(tmp_path):
    lay_out(tmp_path, "Trainingsdaten/1.png", "Testdaten/2.png")
    with pytest.raises(AmbiguousLayout, match=r'Classes: --data.train_split "\." ; splits: .* Trainingsdaten'):
        opened(tmp_path, "train", "folder")
    assert opened(tmp_path, ".", "folder").class_names == ("Testdaten", "Trainingsdaten")
    lay_out(tmp_path / "c", "valley/1.png", "testudo/2.png", "lake/3.png")
    assert opened(tmp_path / "c", "train", "folder").num_rows == 3


def test_a_data_set_without_a_test_split_is_not_passed_over_for_one_that_has_it(tmp_path):
    lay_out(tmp_path, "nette/train/1.png", "woof/train/1.png", "woof/val/2.png")
    with pytest.raises(AmbiguousLayout, match="2 folders: nette, woof"):
        opened(tmp_path, "train", "folder")
    assert opened(tmp_path, "train", "folder", config="nette").num_rows == 1


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_folders_beside_those_above_the_splits_are_told_as_not_used(tmp_path, kind):
    lay_out(tmp_path, "data/train/1.png", "data/test/2.png", "more/3.png", "0.png")
    assert notes_of(opened(tmp_path, "train", kind), "unused") == [
        "1 folder not used: more",
        "1 image directly in the root not used: 0.png",
    ]


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_classes_that_no_other_split_has_are_told(tmp_path, kind):
    lay_out(tmp_path, "train/Cat/1.png", "train/Dog/1.png", "test/cat/2.png", "test/dog/2.png")
    for split in ("train", "test"):
        assert "are they spelt alike?" in notes_of(opened(tmp_path, split, kind), "labels")[0]
    lay_out(tmp_path / "b", "train/Cat/1.png", "train/Dog/1.png", "test/Cat/2.png")
    assert not notes_of(opened(tmp_path / "b", "test", kind), "labels")


@pytest.mark.parametrize("names", [("v1.0-train-0", "v1.0-val-0"), ("birds.train.0", "birds.val.0")])
def test_dots_in_the_names_of_tars_hide_no_split(tmp_path, names):
    for name in names:
        tar(tmp_path / f"{name}.tar", [("1.png", PNG)])
    assert list(open_dataset("auto", str(tmp_path), "train").index.names) == [f"{names[0]}.tar/1.png"]
    assert list(open_dataset("auto", str(tmp_path), "test").index.names) == [f"{names[1]}.tar/1.png"]


TWICE = {
    "other totals": ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"),
    "other hashes": ("train-00000-of-00001-aaaa1234ef567890", "train-00000-of-00001-bbbb1234ef567890"),
    "whole and in parts": ("train", "train-00000-of-00001"),
}


@pytest.mark.parametrize("names", TWICE)
def test_files_that_hold_one_set_twice_are_refused(tmp_path, names):
    for name in TWICE[names]:
        parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(AmbiguousLayout, match=r"same images twice.*--data\.train_split NAME"):
        open_dataset("auto", str(tmp_path), "train")
    assert open_dataset("parquet", str(tmp_path), f"{TWICE[names][-1]}.parquet").index.num_rows == 1


def test_files_that_are_missing_by_the_numbers_in_the_names_are_counted(tmp_path):
    for number in (0, 3):
        parquet(tmp_path / f"train-{number:05}-of-00004.parquet")
    (found,) = notes_of(open_dataset("auto", str(tmp_path), "train").index, "left_out")
    assert found.startswith("2 parquet files missing by the numbers in the names: found 2 of 4")


@pytest.mark.parametrize(
    ("first", "named"), [(b"GIF89a", "a GIF, which"), (b"II*\0\0\0\0\0", "TIFF"), (b"\xff\x0a", "JPEG XL")]
)
def test_packing_names_files_of_other_formats_as_the_index_does(first, named):
    assert named in look_at(first).reason


def test_images_of_one_name_in_a_tar_are_told(tmp_path):
    tar(tmp_path / "train-0.tar", [("a.png", PNG), ("b.png", PNG), ("a.png", png(9))])
    told = notes_of(open_dataset("auto", str(tmp_path), "train").index, "taken")
    assert told[1] == "1 image has the name of another in the same tar (train-0.tar/a.png, 2 times); all are used"


@pytest.mark.parametrize(
    ("split", "folder"),
    [("train-*-of-00002*", "train"), ("val.parquet", "val"), ("*-a-*.tar", "train"), ("holdout", "holdout")],
)
def test_patterns_and_file_names_are_packed_into_the_folder_of_their_split(split, folder):
    assert Part(split).folder == folder


def test_a_root_with_braces_or_a_tar_as_the_root_says_how_files_are_named(tmp_path):
    tar(tmp_path / "train-0.tar", [("a.png", PNG)])
    with pytest.raises(DatasetError, match=r"--data\.train_split 'train-\*\.tar'"):
        open_dataset("auto", str(tmp_path / "train-{0..3}.tar"), "train")
    with pytest.raises(DatasetError, match=r"Name the folder that holds it; .* --data\.train_split train-0\.tar"):
        open_dataset("auto", str(tmp_path / "train-0.tar"), "train")
    assert open_dataset("auto", str(tmp_path), "train-*.tar").index.num_rows == 1
