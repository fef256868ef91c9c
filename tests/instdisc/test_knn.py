"""Weighted kNN against a plain reference, and sharded against whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.worker import Worker, run_local
from instdisc.evaluate import knn
from instdisc.evaluate.knn import Neighbours, knn_classify, nearest, nearest_sharded, top1

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


def copies(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a gallery of copies of a few rows, and labels."""
    generator = torch.Generator().manual_seed(seed)
    few_FD = torch.randn(9, 16, generator=generator)
    gallery_ND = few_FD[torch.randint(0, 9, (120,), generator=generator)]
    return torch.randn(40, 16, generator=generator), gallery_ND, torch.randint(0, 4, (120,), generator=generator)


def copies_with_gaps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with rows that have no direction, rows that cannot be used, and the row that each query is."""
    queries_BD, gallery_ND, labels_N = copies(7)
    queries_BD[3], gallery_ND[10], gallery_ND[50, 2] = 0.0, 0.0, torch.nan
    return queries_BD, gallery_ND, labels_N, torch.arange(120) % 5 != 0, (torch.arange(40) * 3 - 8).clamp(min=-1)


def reference_rows(queries_BD, gallery_ND, k, usable_N=None, own_B=None):
    """The k nearest by (cosine, lower row first), each cosine by itself: -1 where there are fewer."""
    rows_Bk = np.full((len(queries_BD), k), -1)
    queries, gallery = (x.double().numpy() for x in (queries_BD, gallery_ND))
    is_usable_N = gallery.any(axis=1) & np.isfinite(gallery).all(axis=1)
    is_usable_N &= True if usable_N is None else usable_N.numpy()
    for b, query in enumerate(queries):
        usable = [n for n in np.flatnonzero(is_usable_N) if query.any() and (own_B is None or n != own_B[b])]
        cosine = {n: round(float(gallery[n] @ query / np.linalg.norm(gallery[n])), 9) for n in usable}
        best = sorted(cosine, key=lambda n: (-cosine[n], n))[:k]
        rows_Bk[b, : len(best)] = best
    return rows_Bk


def search_own_part(worker: Worker) -> dict[str, Neighbours]:
    def part(num_rows: int) -> slice:
        return slice(*(num_rows * r // worker.world_size for r in (worker.rank, worker.rank + 1)))

    mine = part(61)
    found = {"plain": nearest_sharded(features(20, 0), features(61, 1)[mine], labels(61)[mine], mine.start, K)}
    mine = part(120)
    for seed in range(3):
        queries_BD, gallery_ND, labels_N = copies(seed)
        found[f"copies {seed}"] = nearest_sharded(queries_BD, gallery_ND[mine], labels_N[mine], mine.start, 30)
    queries_BD, gallery_ND, labels_N, usable_N, own_B = copies_with_gaps()
    found["gaps"] = nearest_sharded(
        queries_BD, gallery_ND[mine], labels_N[mine], mine.start, 100, usable_R=usable_N[mine], own_B=own_B
    )
    return found


@pytest.fixture(scope="module", params=[0, 3])
def found_by_rank(request):
    return run_local(search_own_part, request.param)


def test_a_sharded_gallery_has_the_neighbours_of_the_whole_one(found_by_rank):
    scores_Bk, indices_Bk = nearest(features(20, 0), features(61, 1), K)
    for found in found_by_rank:
        assert torch.equal(found["plain"].scores_Bk.float(), scores_Bk)
        assert torch.equal(found["plain"].rows_Bk, indices_Bk)
        assert torch.equal(found["plain"].labels_Bk, labels(61)[indices_Bk])


def test_of_equal_rows_the_first_are_neighbours_on_any_number_of_ranks_to_the_bit(found_by_rank):
    for seed in range(3):
        queries_BD, gallery_ND, labels_N = copies(seed)
        expected = nearest_sharded(queries_BD, gallery_ND, labels_N, 0, 30)
        np.testing.assert_array_equal(expected.rows_Bk.numpy(), reference_rows(queries_BD, gallery_ND, 30))
        for found in found_by_rank:
            assert torch.equal(found[f"copies {seed}"].rows_Bk, expected.rows_Bk)
            assert torch.equal(found[f"copies {seed}"].scores_Bk, expected.scores_Bk)
            assert torch.equal(found[f"copies {seed}"].votes(0.1, 4), expected.votes(0.1, 4))


def test_rows_without_a_direction_unusable_ones_and_the_query_itself_are_no_neighbours(found_by_rank):
    queries_BD, gallery_ND, _, usable_N, own_B = copies_with_gaps()
    expected = reference_rows(queries_BD, gallery_ND, 100, usable_N, own_B)
    for found in found_by_rank:
        np.testing.assert_array_equal(found["gaps"].rows_Bk.numpy(), expected)
        assert torch.equal(found["gaps"].scores_Bk == -torch.inf, torch.from_numpy(expected == -1))
        assert not found["gaps"].votes(0.1, 4)[3].any(), "an image that cannot be decoded votes for nothing"


@pytest.mark.parametrize(("numbers", "scores"), [(1 << 23, 1 << 23), (16 * 7, 1 << 23), (16 * 31, 31 * 3)])
def test_neighbours_do_not_depend_on_batches_and_blocks(monkeypatch, numbers, scores):
    queries_BD, gallery_ND, _ = copies(5)
    expected = nearest(queries_BD, gallery_ND, 50)
    monkeypatch.setattr(knn, "_BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(knn, "_BLOCK_SCORES", scores)
    for size in (1, 13, 40):
        parts = [nearest(queries_BD[first : first + size], gallery_ND, 50) for first in range(0, 40, size)]
        found = [torch.cat(part) for part in zip(*parts, strict=True)]
        assert all(map(torch.equal, found, expected))


def test_a_damaged_row_does_not_beat_negative_cosines():
    gallery_ND = -torch.rand(100, 8, generator=torch.Generator().manual_seed(1))
    gallery_ND[0] = 0
    labels_N = torch.tensor([1] + [0] * 99)
    votes_BC = knn_classify(-gallery_ND[1:6], gallery_ND, labels_N, k=5, num_classes=2)
    assert not votes_BC[:, 1].any()
    assert votes_BC[:, 0].all()


def test_accuracy_is_of_the_queries_that_have_neighbours():
    votes_BC = torch.tensor([[0.1, 0.9], [0.0, 0.0], [0.3, 0.7]])
    assert top1(votes_BC, torch.tensor([1, 0, 0])) == 50.0
    assert np.isnan(top1(votes_BC[1:2], torch.tensor([0])))


def test_at_a_small_temperature_queries_that_are_far_from_everything_still_vote():
    queries_BD, gallery_ND = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.5], [-1.0, 0.01]])
    votes_BC = knn_classify(queries_BD, gallery_ND, torch.tensor([1, 0]), k=2, temperature=0.001, num_classes=2)
    assert votes_BC.isfinite().all()
    assert int(votes_BC.argmax()) == 1


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
    monkeypatch.setattr(knn, "_BLOCK_NUMBERS", 97 * 16)
    monkeypatch.setattr(knn, "_BLOCK_SCORES", 500)
    generator = np.random.default_rng(3)
    queries_BD = torch.from_numpy(generator.standard_normal((33, 16)))
    gallery_ND = torch.from_numpy(generator.standard_normal((1000, 16))).to(dtype)
    scores_Bk, indices_Bk = knn.nearest(queries_BD, gallery_ND, 120)
    unit = torch.nn.functional.normalize
    expected = torch.topk(unit(queries_BD, dim=1) @ unit(gallery_ND.double(), dim=1).T, 120, dim=1)
    np.testing.assert_allclose(scores_Bk.numpy(), expected.values.numpy(), atol=1e-6)
    assert (indices_Bk == expected.indices).double().mean() > 0.999  # two may be as near, up to rounding
