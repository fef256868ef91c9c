"""What kNN counts: every image that can be decoded once, none as its own neighbour, classes by their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import instdisc
from cluster.worker import Worker, run_local
from dataloading.damaged import BadRow
from dataloading.index import Dataset
from dataloading.sources import open_dataset
from instdisc.cli.main import main
from instdisc.config import TrainConfig
from instdisc.embedding import embed_rows
from instdisc.evaluate.classes import NoAccuracy, labels_of_queries
from instdisc.evaluate.knn import Neighbours
from instdisc.train.evaluation import Evaluation, KnnEvaluator
from instdisc.train.neighbours import draw_neighbours

K = 5
CONFIG = TrainConfig().with_overrides(
    {"eval.k": K, "eval.resize": 8, "eval.crop": 8, "eval.batch": 4, "model.feature_dim": 6}
)


class Colours(nn.Module):
    """An encoder: a fixed projection of the mean colours of four quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        quarters = nn.functional.adaptive_avg_pool2d(images_BCHW, 2).flatten(1)
        return nn.functional.normalize(quarters @ self.weight, dim=1)


def write_images(root: Path, split: str, per_class: int, seed: int, side: int = 120, classes="abc") -> None:
    """Noise around a colour of the class; sides above 64 are read when they are needed, others kept in memory."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            coarse = generator.integers(0, 256, (4, 4, 3)) * 0.7 + 76 * np.eye(3)[label % 3]
            image = Image.fromarray(coarse.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
            image.save(folder / f"{split}{number}.png")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:120])


def sets_of(root: Path, test_split: str = "test") -> tuple[Dataset, Dataset]:
    train, test = (open_dataset("folder", str(root), split) for split in ("train", test_split))
    return train, test


def evaluate(
    worker: Worker, root: str, test_split: str = "test", never_written: tuple[int, ...] = ()
) -> tuple[Evaluation, float | None, list[str]]:
    train, test = sets_of(Path(root), test_split)
    evaluator = KnnEvaluator(train, test, CONFIG, worker)
    own = evaluator._own
    bank_ND = torch.randn(train.index.num_rows, 6, generator=torch.Generator().manual_seed(3))
    last_step_N = torch.ones(len(bank_ND), dtype=torch.int32)
    last_step_N[list(never_written)] = -1
    part = slice(own.start, own.stop)
    bank = SimpleNamespace(rows=bank_ND[part], last_step=last_step_N[part])
    encoder = Colours()
    return evaluator.evaluate(SimpleNamespace(encoder=encoder, bank=bank)), evaluator.raw_pixels(), evaluator.about()


HERE = Worker(device=torch.device("cpu"))


def reference(queries_QD, labels_Q, gallery_ND, labels_N, own_Q=None) -> float:
    """Accuracy of weighted kNN, query by query, of those that are there."""
    right = []
    for q, query in enumerate(queries_QD):
        cosines = gallery_ND @ query / np.linalg.norm(gallery_ND, axis=1) / np.linalg.norm(query)
        if own_Q is not None and own_Q[q] is not None:
            cosines[own_Q[q]] = -np.inf
        votes = np.zeros(labels_N.max() + 1)
        for n in np.argsort(-cosines, kind="stable")[:K]:
            votes[labels_N[n]] += np.exp(cosines[n] / CONFIG.eval.temperature)
        right.append(votes.argmax() == labels_Q[q])
    return 100 * float(np.mean(right))


def features_of(dataset: Dataset) -> np.ndarray:
    rows = range(dataset.index.num_rows)
    embedded = embed_rows(Colours(), dataset, rows, CONFIG, device=torch.device("cpu"), num_threads=1)
    return embedded.features_RD.double().numpy()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Three classes; among the training images two are cut off, among the test images all of a class and another."""
    root = tmp_path_factory.mktemp("damaged")
    write_images(root, "train", 8, 0)
    write_images(root, "test", 4, 1)
    for name in ("train/a/train0.png", "train/c/train7.png", "test/b/test2.png"):
        cut_off(root / name)
    for file in (root / "test" / "a").iterdir():
        cut_off(file)
    return root


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undamaged")
    write_images(root, "train", 6, 0)
    return root


def evaluate_both(worker: Worker, damaged: str, undamaged: str) -> tuple:
    return evaluate(worker, damaged, never_written=(0, 5, 23)), evaluate(worker, undamaged, "train")


@pytest.fixture(scope="module", params=[0, 3])
def evaluated(request, damaged, undamaged) -> list[tuple]:
    """By rank: the damaged images, and those that are tested on themselves."""
    return run_local(evaluate_both, request.param, str(damaged), str(undamaged))


def test_damaged_images_are_neither_queries_nor_neighbours(damaged, evaluated):
    train, test = sets_of(damaged)
    good_N, good_Q = (np.flatnonzero(np.linalg.norm(features_of(d), axis=1)) for d in (train, test))
    assert (len(good_N), len(good_Q)) == (22, 7)
    labels_N, labels_Q = train.index.labels_N[good_N], test.index.labels_N[good_Q]
    expected = reference(features_of(test)[good_Q], labels_Q, features_of(train)[good_N], labels_N)
    bank_ND = torch.randn(24, 6, generator=torch.Generator().manual_seed(3)).double().numpy()
    written_N = np.setdiff1d(np.arange(24), [0, 5, 23])
    of_bank = reference(features_of(test)[good_Q], labels_Q, bank_ND[written_N], train.index.labels_N[written_N])
    for (evaluation, _, about), _ in evaluated:
        assert evaluation.scores == pytest.approx({"knn_top1": expected, "knn_bank_top1": of_bank})
        assert evaluation.num_queries == 7
        assert [bad.name for bad in evaluation.bad_test] == [*(f"a/test{n}.png" for n in range(4)), "b/test2.png"]
        assert [bad.name for bad in evaluation.bad_training] == ["a/train0.png", "c/train7.png"]
        assert all("truncated" in bad.reason for bad in (*evaluation.bad_test, *evaluation.bad_training))
        told = evaluation.left_out()
        assert told[0].startswith("kNN: 5 of 12 test images cannot be used and are left out (a/test0.png: ")
        assert told[1].startswith("kNN: 2 of 24 training images cannot be used and are left out (a/train0.png: ")
        assert told[2] == "kNN: 3 of 24 rows of the memory bank were never written and are left out"
        assert about == []
        bad_rows = [bad.row for bad in evaluation.bad_training]
        assert not np.isin(evaluation.neighbours.rows_Bk.numpy(), bad_rows).any()
        assert draw_neighbours(train, test, evaluation.neighbours, "title") is not None


def test_where_no_test_image_can_be_decoded_there_is_no_accuracy_and_no_picture(tmp_path):
    write_images(tmp_path, "train", 4, 0)
    write_images(tmp_path, "test", 2, 1)
    for file in (tmp_path / "test").glob("*/*"):
        cut_off(file)
    evaluation, _, _ = evaluate(HERE, str(tmp_path))
    assert evaluation.scores == {}
    assert (evaluation.num_queries, len(evaluation.bad_test)) == (0, 6)
    assert draw_neighbours(*sets_of(tmp_path), evaluation.neighbours, "title") is None


def test_an_image_is_not_its_own_neighbour(undamaged, evaluated):
    train, _ = sets_of(undamaged, "train")
    labels_N, features_ND = train.index.labels_N, features_of(train)
    bank_ND = torch.randn(18, 6, generator=torch.Generator().manual_seed(3)).double().numpy()
    own = list(range(18))
    for _, (evaluation, _, about) in evaluated:
        assert evaluation.scores["knn_top1"] == reference(features_ND, labels_N, features_ND, labels_N, own)
        assert evaluation.scores["knn_bank_top1"] == reference(features_ND, labels_N, bank_ND, labels_N, own)
        assert not (evaluation.neighbours.rows_Bk == torch.arange(18)[:, None]).any()
        assert about == [
            "kNN: 18 of 18 test images are training images as well; none of them is its own neighbour (leave-one-out)"
        ]


def test_what_cannot_be_used_of_a_set_that_is_gallery_and_queries_is_told_once():
    bad = (BadRow(3, "a/train3.png", "cut off"),)
    neighbours = Neighbours(*(torch.zeros((0, 1)) for _ in range(3)))
    evaluation = Evaluation({}, neighbours, num_test_images=18, num_training_images=18, bad_test=bad, bad_training=bad)
    assert evaluation.left_out() == [
        "kNN: 1 of 18 test images, and the same of the training images, cannot be used and are left out "
        "(a/train3.png: cut off)"
    ]
    other = replace(evaluation, num_training_images=24)
    assert [text.split(" cannot")[0] for text in other.left_out()] == [
        "kNN: 1 of 18 test images",
        "kNN: 1 of 24 training images",
    ]


def test_an_image_is_not_its_own_neighbour_in_raw_pixels_either(tmp_path):
    write_images(tmp_path, "train", 6, 0, 16)
    train, _ = sets_of(tmp_path, "train")
    pixels_ND = (train.pixels_NHWC / 255 - np.array(CONFIG.augment.mean)) / np.array(CONFIG.augment.std)
    pixels_ND, labels_N = pixels_ND.reshape(18, -1), train.index.labels_N
    _, raw, _ = evaluate(HERE, str(tmp_path), "train")
    assert raw == reference(pixels_ND, labels_N, pixels_ND, labels_N, list(range(18)))


def test_raw_pixels_of_damaged_images_are_left_out(tmp_path):
    write_images(tmp_path, "train", 5, 0, 16)
    write_images(tmp_path, "test", 3, 1, 16)
    for name in ("train/b/train1.png", "test/c/test0.png"):
        (tmp_path / name).write_bytes(b"text")
    train, test = sets_of(tmp_path)
    mean, std = np.array(CONFIG.augment.mean), np.array(CONFIG.augment.std)
    (gallery_ND, labels_N), (queries_QD, labels_Q) = (
        (((d.pixels_NHWC / 255 - mean) / std)[~d.index.bad_N].reshape((~d.index.bad_N).sum(), -1), d.index.labels_N)
        for d in (train, test)
    )
    _, raw, _ = evaluate(HERE, str(tmp_path))
    good_N, good_Q = ~train.index.bad_N, ~test.index.bad_N
    assert (int(good_N.sum()), int(good_Q.sum())) == (14, 8)
    assert raw == reference(queries_QD, labels_Q[good_Q], gallery_ND, labels_N[good_N])


def test_classes_are_matched_by_their_names(tmp_path):
    write_images(tmp_path, "train", 2, 0)
    train = open_dataset("folder", str(tmp_path), "train").index
    test = replace(train, class_names=("c", "a", "b"), source="folder elsewhere (test)")
    assert labels_of_queries(train, train).tolist() == [0, 0, 1, 1, 2, 2]
    assert labels_of_queries(train, test).tolist() == [2, 2, 0, 0, 1, 1]
    some = replace(test, class_names=("c", "b"), labels_N=np.array([1, 0, 1, 0, 0, 0]))
    assert labels_of_queries(train, some).tolist() == [1, 2, 1, 2, 2, 2]


def test_what_cannot_be_compared_is_said_with_both_lists(tmp_path):
    write_images(tmp_path, "train", 2, 0)
    train = open_dataset("folder", str(tmp_path), "train").index
    for test, why in (
        (
            replace(train, class_names=("0", "1", "2"), source="there"),
            r"classes.*: 0, 1, 2; .*have a, b, c.* have 0, 1, 2",
        ),
        (replace(train, class_names=("a", "b", "d")), r"no training image has: d; .*have a, b, c.*have a, b, d"),
        (replace(train, labels_N=None), "no labels of the test images"),
    ):
        with pytest.raises(NoAccuracy, match=why):
            labels_of_queries(train, test)
    for other, why in (
        (replace(train, labels_N=None, class_names=()), "no labels of the training images"),
        (replace(train, labels_N=np.ones(6, dtype=np.int64)), "found one class only, 'b', among the training images"),
    ):
        with pytest.raises(NoAccuracy, match=why):
            labels_of_queries(other, train)


@pytest.fixture(scope="module")
def finished(damaged, tmp_path_factory) -> tuple[str, list[dict]]:
    """A run of two epochs on damaged images, and its events."""
    uri, events = str(tmp_path_factory.mktemp("damaged") / "run"), []
    config = instdisc.recipe(
        "cifar10-cpu",
        **{
            "data.root": str(damaged), "data.max_rows": None, "data.max_bad_share": 0.2, "augment.size": 16,
            "eval.resize": 16, "eval.crop": 16, "eval.k": K, "model.architecture": "resnet-small", "model.width": 4,
            "model.blocks": (1,), "model.feature_dim": 8, "optim.global_batch": 8, "optim.norm_group": 8,
            "optim.epochs": 2, "optim.warmup_epochs": 1, "optim.lr": 0.01, "system.tensorboard": False,
            "system.bank_checks": "warn", "eval.baselines": True,
        },
    )  # fmt: skip
    instdisc.fit(config, run=uri, on_event=events.append)
    return uri, events


def test_a_run_tells_what_it_leaves_out_of_knn(finished):
    uri, events = finished
    texts = [event["text"] for event in events if event["kind"] == "message"]
    assert sum("5 of 12 test images cannot be used and are left out (a/test0.png" in text for text in texts) == 1
    assert [event["num_queries"] for event in events if event["kind"] == "knn"] == [7, 7]
    lines = (Path(uri) / "bad_test_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 3, 6]
    summary = json.loads((Path(uri) / "results.json").read_text())["summary"]
    assert (summary["num_queries"], summary["num_bad_test_images"], summary["num_bad_training_images"]) == (7, 5, 2)


def test_the_command_knn_counts_as_the_run_does_and_says_so(finished, capsys):
    uri, events = finished
    assert main(["knn", uri, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    last = [event for event in events if event["kind"] == "knn"][-1]
    assert (document["knn_top1"], document["knn_bank_top1"]) == (last["knn_top1"], last["knn_bank_top1"])
    assert (document["num_queries"], document["num_test_images"]) == (7, 12)
    assert [bad["name"] for bad in document["bad_training_images"]] == ["a/train0.png", "c/train7.png"]
    assert [bad["row"] for bad in document["bad_test_images"]] == [0, 1, 2, 3, 6]
    assert {(note["images"], note["kind"]) for note in document["notes"]} == {("training", "taken"), ("test", "taken")}
    assert main(["knn", uri]) == 0
    printed = capsys.readouterr().out
    assert "on 7 of 12 test images: " in printed
    assert "2 of 24 training images cannot be used and are left out" in printed


def test_embed_names_the_rows_that_have_no_feature(finished, tmp_path, capsys):
    uri, _ = finished
    out, listed = tmp_path / "features.npy", tmp_path / "features.npy.damaged.jsonl"
    assert main(["embed", uri, "--split", "test", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_rows"], document["num_damaged"]) == (12, 5)
    rows = [bad["row"] for bad in document["damaged"]]
    assert rows == [json.loads(line)["row"] for line in listed.read_text().splitlines()] == [0, 1, 2, 3, 6]
    assert np.flatnonzero(np.linalg.norm(np.load(out), axis=1) == 0).tolist() == rows
    assert main(["embed", uri, "--out", str(out)]) == 0
    assert "2 of 24 images cannot be used and have rows of zeros (a/train0.png: " in capsys.readouterr().out
    assert [json.loads(line)["row"] for line in listed.read_text().splitlines()] == [0, 23]


def test_bank_rows_that_were_never_written_are_no_neighbours(finished):
    uri, _ = finished
    bank = instdisc.load_bank(uri)
    assert np.flatnonzero(bank.last_step_N.numpy() < 0).tolist() == [0, 23]
    _, rows_BK = bank.nearest(bank.rows_ND, k=22)
    assert not np.isin(rows_BK.numpy(), [0, 23]).any()
    with pytest.raises(ValueError, match="expected 1 to 22, the number of rows that were written"):
        bank.nearest(bank.rows_ND, k=23)


def test_a_run_without_an_accuracy_says_why(tmp_path):
    events: list[dict] = []
    write_images(tmp_path, "train", 10, 0, 16, classes="a")
    write_images(tmp_path, "test", 2, 1, 16, classes="a")
    config = instdisc.recipe(
        "quickstart",
        **{
            "data.root": str(tmp_path), "data.kind": "folder", "optim.epochs": 1, "optim.global_batch": 5,
            "system.tensorboard": False, "model.width": 4, "optim.warmup_epochs": 0.5,
            "checkpoint.keep_best": "knn_top1", "system.bank_checks": "warn", "optim.lr": 0.001,
        },
    )  # fmt: skip
    instdisc.fit(config, run=str(tmp_path / "run"), on_event=events.append)
    texts = [event["text"] for event in events if event["kind"] == "message"]
    assert sum(text.startswith("no kNN accuracy: found no labels of the training images") for text in texts) == 1
    assert any("keep_best=knn_top1: this run measures no kNN accuracy" in text for text in texts)
