import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from cluster.store import Store
from dataloading.index import DatasetError
from dataloading.sources import open_dataset
from instdisc.bad_images import BadImage, BadImages, read_bad_images
from instdisc.cli.main import main
from instdisc.runs import Run

NUM_IMAGES, TRUNCATED, UNREADABLE = 24, (5, 17), (11,)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """JPEG files of several sizes: two with half of their bytes, which only decoding shows, and one that is text."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for row in range(NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (100 + row, 120, 3), dtype=np.uint8)).save(file, "JPEG")
        encoded = file.getvalue()
        if row in TRUNCATED:
            encoded = encoded[: len(encoded) // 10]
        (root / f"{row:02}.jpg").write_bytes(b"text" if row in UNREADABLE else encoded)
    return root


def train(root, uri, *more):
    return main(
        [
            *("train", "cifar10-cpu", "--run", str(uri), "--data.kind", "folder", "--data.root", str(root)),
            *("--data.max_rows", "none", "--model.width", "8", "--model.feature_dim", "16", "--optim.epochs", "3"),
            *("--optim.global_batch", "8", "--system.log_every", "1", "--launcher", "local", *more),
        ]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_in_the_run_and_do_not_stop_it(root, tmp_path, workers, capsys):
    uri = tmp_path / "run"
    assert train(root, uri, "--workers", str(workers), "--data.max_bad_share", "0.5", "--json") == 0
    printed = capsys.readouterr()
    assert "1 damaged image so far, replaced in training; listed in bad_images.jsonl" in printed.err
    document = json.loads(printed.out)
    assert [text for text in document["told"] if "damaged image" in text] == [
        "warning: 1 damaged image so far, replaced in training; listed in bad_images.jsonl"
    ]
    lines = [json.loads(line) for line in (uri / "bad_images.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == sorted([*TRUNCATED, *UNREADABLE])
    assert [line["name"] for line in lines] == ["05.jpg", "11.jpg", "17.jpg"]
    assert "truncated" in lines[0]["reason"]
    assert [line["step"] is None for line in lines] == [False, True, False]
    assert Run(str(uri)).result().summary["num_bad"] == 3


def test_too_many_damaged_images_end_the_run_which_goes_on_when_they_are_allowed(root, tmp_path, capsys):
    uri = tmp_path / "run"
    assert train(root, uri, "--workers", "2", "--data.max_bad_share", "0.05") == 2
    printed = capsys.readouterr().err
    assert "damaged images of 24, expected at most 0.05 of them (data.max_bad_share), for instance 05.jpg: " in printed
    assert "Traceback" not in printed
    assert train(root, uri, "--workers", "2", "--data.max_bad_share", "0.2") == 0
    printed = capsys.readouterr().err
    assert "continuing from the checkpoint of step " in printed
    assert len((uri / "bad_images.jsonl").read_text().splitlines()) == 3


def test_what_the_index_knows_is_counted_before_the_first_step(root, tmp_path, capsys):
    assert train(root, tmp_path / "run", "--workers", "0", "--data.max_bad_share", "0.02") == 2
    assert "found 1 damaged images of 24" in capsys.readouterr().err


def test_a_report_comes_back_as_it_was_written(root, tmp_path):
    index = open_dataset("folder", str(root), "train").index
    known = BadImages(index, 0.5)
    odd = BadImage(3, os.fsdecode(b"\xff\n.jpg"), 'a "reason"\nof two lines', 7)
    assert known.add([odd, odd]) == [odd]
    store = Store(str(tmp_path))
    store.put("bad_images.jsonl", known.to_jsonl())
    again = BadImages(index, 0.5, read_bad_images(store))
    assert again.to_jsonl() == known.to_jsonl()
    assert again.add([odd]) == []
    store.put("bad_images.jsonl", b"{")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_bad_images(store)
