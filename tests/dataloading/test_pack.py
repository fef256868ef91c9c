"""Packing: the same images, rows and digest as in the source, whatever was interrupted."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_images import encode, picture

from cluster.parallel import ProcessMap
from cluster.store import Store
from cluster.worker import Worker
from dataloading.augment import AugmentConfig
from dataloading.index import DatasetError, NoSplit
from dataloading.loader import make_loader
from dataloading.order import OrderConfig
from dataloading.pack import pack
from dataloading.pack_unit import sample_names
from dataloading.packed import open_manifest
from dataloading.sources import list_images, open_dataset
from dataloading.verify import verify
from instdisc.cli.main import main
from instdisc.config import TrainConfig
from instdisc.config_sections import EvalConfig
from instdisc.train.evaluation import KnnEvaluator

HERE = ProcessMap(0)


def write_jpeg(path, height, width, seed):
    path.write_bytes(encode(picture(height, width, seed), quality=90))


@pytest.fixture
def photos(tmp_path):
    """Images of two classes and several formats, two of them damaged."""
    root = tmp_path / "photos"
    for number in range(40):
        folder = root / "train" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image = picture(60 + number, 110 - number, seed=number)
        kind, ending = ("PNG", "png") if number % 5 == 0 else ("JPEG", "jpg")
        (folder / f"{number:03d}.{ending}").write_bytes(encode(image, kind))
    whole = (root / "train/cat/001.jpg").read_bytes()
    (root / "train/cat/half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/dog/text.png").write_bytes(b"no image")
    return root


def pack_folder(root, target, **more):
    images = list_images("auto", str(root), "train")
    return pack(images, Store(str(target)), "train", **{"parallel": HERE, "shard_mb": 0.02, **more})


def files_of(target):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (target / "train").iterdir()}


def test_damaged_images_are_left_out_and_listed_with_the_reason(photos, tmp_path):
    report = pack_folder(photos, tmp_path / "packed")
    assert (report.num_rows, sorted(report.damaged)) == (40, ["cat/half.jpg", "dog/text.png"])
    assert "truncated" in report.damaged["cat/half.jpg"]
    lines = (tmp_path / "packed/train/damaged.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["cat/half.jpg", "dog/text.png"]
    packed = open_dataset("auto", str(tmp_path / "packed"), "train")
    source = open_dataset("auto", str(photos), "train")
    good = [row for row, name in enumerate(source.index.names) if name not in report.damaged]
    assert list(packed.index.names) == [source.index.names[row] for row in good]
    assert packed.index.heights_N.tolist() == source.index.heights_N[good].tolist()
    assert packed.index.widths_N.tolist() == source.index.widths_N[good].tolist()
    assert packed.index.labels_N.tolist() == source.index.labels_N[good].tolist()
    assert packed.index.class_names == ("cat", "dog")
    assert [packed.read(i) for i in range(40)] == [source.read(row) for row in good]


def test_with_the_damaged_ones_kept_rows_and_digest_are_those_of_the_source(photos, tmp_path):
    report = pack_folder(photos, tmp_path / "packed", keep_bad=True)
    packed, source = (open_dataset("auto", str(root), "train") for root in (tmp_path / "packed", photos))
    assert report.digest == packed.index.digest == source.index.digest
    assert source.index.difference(packed.index) is None
    assert {packed.index.names[row] for row in packed.index.reasons} == {"cat/half.jpg", "dog/text.png"}
    assert np.flatnonzero(packed.index.bad_N).tolist() == sorted(packed.index.reasons)
    some = [open_dataset("auto", str(root), "train", max_rows=17).index for root in (tmp_path / "packed", photos)]
    assert some[0].digest == some[1].digest
    assert some[0].num_rows == 17


@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_are_plain_tars_in_which_every_image_is_where_the_manifest_says(photos, tmp_path, shuffle):
    pack_folder(photos, tmp_path / "packed", shuffle=shuffle)
    manifest, _ = open_manifest(str(tmp_path / "packed"), "train", None)
    assert len(manifest.shards) > 3
    seen, places = {}, []
    for number, shard in enumerate(manifest.shards):
        path = tmp_path / "packed/train" / shard.name
        assert path.stat().st_size == shard.num_bytes
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for member in members:
                if not member.name.endswith(".cls"):
                    seen[member.name] = (number, member.offset_data, member.size)
                    places.append(member.name)
    rows = {name: row for row, name in enumerate(manifest.index.names)}
    assert seen == {
        name: (int(manifest.shard_N[row]), int(manifest.offset_N[row]), int(manifest.length_N[row]))
        for name, row in rows.items()
    }
    in_shards = [rows[name] for name in places]
    assert in_shards == (list(range(40)) if manifest.row_of_place_N is None else manifest.row_of_place_N.tolist())
    assert (manifest.row_of_place_N is None) == (not shuffle)


def test_pixels_are_the_same_from_folder_tars_and_packed_images_in_both_orders(photos, tmp_path):
    (photos / "train/cat/half.jpg").unlink()  # its upper half can be seen where nobody decoded all of it
    pack_folder(photos, tmp_path / "packed", keep_bad=True)
    packed = open_dataset("auto", str(tmp_path / "packed"), "train")

    def pixels(dataset, order=None, threads=1, offsets=(0, 12)):
        loader = make_loader(
            dataset,
            AugmentConfig(size=24),
            seed=4,
            global_batch=12,
            offsets=offsets,
            device="cpu",
            num_threads=threads,
            order=order,
        )
        try:
            batches = list(islice(loader.batches(0), 11))  # three epochs of 41 and a bit
        finally:
            loader.close()
        return {
            (step * 12 // 41, row): (bool(valid), image.numpy().tobytes())
            for step, batch in enumerate(batches)
            for row, valid, image in zip(batch.indices_B.tolist(), batch.valid_B, batch.images_BCHW, strict=True)
            if step * 12 // 41 == (step * 12 + 11) // 41  # not the batches that straddle epochs
        }

    block = OrderConfig("block", lanes=3, window=2)
    folder, tars = pixels(open_dataset("auto", str(photos), "train")), pixels(packed)
    assert folder == tars
    blocks, part = pixels(packed, block), pixels(packed, block, threads=3, offsets=(5, 9))
    assert part.items() <= blocks.items()
    both = folder.keys() & blocks.keys()
    assert len(both) > 60
    assert all(folder[key] == blocks[key] for key in both)


def test_a_packed_set_packs_again_to_the_same_bytes_and_as_a_webdataset_it_has_the_same_images(photos, tmp_path):
    for name in ("cat/half.jpg", "dog/text.png"):
        (photos / "train" / name).unlink()
    pack_folder(photos, tmp_path / "one", shuffle=False)
    pack_folder(tmp_path / "one", tmp_path / "two", shuffle=False)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert {n: h for n, h in one.items() if n.endswith(".tar")} == {n: h for n, h in two.items() if n.endswith(".tar")}
    (tmp_path / "two/train/manifest.arrow").unlink()
    tars = open_dataset("auto", str(tmp_path / "two"), "train")
    packed = open_dataset("auto", str(tmp_path / "one"), "train")
    assert tars.index.source.startswith("webdataset")
    assert [tars.read(row) for row in range(40)] == [packed.read(row) for row in range(40)]
    assert tars.index.labels_N.tolist() == packed.index.labels_N.tolist()
    assert next(iter(tars.index.names)) == "train/000000.tar/cat/001.jpg"


HARD_NAMES = (
    *(f"cat/img.v{number}.jpg" for number in range(1, 9)),
    *("dog/x1.jpg", "dog/x1.jpeg", "dog/x1.JPG", "dog/x1-2.jpg", "dog/x1-2-2.png", "dog/a.b.jpg", "dog/a_b.jpg"),
    *("dog.v2/x1.jpg", "dog.v2/x1.png", "dog.v2/y.tar.jpg", "dog.v2/Zoë 9.41.jpg"),
)


@pytest.fixture
def hard_names(tmp_path):
    """Images under names that agree up to their first dot."""
    root = tmp_path / "hard"
    for number, name in enumerate(HARD_NAMES):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(path, 100 + number, 120, seed=number)
    return root


def samples_of(tar_path):
    """Return the members of a tar by sample as WebDataset groups them: `webdataset.tariterators`, base_plus_ext."""
    samples, last = [], None
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, ending = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name, re.DOTALL).groups()
            if key != last:
                samples.append({"__key__": key})
            assert ending.lower() not in samples[-1]
            samples[-1][ending.lower()] = tar.extractfile(member).read()
            last = key
    return samples


@pytest.mark.parametrize("shuffle", [True, False])
def test_names_that_agree_up_to_their_first_dot_are_samples_of_their_own(hard_names, tmp_path, shuffle):
    pack_folder(hard_names, tmp_path / "packed", shuffle=shuffle, shard_mb=1)
    pack_folder(hard_names, tmp_path / "again", shuffle=shuffle, shard_mb=1, parallel=ProcessMap(2))
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "again")
    samples = samples_of(tmp_path / "packed/train/000000.tar")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(HARD_NAMES)
    label_of = {(hard_names / "train" / n).read_bytes(): n.split("/")[0] for n in HARD_NAMES}
    classes = ("cat", "dog", "dog.v2")
    for sample in samples:
        (image,) = (data for ending, data in sample.items() if ending not in ("__key__", "cls"))
        assert classes[int(sample["cls"])] == label_of.pop(image)
    assert not label_of
    packed, source = (open_dataset("auto", str(root), "train") for root in (tmp_path / "packed", hard_names))
    assert source.index.difference(packed.index) is None
    assert packed.index.digest == source.index.digest
    assert list(packed.index.names) == sorted(HARD_NAMES)
    assert list(verify(*open_manifest(str(tmp_path / "packed"), "train", None), HERE)) == []
    (tmp_path / "packed/train/manifest.arrow").unlink()
    tars = open_dataset("auto", str(tmp_path / "packed"), "train")
    assert sorted(map(tars.read, range(tars.index.num_rows))) == sorted(map(source.read, range(len(HARD_NAMES))))


def test_names_that_serve_stay_as_they_are_whoever_else_would_have_them():
    names = ["a.b.jpg", "a_b.jpg", "c.jpeg", "c.jpg", "c-2.png", "d.e/f.jpg", "rows.parquet/7", "no.ending"]
    assert sample_names(names) == ["a_b-2", "a_b", "c", "c-3", "c-2", "d.e/f", "rows.parquet/7", "no_ending"]


def test_a_sample_with_a_second_image_is_refused_and_not_dropped(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/train-000000.tar", "w") as tar:
        for number, name in enumerate(("a.jpg", "b.v1.jpg", "b.v2.jpg")):
            write_jpeg(tmp_path / "image.jpg", 100, 100 + number, seed=number)
            tar.add(tmp_path / "image.jpg", name)
    with pytest.raises(DatasetError, match=r"two images in one sample, '.*/b\.v1\.jpg' and '.*/b\.v2\.jpg'"):
        open_dataset("auto", str(tmp_path / "tars"), "train")


def test_small_images_keep_their_pixels_and_their_digest(tmp_path):
    report = pack(list_images("demo", None, "test"), Store(str(tmp_path)), "test", parallel=HERE, shard_mb=0.2)
    packed, demo = open_dataset("auto", str(tmp_path), "test"), open_dataset("demo", None, "test")
    assert report.num_shards > 3
    assert np.array_equal(packed.pixels_NHWC, demo.pixels_NHWC)
    assert packed.index.digest == demo.index.digest
    assert demo.index.difference(packed.index) is None
    first = open_dataset("auto", str(tmp_path), "test", max_rows=33)
    assert np.array_equal(first.pixels_NHWC, demo.pixels_NHWC[:33])


class Thumbnails(torch.nn.Module):
    """Unit features without weights."""

    def forward(self, images_BCHW):
        return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(images_BCHW, 4).flatten(1))


def test_an_evaluation_of_packed_images_scores_as_that_of_the_folder_and_without_warnings(photos, tmp_path):
    for name in ("cat/half.jpg", "dog/text.png"):
        (photos / "train" / name).unlink()
    pack_folder(photos, tmp_path / "packed")
    scores = []
    for root in (photos, tmp_path / "packed"):
        images = open_dataset("auto", str(root), "train")
        config = TrainConfig(eval=EvalConfig(resize=40, crop=32, k=5))
        evaluator = KnnEvaluator(images, images, config, Worker(device=torch.device("cpu")))
        bank = SimpleNamespace(rows=torch.eye(48)[:40], last_step=torch.ones(40, dtype=torch.int32))
        scores.append(evaluator.evaluate(SimpleNamespace(encoder=Thumbnails(), bank=bank)).scores)
    assert scores[0] == scores[1]
    assert scores[0]["knn_top1"] > 50


def test_the_number_of_processes_changes_nothing(photos, tmp_path):
    pack_folder(photos, tmp_path / "one")
    progress = []
    pack_folder(photos, tmp_path / "two", parallel=ProcessMap(2), on_progress=lambda *counts: progress.append(counts))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert progress[0] == (0, 42, 0)
    assert progress[-1][:2] == (42, 42)


def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(photos, tmp_path):
    """SIGKILL from outside at random moments, until one start comes through."""
    pack_folder(photos, tmp_path / "whole", shard_mb=0.01)
    command = [sys.executable, "-m", "instdisc.cli.main", "pack", str(photos), str(tmp_path / "killed")]
    command += ["--shard-mb", "0.01", "--workers", "2", "--split", "train"]
    generator, kills = np.random.default_rng(), 0
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert (
                process.wait(generator.uniform(0.6, 1.2) * 1.5**kills) == 0
            )  # long enough on a busy machine in the end
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    else:
        pytest.fail("no start came through")
    assert kills > 0
    time.sleep(0.5)  # orphans of the last kill end by themselves
    report = pack_folder(photos, tmp_path / "killed", shard_mb=0.01)
    assert report.was_packed
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def pack_and_be_killed(source, target):
    """Pack a train split in another process, which is killed after two of its shards."""
    script = (
        "import os, signal, sys\n"
        "from itertools import islice\n"
        "from cluster.store import Store\n"
        "from dataloading.pack import pack\n"
        "from dataloading.sources import list_images\n"
        "def be_killed(function, items):\n"
        "    yield from map(function, islice(items, 2))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "images = list_images('auto', sys.argv[1], 'train')\n"
        "pack(images, Store(sys.argv[2]), 'train', parallel=be_killed, shard_mb=0.02)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(source), str(target)]).returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["auto", "webdataset", "packed"])
def test_a_pack_that_was_killed_is_not_taken_for_a_whole_webdataset(photos, tmp_path, capsys, kind):
    target = tmp_path / "packed"
    pack_and_be_killed(photos, target)
    assert len(list((target / "train").glob("*.tar"))) == 2
    assert main(["index", str(target), "--kind", kind]) == 2
    found = capsys.readouterr()
    assert f"not packed to the end ({target}/train/.parts/plan)" in found.err
    assert "give the instdisc pack command again" in found.err
    assert found.out == ""
    pack_folder(photos, target)
    assert main(["index", str(target), "--kind", kind]) == 0


def test_a_split_that_was_not_packed_to_the_end_is_no_missing_split(photos, tmp_path, capsys):
    target = tmp_path / "packed"
    pack_folder(photos, target)
    (target / "train").rename(target / "test")
    pack_and_be_killed(photos, target)
    assert main(["verify", str(target), "--workers", "0"]) == 2
    assert f"not packed to the end ({target}/train/.parts/plan)" in capsys.readouterr().err
    with pytest.raises(DatasetError, match="not packed to the end") as caught:
        open_dataset("auto", str(target), "train")
    assert not isinstance(caught.value, NoSplit)
    assert open_dataset("auto", str(target), "test").index.num_rows == 40


def test_verify_names_both_splits_where_neither_is_there(photos, capsys):
    assert main(["verify", str(photos), "--workers", "0"]) == 2
    told = capsys.readouterr().err
    assert f"no packed images in {photos}" in told
    assert "train/manifest.arrow nor test/manifest.arrow" in told
    assert f"instdisc pack SRC {photos}" in told


def test_what_is_packed_already_is_not_packed_again_and_other_images_are_refused(photos, tmp_path):
    pack_folder(photos, tmp_path / "packed")
    before = files_of(tmp_path / "packed")
    assert pack_folder(photos, tmp_path / "packed").was_packed
    for change in ({"shard_mb": 0.05}, {"keep_bad": True}, {"shuffle": False}):
        with pytest.raises(DatasetError, match="already there"):
            pack_folder(photos, tmp_path / "packed", **change)
    write_jpeg(photos / "train/cat/new.jpg", 30, 30, seed=1)
    with pytest.raises(DatasetError, match="already there"):
        pack_folder(photos, tmp_path / "packed")
    assert files_of(tmp_path / "packed") == before


def test_a_report_of_other_images_is_not_taken_for_these(photos, tmp_path):
    def end_after_two(function, items):
        for item in islice(items, 2):
            yield function(item)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(photos, tmp_path / "packed", parallel=end_after_two)
    assert len(list((tmp_path / "packed/train/.parts").glob("*.json"))) == 2
    write_jpeg(photos / "train/cat/new.jpg", 30, 30, seed=1)
    pack_folder(photos, tmp_path / "packed")
    pack_folder(photos, tmp_path / "whole")
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "whole")


def test_images_that_are_all_damaged_are_no_data_set(photos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(3):
        (bad / f"{number}.jpg").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="none of the 3 images"):
        pack_folder(bad, tmp_path / "packed")


def test_an_image_whose_name_cannot_be_read_is_damaged_and_others_are_packed(photos, tmp_path):
    images = list_images("auto", str(photos), "train")

    class Refuses:
        is_remote = False

        def __call__(self, row):
            if row == 3:
                raise ValueError("key: found 'a//b.jpg'")
            return images.read(row)

        def subset(self, rows_R):
            read = images.read.subset(rows_R)
            return lambda row: self(3) if rows_R[row] == 3 else read(row)

    report = pack(replace(images, read=Refuses()), Store(str(tmp_path / "packed")), "train", parallel=HERE)
    assert report.num_rows == 39
    assert report.damaged[images.index.names[3]] == "cannot be read: key: found 'a//b.jpg'"


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_names_what_is_damaged(photos, tmp_path, workers):
    pack_folder(photos, tmp_path / "packed")
    manifest, source = open_manifest(str(tmp_path / "packed"), "train", None)
    assert list(verify(manifest, source, ProcessMap(workers))) == []
    path = tmp_path / "packed/train" / manifest.shards[1].name
    row = int(np.flatnonzero(manifest.shard_N == 1)[2])
    data = bytearray(path.read_bytes())
    data[int(manifest.offset_N[row]) + 40] ^= 1
    path.write_bytes(data)
    (tmp_path / "packed/train" / manifest.shards[3].name).unlink()
    problems = list(verify(*open_manifest(str(tmp_path / "packed"), "train", None), ProcessMap(workers)))
    assert any(manifest.index.names[row] in problem and "checksum" in problem for problem in problems)
    assert any(manifest.shards[3].name in problem for problem in problems)
    assert not any(manifest.shards[2].name in problem for problem in problems)


def test_a_manifest_that_is_cut_or_points_elsewhere_is_refused(photos, tmp_path):
    pack_folder(photos, tmp_path / "packed")
    path = tmp_path / "packed/train/manifest.arrow"
    whole = path.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"", b"ARROW1" + bytes(500), whole.replace(b"000001.tar", b"../../.tar")):
        path.write_bytes(wrong)
        with pytest.raises(DatasetError, match="not a whole manifest"):
            open_dataset("packed", str(tmp_path / "packed"), "train")


def change_manifest(path, change):
    """Rewrite a manifest after change(what it says, its columns)."""
    with pa.ipc.open_file(path) as reader:
        batch = reader.get_batch(0)
    about, columns = json.loads(batch.schema.metadata[b"instdisc"]), dict(zip(batch.schema.names, batch, strict=True))
    about = change(about, columns) or about
    changed = pa.record_batch(columns).replace_schema_metadata({"instdisc": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, changed.schema) as writer:
        writer.write_batch(changed)


def with_value(name, row, value):
    def change(about, columns):
        values = columns[name].to_pylist()
        values[row] = value
        columns[name] = pa.array(values, columns[name].type)

    return change


def in_shard(name, value):
    return lambda about, columns: about["shards"][1].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        with_value("row_of_place", 3, 10**6),
        with_value("row_of_place", 3, -1),
        lambda about, columns: with_value("row_of_place", 0, columns["row_of_place"][1].as_py())(about, columns),
        lambda about, columns: columns.update(row_of_place=pa.array(np.roll(columns["row_of_place"], 1))),
        lambda about, columns: columns.pop("row_of_place") and None,
        with_value("length", 0, 2**62),
        with_value("length", 0, -1),
        with_value("offset", 5, -512),
        with_value("offset", 5, 2**63 - 1),
        with_value("shard", 0, 99),
        with_value("height", 0, None),
        lambda about, columns: columns.update(shard=columns["shard"].cast(pa.float64())),
        lambda about, columns: columns.update(name=columns["name"].cast(pa.large_string())),
        in_shard("pieces", []),
        in_shard("num_bytes", "5"),
        in_shard("num_rows", 1),
        in_shard("name", ""),
        lambda about, columns: about.update(reasons=[]),
        lambda about, columns: about.update(fingerprint="/tmp/elsewhere"),
        lambda about, columns: about.update(fingerprint="../elsewhere"),
        lambda about, columns: [about],
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(photos, tmp_path, change):
    pack_folder(photos, tmp_path / "packed")
    path = tmp_path / "packed/train/manifest.arrow"
    change_manifest(path, lambda about, columns: None)
    open_dataset("packed", str(tmp_path / "packed"), "train")
    change_manifest(path, change)
    with pytest.raises(DatasetError, match="not a whole manifest"):
        open_dataset("packed", str(tmp_path / "packed"), "train")


def test_a_split_with_a_broken_manifest_is_no_missing_split(photos, tmp_path, capsys):
    (photos / "train").rename(photos / "test")
    shutil.copytree(photos / "test", photos / "train")
    assert main(["pack", str(photos), str(tmp_path / "packed"), "--workers", "0"]) == 0
    for split in ("train", "test"):
        path = tmp_path / "packed" / split / "manifest.arrow"
        whole = path.read_bytes()
        path.write_bytes(whole[:500])
        assert main(["verify", str(tmp_path / "packed"), "--workers", "0"]) == 2
        assert f"{split}/manifest.arrow is not a whole manifest" in capsys.readouterr().err
        path.write_bytes(whole)
    assert main(["verify", str(tmp_path / "packed"), "--workers", "0"]) == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_cannot_be_listed_is_not_left_out_in_silence(photos, tmp_path, capsys, split):
    shutil.copytree(photos / "train", photos / "test")
    (photos / split / "cat/zz.jpg").symlink_to("/etc/passwd")
    assert main(["pack", str(photos), str(tmp_path / "packed"), "--workers", "0"]) == 2
    assert "outside the data root" in capsys.readouterr().err


def test_links_out_of_the_root_are_refused(photos, tmp_path):
    pack_folder(photos, tmp_path / "packed")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/train").symlink_to(photos / "train")
    with pytest.raises(DatasetError, match="outside the data root"):
        open_dataset("folder", str(tmp_path / "linked"), "train")
    (tmp_path / "linked/train").unlink()
    (tmp_path / "linked/train").symlink_to(tmp_path / "packed/train")
    with pytest.raises(DatasetError, match="outside the data root"):
        open_dataset("packed", str(tmp_path / "linked"), "train")
    shard = tmp_path / "packed/train/000000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(DatasetError, match="outside the data root"):
        open_dataset("packed", str(tmp_path / "packed"), "train")
    (tmp_path / "root").symlink_to(photos)  # the root itself may be a link
    assert open_dataset("folder", str(tmp_path / "root"), "train").index.num_rows == 42


def test_tars_of_somebody_else_are_not_replaced(photos, tmp_path):
    pack_folder(photos, tmp_path / "packed")
    (tmp_path / "packed/train/manifest.arrow").unlink()
    before = files_of(tmp_path / "packed")
    with pytest.raises(DatasetError, match=r"tars .* without a manifest"):
        pack_folder(photos, tmp_path / "packed", shard_mb=0.1)
    assert files_of(tmp_path / "packed") == before


def test_an_interrupted_plan_with_other_options_leaves_nothing(photos, tmp_path):
    def end_after_all(function, items):
        yield from map(function, items)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(photos, tmp_path / "packed", parallel=end_after_all)
    assert (tmp_path / "packed/train/000004.tar").exists()
    (tmp_path / "packed/train/damaged.jsonl").write_text('{"name": "cat/half.jpg", "reason": "of the other plan"}\n')
    for name in ("cat/half.jpg", "dog/text.png"):
        (photos / "train" / name).unlink()
    for _ in range(2):
        report = pack_folder(photos, tmp_path / "packed", shard_mb=0.1)
        assert report.damaged == {}
        assert len(list((tmp_path / "packed/train").glob("*.tar"))) == report.num_shards
    (tmp_path / "packed/train/manifest.arrow").unlink()
    assert open_dataset("webdataset", str(tmp_path / "packed"), "train").index.num_rows == 40


@pytest.mark.parametrize("target", ["{alias}/out", "{photos}/out", "file://{photos}/out", "{photos}"])
def test_a_target_in_the_source_is_refused_however_it_is_written(photos, tmp_path, capsys, target):
    alias = tmp_path / "alias"
    alias.symlink_to(photos)
    assert main(["pack", str(photos), target.format(alias=alias, photos=photos), "--workers", "0"]) == 2
    assert "lies in SRC" in capsys.readouterr().err


def test_names_that_a_terminal_would_obey_are_told_escaped(tmp_path, capsys):
    folder = tmp_path / "photos/train/cat"
    folder.mkdir(parents=True)
    write_jpeg(folder / "good.jpg", 40, 50, 0)
    (folder / os.fsdecode(b"\x1b[2J\n\xff.jpg")).write_bytes(b"no image")
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "packed"), "--workers", "0"]) == 0
    assert r"damaged: cat/\x1b[2J\n\udcff.jpg: no image" in capsys.readouterr().out


def test_a_small_image_that_is_damaged_in_its_shard_is_no_black_image(tmp_path):
    for number in range(6):
        folder = tmp_path / "small/train/a"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(picture(32, 32, seed=number), "PNG"))
    pack_folder(tmp_path / "small", tmp_path / "packed")
    manifest, _ = open_manifest(str(tmp_path / "packed"), "train", None)
    path = tmp_path / "packed/train" / manifest.shards[manifest.shard_N[2]].name
    data = bytearray(path.read_bytes())
    data[int(manifest.offset_N[2]) + 200] ^= 1
    path.write_bytes(data)
    dataset = open_dataset("packed", str(tmp_path / "packed"), "train")
    assert np.flatnonzero(dataset.index.bad_N).tolist() == [2]
    assert "checksum" in dataset.index.reasons[2]
    augment, whole = AugmentConfig(size=32), {"offsets": (0, 6), "device": "cpu", "num_threads": 1}
    with contextlib.closing(make_loader(dataset, augment, seed=0, global_batch=6, **whole)) as loader:
        batch = next(loader.batches(0))
    assert batch.indices_B[~batch.valid_B].tolist() == [2]


def tar_of_images(path, labels=()):
    """Write 8 images, and labels beside the first of them; return where their headers are."""
    with tarfile.open(path, "w") as tar:
        for number in range(8):
            members = {f"{number}.jpg": encode(picture(40, 50, seed=number))}
            if number < len(labels):
                members[f"{number}.cls"] = labels[number]
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return [member.offset for member in tar.getmembers()]


@pytest.mark.parametrize("damage", ["checksum", "zeros", "cut"])
def test_a_tar_that_is_damaged_in_its_middle_is_refused(tmp_path, damage):
    path = tmp_path / "train-0.tar"
    header = tar_of_images(path)[3]
    assert open_dataset("webdataset", str(tmp_path), "train").index.num_rows == 8
    data = bytearray(path.read_bytes())
    if damage == "checksum":
        data[header + 150] ^= 1
    elif damage == "zeros":
        data[header : header + 512] = bytes(512)
    path.write_bytes(data[: header + 300] if damage == "cut" else data)
    with pytest.raises(DatasetError, match=r"train-0.tar is not a whole tar"):
        open_dataset("webdataset", str(tmp_path), "train")


@pytest.mark.parametrize("label", [b"4000000000", b"9" * 25])
def test_a_label_that_would_need_all_memory_is_refused(tmp_path, label):
    tar_of_images(tmp_path / "train-0.tar", [label] * 8)
    with pytest.raises(DatasetError, match=r"label of train-0\.tar/0\.\w+: found label .*below 1,048,576"):
        open_dataset("webdataset", str(tmp_path), "train")


def test_a_shard_that_was_cut_short_is_an_error_of_its_images_only(photos, tmp_path):
    pack_folder(photos, tmp_path / "packed")
    dataset = open_dataset("packed", str(tmp_path / "packed"), "train")
    manifest, _ = open_manifest(str(tmp_path / "packed"), "train", None)
    os.truncate(tmp_path / "packed/train" / manifest.shards[2].name, 700)
    for row in range(dataset.index.num_rows):
        if manifest.shard_N[row] == 2 and manifest.offset_N[row] + manifest.length_N[row] > 700:
            with pytest.raises(OSError, match="cut short"):
                dataset.read(row)
        else:
            assert dataset.read(row)


def test_a_tar_that_is_damaged_is_refused_with_its_name(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"\x01" * 2048)
    with pytest.raises(DatasetError, match=r"train-000000.tar is not a whole tar"):
        open_dataset("auto", str(tmp_path), "train")


def test_members_of_a_webdataset_are_grouped_by_their_key(tmp_path, photos):
    image = (photos / "train/cat/001.jpg").read_bytes()
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in (
            ("a.jpg", image), ("a.cls", b"1"), ("b.json", b"{}"), ("b.seg.jpg", image), ("b.cls", b"0 "),
            ("c/a.txt", b"text"), ("c/a.cls", b"2"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index = open_dataset("webdataset", str(tmp_path), "train").index
    assert list(index.names) == ["train-0.tar/a.jpg", "train-0.tar/b.seg.jpg"]
    assert index.labels_N.tolist() == [1, 0]
