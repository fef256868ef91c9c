"""Labels of images, from class folders or as they are written beside them, or the reason why there are none.

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dataloading.index import MAX_CLASSES, DatasetError, DatasetIndex
from dataloading.layout import is_date
from dataloading.notes import LABELS, UNUSED, Note, some

_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}(\.0*)?")
MAX_LABEL_BYTES = 256
"""Longer texts are no names of classes."""
Choice = TypeVar("Choice")
Listed = TypeVar("Listed")


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of the images' classes."""

    labels_N: NDArray[np.int64] | None
    class_names: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


def no_labels(reason: str, count: int = 0) -> Labels:
    """Return that there are none, and why, in words."""
    return Labels(None, notes=(Note(LABELS, f"no labels: {reason}", count),))


def numbered(values: Sequence[int], where: Callable[[int], str]) -> Labels:
    """Return labels that are whole numbers. where(row): the place of a label, for messages.

    Raises DatasetError for a number that no count of classes reaches.
    """
    largest = max(range(len(values)), key=values.__getitem__)
    if values[largest] >= MAX_CLASSES:
        raise DatasetError(
            f"{where(largest)}: found label {values[largest]}, expected below {MAX_CLASSES:,}. Correct or remove it"
        )
    labels_N = np.asarray(values).astype(np.int64)
    if (negative := np.flatnonzero(labels_N < 0)).size:
        row = int(negative[0])
        return no_labels(
            f"{where(row)} is {labels_N[row]}, which stands for none ({negative.size:,} of {len(labels_N):,})",
            negative.size,
        )
    return Labels(labels_N, tuple(map(str, range(int(labels_N[largest]) + 1))))


def spelt(texts: Sequence[str], where: Callable[[int], str]) -> Labels:
    """Return labels that are texts: whole numbers if all of them are, else classes in the order of their names."""
    if all(map(_WHOLE.fullmatch, texts)):
        return numbered([int(text.partition(".")[0]) for text in texts], where)
    names, labels_N = np.unique(np.array(texts, dtype=object), return_inverse=True)
    if len(names) > MAX_CLASSES:
        return no_labels(f"found {len(names):,} different texts, such as {where(0)}; expected classes", len(names))
    text = f"{len(names):,} classes from the texts of the labels, in the order of their names"
    if (num := sum(map(bool, map(_WHOLE.fullmatch, texts)))) > 0:
        row = next(row for row, text in enumerate(texts) if not _WHOLE.fullmatch(text))
        text += f": {num:,} of {len(texts):,} are whole numbers, but {where(row)} is {texts[row][:40]!r}"
    return Labels(labels_N.astype(np.int64), tuple(map(str, names)), (Note(LABELS, text, len(names)),))


def first_labelled(
    choices: Sequence[Choice], list_one: Callable[[Choice], tuple[DatasetIndex, Listed]]
) -> tuple[DatasetIndex, Listed]:
    """Return the first that has labels of those that answer to a split; the first one where none has."""
    first = index, _ = list_one(choices[0])
    if index.labels_N is None:
        for choice in choices[1:]:
            other, listed = list_one(choice)
            if other.labels_N is not None:
                passed = Note(UNUSED, f"{index.num_rows:,} images not used, having no labels: {index.names[0]} and on")
                return replace(other, notes=(*other.notes, passed)), listed
    return first


def folder_labels(
    names: Sequence[str], classes: Sequence[str], *, dates_are_classes: bool
) -> tuple[NDArray[np.int64] | None, tuple[Note, ...]]:
    """Return the number of each image's class folder, None with a note where the folders are no classes.

    names: paths below the split's folder. classes: sorted, of all splits.
    """
    stray = [name for name in names if "/" not in name]
    if not classes:
        return None, (Note(LABELS, "no labels: the images are in no class folders"),)
    if stray:
        more = f" ({len(stray):,} such images of {len(names):,})" if len(stray) > 1 else ""
        return None, (Note(LABELS, f"no labels: {stray[0]} is in no class folder{more}", len(stray)),)
    if len(classes) == 1:
        is_deeper = len({name.rpartition("/")[0] for name in names}) > 1
        advice = ". If folders below it are the classes, name the one that holds them as the data root"
        return None, (
            Note(
                LABELS, f"no labels: all images are in one folder, {classes[0]}; classes need two{advice * is_deeper}"
            ),
        )
    if not dates_are_classes and all(map(is_date, classes)):
        text = (
            f"no labels: the folders {some(classes)} are named by time, not by what they show; as classes: "
            '--data.train_split "." for the folders of the root, or ./train for those in it'
        )
        return None, (Note(LABELS, text, len(classes)),)
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name.partition("/")[0]] for name in names], dtype=np.int64), ()


def apart(own: Collection[str], others: Collection[str]) -> tuple[Note, ...]:
    """Return the note that no class of a split is one of another split, where both have some."""
    if not own or not others or set(own) & set(others):
        return ()
    shown = f"{some(sorted(own)[:3])} here; {some(sorted(others)[:3])} there"
    return (
        Note(LABELS, f"no class is the same as in another split ({shown}), so kNN finds none; are they spelt alike?"),
    )
