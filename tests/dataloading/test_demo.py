import hashlib
import multiprocessing

import numpy as np
import pytest

from dataloading import demo
from dataloading.cache import ShardCache
from dataloading.demo import CLASS_NAMES, NUM_ROWS, demo_images, demo_rows, kept_demo_images
from dataloading.demo_shapes import MOTIFS, angle, cosine, sine


@pytest.fixture(scope="module")
def train():
    return demo_images("train")


@pytest.fixture(scope="module")
def test():
    return demo_images("test")


def knn_accuracy(gallery_ND, labels_N, queries_MD, labels_M, k):
    """Votes of the k nearest gallery rows by cosine, weighted by exp(score / 0.1), as the kNN of the paper does."""
    gallery_ND = gallery_ND / np.linalg.norm(gallery_ND, axis=1, keepdims=True)
    queries_MD = queries_MD / np.linalg.norm(queries_MD, axis=1, keepdims=True)
    scores_MN = queries_MD @ gallery_ND.T
    nearest_MK = np.argpartition(-scores_MN, k, axis=1)[:, :k]
    weights_MK = np.exp(np.take_along_axis(scores_MN, nearest_MK, axis=1) / 0.1)
    votes_MC = np.stack([(weights_MK * (labels_N[nearest_MK] == c)).sum(axis=1) for c in range(10)], axis=1)
    return (votes_MC.argmax(axis=1) == labels_M).mean()


def normalised(images_NHWC):
    return ((images_NHWC.astype(np.float32) / 255 - 0.45) / 0.25).reshape(len(images_NHWC), -1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_class_has_as_many_images_as_any_other_and_the_classes_are_mixed(split, request):
    images_NHWC, labels_N = request.getfixturevalue(split)
    assert images_NHWC.shape == (NUM_ROWS[split], 32, 32, 3)
    assert images_NHWC.dtype == np.uint8
    assert labels_N.dtype == np.int64
    assert np.bincount(labels_N).tolist() == [NUM_ROWS[split] // 10] * len(CLASS_NAMES)
    blocks = labels_N.reshape(-1, 10)
    assert (np.sort(blocks, axis=1) == np.arange(10)).all()
    assert len(np.unique(blocks, axis=0)) > 0.95 * len(blocks)


def test_no_image_comes_twice_within_or_across_the_splits(train, test):
    images_NHWC = np.concatenate([train[0], test[0]])
    assert len({image.tobytes() for image in images_NHWC}) == NUM_ROWS["train"] + NUM_ROWS["test"]


def test_a_row_is_the_same_image_whatever_else_is_asked_for(test):
    rows = [731, 2, 999, 2, 400]
    images_NHWC, labels_N = demo_rows("test", rows)
    assert np.array_equal(images_NHWC, test[0][rows])
    assert np.array_equal(labels_N, test[1][rows])


def test_another_seed_makes_other_images_and_another_order_of_classes():
    images_NHWC, labels_N = demo_rows("train", np.arange(20))
    others_NHWC, other_labels_N = demo_rows("train", np.arange(20), seed=1)
    assert not np.array_equal(labels_N, other_labels_N)
    assert all(not np.array_equal(a, b) for a, b in zip(images_NHWC, others_NHWC, strict=True))


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "0a03bbeb028ee7c1d3558567a0160f1ecddb7c9f4a5928a174097e46c43f7a9a"),
        ("test", "b44ebc89a2168cd1a10f31a765013162ea32fe2675feba50af9c6f40e383652f"),
    ],
)
def test_the_bytes_are_those_that_the_recipe_was_tuned_on(split, digest):
    images_NHWC, _ = demo_rows(split, np.arange(20))
    assert hashlib.sha256(images_NHWC.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("k", [20, 200])
def test_neighbours_by_raw_pixels_are_of_another_class(train, test, k):
    # Chance is 10 %. Measured 14.4 % (k = 20) and 13.9 % (k = 200).
    assert knn_accuracy(normalised(train[0]), train[1], normalised(test[0]), test[1], k) <= 0.15


def test_the_mean_colour_hardly_tells_the_class(train, test):
    # Chance is 10 %, its standard deviation over 1,000 images about 1 %. Measured 12.9 %.
    gallery_N3, queries_N3 = (images.mean(axis=(1, 2)) - 105 for images in (train[0], test[0]))
    assert knn_accuracy(gallery_N3, train[1], queries_N3, test[1], 20) <= 0.14


def test_every_motif_covers_the_same_area():
    middles = (np.arange(200) + 0.5) / 50 - 2
    v, u = (grid[None] + np.zeros((40, 1, 1)) for grid in np.meshgrid(middles, middles, indexing="ij"))
    draws = tuple(np.random.default_rng(0).random((3, 40, 1, 1)) + np.zeros_like(u))
    areas = [(motif.draw(u, v, draws)[0] < 0).mean() * 16 * motif.size**2 for motif in MOTIFS]
    assert areas == pytest.approx([2.9] * len(MOTIFS), rel=0.02)


def test_the_polynomials_are_cosine_sine_and_angle():
    turns = np.linspace(-0.4999, 0.4999, 10_001)
    assert np.abs(cosine(turns * 5) - np.cos(10 * np.pi * turns)).max() < 1e-6
    assert np.abs(sine(turns * 5) - np.sin(10 * np.pi * turns)).max() < 1e-6
    assert np.abs(angle(np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)) - turns).max() < 1e-3


def test_an_unknown_split_or_row_is_refused():
    with pytest.raises(ValueError, match="found 'validation', expected one of train, test"):
        demo_images("validation")
    with pytest.raises(ValueError, match="found 1000, expected 0 to 999"):
        demo_rows("test", [3, 1000])


def kept(folder, results):
    images_NHWC, labels_N = kept_demo_images("test", ShardCache(folder))
    results.put((hashlib.sha256(images_NHWC.tobytes()).hexdigest(), labels_N.tolist(), images_NHWC.flags.writeable))


def test_processes_of_a_machine_keep_the_images_that_one_of_them_made(test, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=kept, args=(str(tmp_path), results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [(hashlib.sha256(test[0].tobytes()).hexdigest(), test[1].tolist(), True)] * 3
    (path,) = (tmp_path / "demo").iterdir()
    assert path.read_bytes() == test[0].tobytes()


def test_images_that_are_kept_are_not_made_again(train, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path)
    kept_demo_images("train", cache)
    monkeypatch.setattr(demo, "demo_images", None)
    images_NHWC, labels_N = kept_demo_images("train", cache)
    assert np.array_equal(images_NHWC, train[0])
    assert np.array_equal(labels_N, train[1])


@pytest.mark.parametrize("damage", ["a byte", "cut off", "no room", "no folder"])
def test_whatever_the_cache_holds_the_images_are_the_same(test, tmp_path, damage):
    cache = ShardCache(tmp_path / "cache", limit_bytes=100 if damage == "no room" else None)
    kept_demo_images("test", cache)
    if damage == "no folder":
        cache = ShardCache(tmp_path / "file" / "below")
        (tmp_path / "file").write_text("")
    elif damage != "no room":
        (path,) = [path for path in tmp_path.rglob("test-*") if path.is_file()]
        data = path.read_bytes()
        path.write_bytes(data[:-5] if damage == "cut off" else bytes([data[0] ^ 1]) + data[1:])
    for _ in range(2):
        images_NHWC, labels_N = kept_demo_images("test", cache)
        assert np.array_equal(images_NHWC, test[0])
        assert np.array_equal(labels_N, test[1])
    if damage == "a byte":
        assert path.read_bytes() == data, "made anew"
