"""Events read back with TensorBoard's own reader."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from instdisc.evaluate.knn import Neighbours
from instdisc.train.tensorboard import TAGS, EventWriter, log_z_advice


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: keep all events; the default keeps a sample.
    sizes = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(folder), size_guidance=sizes)
    events.Reload()
    return events


def scalars(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_scalars_come_back_and_what_is_not_finite_is_left_out(tmp_path):
    writer = EventWriter(str(tmp_path), attempt=1, purge_step=None)
    writer.scalars(3, {"train/loss": 1.5, "train/lr": None, "nce/log_z": math.nan, "bank/row_norm_max": math.inf})
    writer.scalars(4, {"train/loss": 1.25})
    writer.close()
    assert scalars(tmp_path, "train/loss") == [(3, 1.5), (4, 1.25)]
    assert read(tmp_path).Tags()["scalars"] == ["train/loss"]


def test_kNN_accuracies_come_back_under_their_tags(tmp_path):
    writer = EventWriter(str(tmp_path), attempt=1, purge_step=None)
    writer.knn(8, {"knn_top1": 36.5, "knn_bank_top1": 33.25})
    writer.close()
    assert scalars(tmp_path, "knn/top1_reencoded") == [(8, 36.5)]
    assert scalars(tmp_path, "knn/top1_bank") == [(8, 33.25)]


def test_a_continued_run_hides_the_points_that_are_computed_anew(tmp_path):
    # More than ten attempts, as it must not matter how their numbers are sorted.
    starts = [(1, (10, 20, 30)), *[(20, (20, 30))] * 10, (20, (20,))]
    for attempt, (purge_step, steps) in enumerate(starts, 1):
        writer = EventWriter(str(tmp_path), attempt=attempt, purge_step=purge_step)
        for step in steps:
            writer.scalars(step, {"train/loss": step + (0.0 if attempt == 1 else 0.5)})
        writer.close()
    assert scalars(tmp_path, "train/loss") == [(10, 10.0), (20, 20.5)]


def test_files_are_read_in_the_order_of_the_attempts_whatever_the_clocks_say(tmp_path, monkeypatch):
    now_s = time.time()
    for attempt, (clock_s, purge_step, value) in enumerate(((now_s, 1, 1.0), (now_s - 3600, 5, 2.0)), 1):
        monkeypatch.setattr(time, "time", lambda clock_s=clock_s: clock_s)
        writer = EventWriter(str(tmp_path), attempt=attempt, purge_step=purge_step)
        for step in range(purge_step, 8):
            writer.scalars(step, {"train/loss": value})
        writer.close()
    assert scalars(tmp_path, "train/loss") == [*((step, 1.0) for step in range(1, 5)), *((s, 2.0) for s in (5, 6, 7))]


def test_a_histogram_of_int32_counts_every_value_and_does_not_overflow(tmp_path):
    steps_R = torch.arange(0, 100_000, dtype=torch.int32)
    writer = EventWriter(str(tmp_path), attempt=1, purge_step=None)
    writer.histogram(7, "bank/staleness_steps", steps_R)
    writer.histogram(8, "bank/staleness_steps", [])
    writer.histogram(9, "bank/staleness_steps", [1.0, math.nan])
    writer.close()
    first, last = read(tmp_path).Histograms("bank/staleness_steps")
    found = first.histogram_value
    assert (first.step, last.step) == (7, 9)
    assert (found.num, found.min, found.max) == (100_000, 0, 99_999)
    assert sum(found.bucket) == 100_000
    assert found.sum_squares == pytest.approx(sum(n * n for n in range(100_000)), rel=1e-12)
    assert last.histogram_value.num == 1


def test_a_picture_comes_back_pixel_by_pixel(tmp_path):
    import io

    from PIL import Image

    pixels_HWC = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    writer = EventWriter(str(tmp_path), attempt=1, purge_step=None)
    writer.image(2, "data/augmented_batch", pixels_HWC)
    writer.close()
    (event,) = read(tmp_path).Images("data/augmented_batch")
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels_HWC)


def test_the_neighbours_of_a_data_set_are_written_as_a_picture(tmp_path):
    from tiny_data import write_cifar10

    from dataloading.sources import open_dataset

    root = write_cifar10(tmp_path / "data", num_train=20, num_test=10)
    train, test = (open_dataset("cifar10", str(root), split) for split in ("train", "test"))
    scores_Bk = torch.linspace(0.9, 0.1, 3).expand(10, 3)
    rows_Bk = torch.arange(3).expand(10, 3)
    writer = EventWriter(str(tmp_path / "events"), attempt=1, purge_step=None)
    writer.neighbours(5, train, test, Neighbours(scores_Bk, rows_Bk, torch.zeros_like(rows_Bk)))
    writer.close()
    (event,) = read(tmp_path / "events").Images("knn/neighbours")
    assert event.step == 5
    assert event.width > 4 * 96


def test_every_event_file_explains_its_tags(tmp_path):
    writer = EventWriter(str(tmp_path), attempt=2, purge_step=40)
    writer.scalars(41, {"train/loss": 1.0})
    writer.text(41, "config", "```\n{}\n```")
    writer.close()
    writer.close()
    events = read(tmp_path)
    text = events.Tensors("about/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"| {tag} |" in text for tag in TAGS)
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_tag_that_nobody_documented_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="TAGS"):
        EventWriter(str(tmp_path), attempt=1, purge_step=None).scalars(0, {"train/lost": 1.0})


def test_nothing_is_written_or_imported_before_the_first_event(tmp_path):
    code = (
        "import json, sys; from instdisc.train.tensorboard import EventWriter;"
        f"w = EventWriter({str(tmp_path / 'events')!r}, attempt=1, purge_step=3); w.flush(); w.close();"
        "print(json.dumps([m for m in ('torch', 'tensorboard', 'ray') if m in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(answer.stdout) == []
    assert not Path(tmp_path / "events").exists()


def test_a_file_that_cannot_grow_is_reported_once_and_what_was_written_before_stays(tmp_path):
    code = (
        "import json, resource, sys; from instdisc.train.tensorboard import EventWriter;"
        "told = []; w = EventWriter(sys.argv[1], attempt=1, purge_step=None, on_failure=told.append);"
        "w.scalars(1, {'train/loss': 1.0}); w.flush();"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000));"
        "[(w.scalars(step, {'train/loss': 2.0}), w.flush()) for step in range(2, 200)]; w.close();"
        "print(json.dumps(told))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (told,) = json.loads(answer.stdout)
    assert f"cannot be written to {tmp_path}: File too large" in told
    assert "Traceback" not in answer.stderr
    assert scalars(tmp_path, "train/loss")[0] == (1, 1.0)


def test_advice_comes_only_when_z_is_off_by_more_than_a_factor_of_e():
    assert log_z_advice(10.0, 10.99) is None
    assert log_z_advice(10.0, 9.01) is None
    assert log_z_advice(math.nan, 10.0) is None
    low, high = log_z_advice(10.0, 14.5), log_z_advice(14.5, 10.0)
    assert low is not None
    assert "4.50 below" in low
    assert "objective.z=ema" in low
    assert high is not None
    assert "4.50 above" in high
