"""The picture of a run: test images and their nearest training images."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataloading.headers import FORMATS, decode
from dataloading.index import Dataset
from instdisc.evaluate.knn import Neighbours
from instdisc.pictures import neighbours_picture

NUM_QUERIES = 10
NUM_NEIGHBOURS = 8
_LONGEST_SIDE = 256


def draw_neighbours(train: Dataset, test: Dataset, neighbours: Neighbours, title: str) -> bytes | None:
    """Return a PNG: up to ten test images, one of each class where classes are known, and their eight nearest.

    Images that are left out of kNN are neither; None where no image is left.
    """
    num_neighbours_B = (neighbours.rows_Bk >= 0).sum(dim=1).cpu().numpy()
    queries = _query_rows(test, num_neighbours_B > 0)
    if not queries:
        return None
    found = [slice(0, min(NUM_NEIGHBOURS, int(num_neighbours_B[q]))) for q in queries]
    rows_Qk = [neighbours.rows_Bk[q, part].tolist() for q, part in zip(queries, found, strict=True)]
    scores_Qk = [neighbours.scores_Bk[q, part].tolist() for q, part in zip(queries, found, strict=True)]
    labels, names = test.index.labels_N, test.index.class_names
    correct = None
    if labels is not None and train.index.labels_N is not None:
        train_labels, train_names = train.index.labels_N, train.index.class_names
        correct = [
            [train_names[int(train_labels[r])] == names[int(labels[q])] for r in rows]
            for q, rows in zip(queries, rows_Qk, strict=True)
        ]
    picture = neighbours_picture(
        [image_of(test, q) for q in queries],
        [[image_of(train, r) for r in rows] for rows in rows_Qk],
        correct,
        query_labels=None if labels is None else [names[int(labels[q])] for q in queries],
        scores=scores_Qk,
        title=title,
    )
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", optimize=True)
    return encoded.getvalue()


def image_of(dataset: Dataset, row: int) -> np.ndarray:
    """Return a row's image as uint8 (H, W, 3), large ones reduced; gray where it cannot be decoded."""
    if dataset.pixels_NHWC is not None:
        return dataset.pixels_NHWC[row]
    encoded = _read(dataset, row)
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        image.draft("RGB", (_LONGEST_SIDE, _LONGEST_SIDE))
        image = Image.fromarray(decode(image, dataset.index.rules))
    except (OSError, ValueError, Image.DecompressionBombError):
        return np.full((_LONGEST_SIDE, _LONGEST_SIDE, 3), 128, dtype=np.uint8)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.asarray(image)


def _read(dataset: Dataset, row: int) -> bytes:
    assert dataset.read is not None
    try:
        return dataset.read(row)
    except ValueError:
        return b""  # damaged where it lies; a storage that fails says nothing of it


def _query_rows(test: Dataset, has_neighbours_N: NDArray[np.bool_]) -> list[int]:
    """The first test image with neighbours of each class, else the first few."""
    good = np.flatnonzero(has_neighbours_N)
    labels = test.index.labels_N
    if labels is None:
        return good[:NUM_QUERIES].tolist()
    _, first = np.unique(labels[good], return_index=True)
    return good[first[:NUM_QUERIES]].tolist()
