"""kNN during training: on the bank and on re-encoded images, both named, sharded like the bank.

Shapes: N training images, R of this rank, Q queries, D feature numbers, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.collectives import all_gather_rows
from cluster.worker import Worker
from dataloading.index import Dataset
from instdisc.config import TrainConfig
from instdisc.embedding import embed_rows, share
from instdisc.evaluate.knn import Neighbours, nearest_sharded, top1
from instdisc.train.state import TrainState, autocast_dtype

CHECK_BATCHES = 8
"""Batches of an embedding between two looks at whether the workers are asked to end."""


class EvaluationInterrupted(Exception):
    """The workers are asked to return or to leave; raised on every rank, with nothing evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: named numbers, and the neighbours of the queries among the training images."""

    scores: dict[str, float]
    neighbours: Neighbours


class KnnEvaluator:
    """Evaluates an encoder by the neighbours of the test images among the training images."""

    def __init__(self, train: Dataset, test: Dataset, config: TrainConfig, worker: Worker) -> None:
        self._train, self._test, self._config, self._worker = train, test, config, worker
        self._own = share(train.index.num_rows, worker.rank, worker.world_size)
        self._num_classes = len(train.index.class_names)
        self._labelled = train.index.labels_N is not None and test.index.labels_N is not None
        labels = train.index.labels_N
        self._labels_R = torch.zeros(len(self._own), dtype=torch.int64)
        if labels is not None:
            # Copies: the labels of packed images lie in a mapped file, which torch must not write to.
            self._labels_R = torch.from_numpy(labels[self._own.start : self._own.stop].copy())

    def evaluate(self, state: TrainState) -> Evaluation:
        """Return "knn_top1" (gallery re-encoded by the present encoder) and "knn_bank_top1" (the bank). Collective.

        Raises:
            EvaluationInterrupted: a spot machine's notice can be shorter than the embedding of all images.
        """
        queries_QD = self._gathered(self._embed(state, self._test, "test"))
        gallery_RD = self._embed(state, self._train, "training")
        neighbours = self._nearest(queries_QD, gallery_RD)
        if not self._labelled:
            return Evaluation({}, neighbours)
        bank_neighbours = self._nearest(queries_QD, state.bank.rows)
        scores = {"knn_top1": self._top1(neighbours), "knn_bank_top1": self._top1(bank_neighbours)}
        return Evaluation(scores, neighbours)

    def raw_pixels(self) -> float | None:
        """Return the same kNN on the normalised pixels themselves; None where they are not in memory. Collective."""
        train, test = self._train.pixels_NHWC, self._test.pixels_NHWC
        if train is None or test is None or not self._labelled or train.shape[1:] != test.shape[1:]:
            return None
        gallery_RD = self._pixel_vectors(torch.from_numpy(train[self._own.start : self._own.stop]))
        return self._top1(self._nearest(self._pixel_vectors(torch.from_numpy(test)), gallery_RD))

    def _pixel_vectors(self, pixels_NHWC: Tensor) -> Tensor:
        mean, std = (torch.tensor(v) for v in (self._config.augment.mean, self._config.augment.std))
        return ((pixels_NHWC / 255 - mean) / std).flatten(1).to(self._worker.device)

    def _embed(self, state: TrainState, dataset: Dataset, name: str) -> Tensor:
        worker, batch = self._worker, self._config.eval.batch
        fewest = dataset.index.num_rows // worker.world_size  # rows of the rank that has the fewest

        def progress(done: int, total: int) -> None:
            if done <= fewest and done % (batch * CHECK_BATCHES) == 0:  # on every rank or on none
                self._check_interrupt()
            worker.emit({"kind": "phase", "text": f"embedding {name} images: {done:,} of {total:,} of rank 0"})

        return embed_rows(
            state.encoder,
            dataset,
            share(dataset.index.num_rows, worker.rank, worker.world_size),
            self._config,
            device=worker.device,
            num_threads=worker.num_threads,
            autocast=autocast_dtype(self._config, worker.device),
            on_progress=progress,
        )

    def _check_interrupt(self) -> None:
        worker = self._worker
        if worker.all_gather_object(worker.stop_requested() or worker.leave_requested())[0]:
            raise EvaluationInterrupted

    def _gathered(self, features_RD: Tensor) -> Tensor:
        worker = self._worker
        shares = [share(self._test.index.num_rows, r, worker.world_size) for r in range(worker.world_size)]
        return all_gather_rows(features_RD, [len(rows) for rows in shares])

    def _nearest(self, queries_QD: Tensor, gallery_RD: Tensor) -> Neighbours:
        return nearest_sharded(queries_QD, gallery_RD, self._labels_R, self._own.start, self._config.eval.k)

    def _top1(self, neighbours: Neighbours) -> float:
        votes_QC = neighbours.votes(self._config.eval.temperature, self._num_classes)
        labels_Q = self._test.index.labels_N
        assert labels_Q is not None
        return top1(votes_QC, torch.from_numpy(labels_Q.copy()))
