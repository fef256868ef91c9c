"""`bench loader` on a few small photographs: every comparison is there, and its numbers are of real work."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pytest
from PIL import Image

from instdisc.benchmark.loader import cpu_seconds, make_photographs
from instdisc.cli.main import main


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder, num=20, size=(100, 140))
    return folder


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of the alternative's libraries, in its workers
def test_the_document_has_every_comparison_in_speed_and_in_cpu_time(photographs, capsys):
    options = ["--trials", "2", "--batches", "2", "--batch", "8", "--size", "32", "--threads", "1", "--sweep", "short"]
    assert main(["bench", "loader", "--source", str(photographs), "--json", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    names = [(result["name"], result["unit"]) for result in document["results"]]
    for name in ("crop and flip", "crop, flip and colour", "crop", "crop against decoding alone"):
        assert (name, "images/s") in names
        assert (f"{name}, CPU time", "CPU-ms/image") in names
    for result in document["results"]:
        assert len(result["trials"]) == len(result["reference_trials"]) == 2
        assert min(result["trials"] + result["reference_trials"]) > 0
    assert document["config"]["median_pixels"] == [140, 100]
    assert {row["error"] for rows in document["sweeps"].values() for row in rows} == {None}


def test_made_up_photographs_are_jpeg_files_with_a_spectrum_that_falls(photographs):
    image = Image.open(sorted(photographs.iterdir())[0])
    assert (image.format, image.size) == ("JPEG", (140, 100))
    power = np.abs(np.fft.rfft2(np.asarray(image.convert("L"), dtype=float)))
    assert power[1:5, 1:5].mean() > 5 * power[20:30, 20:30].mean()


def test_images_that_are_kept_in_memory_cannot_be_measured(tmp_path, capsys):
    for number in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    assert main(["bench", "loader", "--source", str(tmp_path), "--trials", "1"]) == 2
    assert "expected at least a batch" in capsys.readouterr().err


def _spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    time.sleep(2)


def test_the_cpu_time_of_living_children_counts():
    before = cpu_seconds()
    child = multiprocessing.get_context("spawn").Process(target=_spin, args=(0.5,))
    child.start()
    time.sleep(2.2)
    assert 0.4 < cpu_seconds() - before < 8.0
    child.kill()
    child.join()
