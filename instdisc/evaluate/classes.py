"""Labels of test images as training images number their classes, so that kNN can compare the two."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataloading.index import DatasetIndex
from dataloading.notes import LABELS

_NUM_SHOWN = 12


class NoAccuracy(ValueError):
    """There is no kNN accuracy of these images; the message says why."""


def labels_of_queries(train: DatasetIndex, test: DatasetIndex) -> NDArray[np.int64]:
    """Return the labels of the test images in the numbers of the training images' classes, int64 (Q,).

    Classes are matched by their names. Raises NoAccuracy where there is nothing to compare.
    """
    for index, what in ((train, "training"), (test, "test")):
        if index.labels_N is None:
            why = "".join(f": {note.text}" for note in index.notes if note.kind == LABELS)
            raise NoAccuracy(f"found no labels of the {what} images ({index.source}), which a kNN accuracy needs{why}")
    assert train.labels_N is not None
    assert test.labels_N is not None
    there = np.unique(train.labels_N)
    if len(there) < 2:
        raise NoAccuracy(
            f"found one class only, {train.class_names[int(there[0])]!r}, among the training images ({train.source}), "
            "expected at least two for a kNN accuracy"
        )
    if train.class_names == test.class_names:
        return test.labels_N
    number = {name: label for label, name in enumerate(train.class_names)}
    unknown = [
        test.class_names[label] for label in np.unique(test.labels_N).tolist() if test.class_names[label] not in number
    ]
    if unknown:
        raise NoAccuracy(
            f"found test images of classes that no training image has: {_listed(unknown)}; the training images "
            f"({train.source}) have {_listed(train.class_names)}, the test images ({test.source}) have "
            f"{_listed(test.class_names)}. Give the classes of both the same names"
        )
    return np.array([number.get(name, -1) for name in test.class_names], dtype=np.int64)[test.labels_N]


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (f", … ({len(names):,} in all)" if len(names) > _NUM_SHOWN else "")
