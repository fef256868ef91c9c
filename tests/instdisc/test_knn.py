"""Weighted kNN against a plain reference, and sharded against whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.worker import Worker, run_local
from instdisc.evaluate import knn
from instdisc.evaluate.knn import knn_classify, nearest, nearest_sharded, top1

NUM_CLASSES, K = 4, 7


def features(count, seed):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def labels(count):
    return torch.arange(count) * 7 % NUM_CLASSES


def reference_votes(queries_BD, gallery_ND, labels_N, k, temperature):
    """w_c = sum of exp(s_i / τ) over the k most similar i of class c, in float64, one query at a time."""
    queries, gallery = (x.double().numpy() for x in (queries_BD, gallery_ND))
    votes_BC = np.zeros((len(queries), NUM_CLASSES))
    for b, query in enumerate(queries):
        cosines = gallery @ query / np.linalg.norm(gallery, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-cosines)[:k]:
            votes_BC[b, labels_N[i]] += np.exp(cosines[i] / temperature)
    return votes_BC


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (K, 0.07), (K, 1.0), (500, 0.1)])
def test_votes_equal_the_reference(k, temperature):
    queries_BD, gallery_ND, labels_N = features(20, 0), features(61, 1), labels(61)
    votes_BC = knn_classify(queries_BD, gallery_ND, labels_N, k=k, temperature=temperature, num_classes=NUM_CLASSES)
    expected_BC = reference_votes(queries_BD, gallery_ND, labels_N.numpy(), k, temperature)
    np.testing.assert_allclose(votes_BC.numpy(), expected_BC, rtol=1e-4)


def test_the_nearest_come_first_and_a_row_is_nearest_to_itself():
    gallery_ND = features(30, 2)
    scores_Bk, indices_Bk = nearest(gallery_ND, gallery_ND, 5)
    assert indices_Bk[:, 0].tolist() == list(range(30))
    torch.testing.assert_close(scores_Bk[:, 0], torch.ones(30))
    assert bool((scores_Bk.diff(dim=1) <= 0).all())


def test_accuracy_is_the_share_of_right_votes_in_percent():
    votes_BC = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert top1(votes_BC, torch.tensor([1, 0, 0])) == pytest.approx(200 / 3)


def search_own_part(worker: Worker) -> tuple:
    start, stop = 61 * worker.rank // worker.world_size, 61 * (worker.rank + 1) // worker.world_size
    found = nearest_sharded(features(20, 0), features(61, 1)[start:stop], labels(61)[start:stop], start, K)
    return found.scores_Bk, found.rows_Bk, found.labels_Bk


def test_a_sharded_gallery_has_the_neighbours_of_the_whole_one():
    scores_Bk, indices_Bk = nearest(features(20, 0), features(61, 1), K)
    for found_scores_Bk, found_rows_Bk, found_labels_Bk in run_local(search_own_part, 3):
        torch.testing.assert_close(found_scores_Bk, scores_Bk)
        assert torch.equal(found_rows_Bk, indices_Bk)
        assert torch.equal(found_labels_Bk, labels(61)[indices_Bk])


@pytest.mark.parametrize("temperature", [0.01, 0.005, 0.001])
def test_a_small_temperature_is_the_vote_of_the_nearest(temperature):
    generator = torch.Generator().manual_seed(0)
    gallery_ND, queries_BD = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (200, 50)
    )
    labels_N = torch.randint(5, (200,), generator=generator)
    scores_BC = knn_classify(queries_BD, gallery_ND, labels_N, k=20, temperature=temperature, num_classes=5)
    assert scores_BC.isfinite().all()
    scores_BN = (queries_BD @ gallery_ND.T).double()
    votes_BC = torch.zeros(50, 5, dtype=torch.float64)
    for b in range(50):
        for n in scores_BN[b].topk(20).indices:
            votes_BC[b, labels_N[n]] += torch.exp((scores_BN[b, n] - scores_BN[b].max()) / temperature)
    assert (scores_BC.argmax(dim=1) == votes_BC.argmax(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neighbours_are_found_block_by_block(monkeypatch, dtype):
    monkeypatch.setattr(knn, "_GALLERY_BLOCK", 97)
    monkeypatch.setattr(knn, "_BLOCK_SCORES", 500)
    generator = np.random.default_rng(3)
    queries_BD = torch.from_numpy(generator.standard_normal((33, 16)))
    gallery_ND = torch.from_numpy(generator.standard_normal((1000, 16))).to(dtype)
    scores_Bk, indices_Bk = knn.nearest(queries_BD, gallery_ND, 120)
    unit = torch.nn.functional.normalize
    expected = torch.topk(unit(queries_BD, dim=1) @ unit(gallery_ND.double(), dim=1).T, 120, dim=1)
    np.testing.assert_allclose(scores_Bk.numpy(), expected.values.numpy(), atol=1e-6)
    assert (indices_Bk == expected.indices).double().mean() > 0.999  # two may be as near, up to rounding
