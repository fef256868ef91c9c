"""kNN of a run: on the bank and on re-encoded images, both named, sharded like the bank.

Left out are images that cannot be decoded, as queries and as neighbours, and bank rows that were never written. A test
image that is a training image as well is not its own neighbour.

Shapes: N training images, R of this rank, Q queries, D feature numbers, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cluster.collectives import all_gather_rows
from cluster.worker import Worker
from dataloading.damaged import BadRow
from dataloading.index import Dataset
from dataloading.same_images import rows_of_the_same_images
from instdisc.config import TrainConfig
from instdisc.embedding import Embedded, embed_rows, left_out_text, share
from instdisc.evaluate.classes import NoAccuracy, labels_of_queries
from instdisc.evaluate.knn import Neighbours, nearest_sharded, top1
from instdisc.memory_bank import NEVER
from instdisc.train.state import autocast_dtype

CHECK_BATCHES = 8
"""Batches of an embedding between two looks at whether the workers are asked to end."""


class EvaluationInterrupted(Exception):
    """The workers are asked to return or to leave; raised on every rank, with nothing evaluated."""


class BankRows(Protocol):
    """This rank's rows of a memory bank, and the step of each row's last write."""

    @property
    def rows(self) -> Tensor: ...
    @property
    def last_step(self) -> Tensor: ...


class Evaluable(Protocol):
    """What is evaluated: a run's state, or what was read from a checkpoint."""

    @property
    def encoder(self) -> nn.Module: ...
    @property
    def bank(self) -> BankRows: ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: named numbers, and the neighbours of the queries among the training images."""

    scores: dict[str, float]
    neighbours: Neighbours
    num_test_images: int = 0
    num_training_images: int = 0
    bad_test: tuple[BadRow, ...] = ()
    """Test images that are no queries."""
    bad_training: tuple[BadRow, ...] = ()
    """Training images that are nobody's neighbours."""
    num_unwritten: int = 0
    """Bank rows that were never written."""

    @property
    def num_queries(self) -> int:
        return self.num_test_images - len(self.bad_test)

    def summary(self) -> dict[str, int]:
        """Return the numbers of what was compared and of what was left out."""
        return {
            "num_test_images": self.num_test_images,
            "num_queries": self.num_queries,
            "num_bad_test_images": len(self.bad_test),
            "num_bad_training_images": len(self.bad_training),
            "num_unwritten_bank_rows": self.num_unwritten,
        }

    def left_out(self) -> list[str]:
        """Return a sentence for each kind of what was left out."""
        told = []
        are_alike = self.bad_test == self.bad_training and self.num_test_images == self.num_training_images
        if self.bad_test:
            what = "test images, and the same of the training images," if are_alike else "test images"
            told.append(f"kNN: {left_out_text(self.bad_test, self.num_test_images, what)}")
        if self.bad_training and not are_alike:
            told.append(f"kNN: {left_out_text(self.bad_training, self.num_training_images, 'training images')}")
        # Rows of damaged images are never written, and where none is written yet the bank is no gallery at all.
        if len(self.bad_training) < self.num_unwritten < self.num_training_images:
            told.append(
                f"kNN: {self.num_unwritten:,} of {self.num_training_images:,} rows of the memory bank were never "
                "written and are left out"
            )
        return told


class KnnEvaluator:
    """Evaluates an encoder by the neighbours of the test images among the training images."""

    def __init__(self, train: Dataset, test: Dataset, config: TrainConfig, worker: Worker) -> None:
        self._train, self._test, self._config, self._worker = train, test, config, worker
        self._own = share(train.index.num_rows, worker.rank, worker.world_size)
        self._num_classes = len(train.index.class_names)
        self.no_accuracy = ""
        """Why there are no accuracies, "" where there are."""
        self._labels_Q: Tensor | None = None
        try:
            # Copies: the labels of packed images lie in a mapped file, which torch must not write to.
            self._labels_Q = torch.from_numpy(labels_of_queries(train.index, test.index).copy())
        except NoAccuracy as error:
            self.no_accuracy = str(error)
        labels = train.index.labels_N
        self._labels_R = torch.zeros(len(self._own), dtype=torch.int64)
        if labels is not None:
            self._labels_R = torch.from_numpy(labels[self._own.start : self._own.stop].copy())
        self._same_Q = torch.from_numpy(rows_of_the_same_images(train, test))

    def about(self) -> list[str]:
        """Return what a person should know before the first evaluation."""
        told = [f"no kNN accuracy: {self.no_accuracy}"] if self.no_accuracy else []
        num_same, num_test = self.num_same, self._test.index.num_rows
        if num_same:
            told.append(
                f"kNN: {num_same:,} of {num_test:,} test images are training images as well; none of them is its own "
                "neighbour (leave-one-out)"
            )
        return told

    @property
    def num_same(self) -> int:
        """Test images that are training images as well."""
        return int((self._same_Q >= 0).sum())

    def evaluate(self, state: Evaluable) -> Evaluation:
        """Return "knn_top1" (gallery re-encoded by the present encoder) and "knn_bank_top1" (the bank). Collective.

        An accuracy of no query or of no gallery is left out.

        Raises:
            EvaluationInterrupted: a spot machine's notice can be shorter than the embedding of all images.
        """
        test = self._embed(state, self._test, "test")
        train = self._embed(state, self._train, "training")
        queries_QD = self._gathered(test.features_RD)
        neighbours = self._nearest(queries_QD, train.features_RD)
        is_written_R = state.bank.last_step != NEVER
        accuracies: dict[str, float] = {}
        if self._labels_Q is not None:
            bank_neighbours = self._nearest(queries_QD, state.bank.rows, is_written_R)
            accuracies = {"knn_top1": self._top1(neighbours), "knn_bank_top1": self._top1(bank_neighbours)}
        found = self._worker.all_gather_object(
            {
                "scores": {name: value for name, value in accuracies.items() if value == value},
                "test": [(bad.row, bad.reason) for bad in test.damaged],
                "training": [(bad.row, bad.reason) for bad in train.damaged],
                "unwritten": int((~is_written_R).sum()),
            }
        )
        return Evaluation(
            found[0]["scores"],
            neighbours,
            num_test_images=self._test.index.num_rows,
            num_training_images=self._train.index.num_rows,
            bad_test=_named(self._test, [bad for rank in found for bad in rank["test"]]),
            bad_training=_named(self._train, [bad for rank in found for bad in rank["training"]]),
            num_unwritten=sum(rank["unwritten"] for rank in found),
        )

    def raw_pixels(self) -> float | None:
        """Return the same kNN on the normalised pixels themselves; None where they are not in memory. Collective."""
        train, test = self._train.pixels_NHWC, self._test.pixels_NHWC
        if train is None or test is None or self._labels_Q is None or train.shape[1:] != test.shape[1:]:
            return None
        gallery_RD = self._pixel_vectors(self._train, self._own)
        accuracy = self._top1(self._nearest(self._pixel_vectors(self._test, range(len(test))), gallery_RD))
        return accuracy if accuracy == accuracy else None

    def _pixel_vectors(self, dataset: Dataset, rows: range) -> Tensor:
        """Return the pixels of some rows as vectors, zeros where the image is damaged."""
        assert dataset.pixels_NHWC is not None
        part = slice(rows.start, rows.stop)
        mean, std = (torch.tensor(v) for v in (self._config.augment.mean, self._config.augment.std))
        vectors_RD = ((torch.from_numpy(dataset.pixels_NHWC[part]) / 255 - mean) / std).flatten(1)
        vectors_RD[torch.from_numpy(dataset.index.bad_N[part].copy())] = 0.0
        return vectors_RD.to(self._worker.device)

    def _embed(self, state: Evaluable, dataset: Dataset, name: str) -> Embedded:
        worker, batch = self._worker, self._config.eval.batch
        fewest = dataset.index.num_rows // worker.world_size  # rows of the rank that has the fewest

        def progress(done: int, total: int) -> None:
            # On every rank or on none; the first batch may have come after a wait for shards that was cut short.
            if done <= fewest and (done == batch or done % (batch * CHECK_BATCHES) == 0):
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
            is_asked_to_end=lambda: worker.stop_requested() or worker.leave_requested(),
        )

    def _check_interrupt(self) -> None:
        worker = self._worker
        if worker.all_gather_object(worker.stop_requested() or worker.leave_requested())[0]:
            raise EvaluationInterrupted

    def _gathered(self, features_RD: Tensor) -> Tensor:
        worker = self._worker
        shares = [share(self._test.index.num_rows, r, worker.world_size) for r in range(worker.world_size)]
        return all_gather_rows(features_RD, [len(rows) for rows in shares])

    def _nearest(self, queries_QD: Tensor, gallery_RD: Tensor, usable_R: Tensor | None = None) -> Neighbours:
        return nearest_sharded(
            queries_QD,
            gallery_RD,
            self._labels_R,
            self._own.start,
            self._config.eval.k,
            usable_R=usable_R,
            own_B=self._same_Q.to(queries_QD.device),
        )

    def _top1(self, neighbours: Neighbours) -> float:
        assert self._labels_Q is not None
        return top1(neighbours.votes(self._config.eval.temperature, self._num_classes), self._labels_Q)


def _named(dataset: Dataset, found: list[tuple[int, str]]) -> tuple[BadRow, ...]:
    return tuple(BadRow(row, dataset.index.names[row], reason) for row, reason in found)
