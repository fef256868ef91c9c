"""The images of a run, opened on every rank: the same ones, and those that the run was started on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from cluster.worker import Worker
from dataloading.index import Dataset, DatasetChanged, DatasetError, DatasetIndex, NoSplit
from dataloading.layout import AmbiguousLayout
from dataloading.notes import TAKEN, Note
from dataloading.pixel_rules import PixelRules
from dataloading.sources import SCANNED_KINDS, kind_of, question
from instdisc.config import TrainConfig
from instdisc.config_sections import DataConfig
from instdisc.images import open_images, storage_of
from instdisc.progress import ImagesTold
from instdisc.runs import Run, RunError


def open_train_set(worker: Worker, config: TrainConfig, run: Run) -> Dataset:
    """Return the training images, agreed with the run. Collective.

    Where opening them reads the header of every image, the first rank does so at the run's first start; all others,
    and all later starts, take what it found from the index that the run keeps. Raises RunError where the images are no
    longer those of the run, DatasetError where they cannot be opened or are too few.

    A run that begins on packed images takes the pixel rules of their manifest, and its configuration then says so; one
    that goes on keeps its own.
    """
    data = config.data
    data = replace(data, kind=kind_of(data.kind, data.root, storage_of(data)))
    is_scanned = data.kind in SCANNED_KINDS
    dataset = stored = None
    if worker.rank == 0:
        stored = run.index() if is_scanned and run.has_index() else None
        try:
            dataset = open_images(
                data,
                data.train_split,
                max_rows=data.max_rows,
                index=stored,
                on_progress=ImagesTold(worker.emit, "looking at the images"),
                as_packed=not run.has_index(),
            )
        except DatasetChanged as error:
            raise run.other_images(str(error)) from error
        if dataset.index.num_rows < 2:
            raise DatasetError(f"{dataset.index.source}: found 1 image, expected at least 2: they are told apart")
        if dataset.index.rules != data.pixel_rules:
            run.keep_config(with_rules_of(config, dataset))
            worker.emit({"kind": "message", "text": _other_rules(dataset), "keep": True})
        run.agree_on_dataset(dataset.index)
        if stored is not None and _knows_more(dataset.index, stored):
            run.keep_index(dataset.index)
    elif not is_scanned:
        dataset = open_images(data, data.train_split, max_rows=data.max_rows, as_packed=True)
    worker.all_gather_object("the run has its index")
    return dataset or open_images(data, data.train_split, max_rows=data.max_rows, index=run.index())


def with_rules_of(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Return the configuration with the pixel rules that the images are seen by."""
    return config.with_overrides({f"data.{name}": value for name, value in asdict(dataset.index.rules).items()})


def _other_rules(dataset: Dataset) -> str:
    rules, present = dataset.index.rules, PixelRules()
    return (
        f"{dataset.index.source}: the pixel rules are those that it was packed by (orientation {rules.orientation}, "
        f"deep samples {rules.deep_samples}); for the present ones ({present.orientation}, {present.deep_samples}) "
        "pack the images again"
    )


def notes_of(train_set: Dataset, test_set: Dataset | None) -> list[dict[str, Any]]:
    """Return what was taken for what and what is left out, as JSON has it; what holds of both sets is there once.

    "images" says of which set: "training", "test", or "training and test".
    """
    sets_of: dict[Note, list[str]] = {}
    for name, dataset in (("training", train_set), ("test", test_set)):
        for note in () if dataset is None else dict.fromkeys(dataset.index.notes):
            sets_of.setdefault(note, []).append(name)
    first = sorted(sets_of, key=lambda note: note.kind != TAKEN)
    return [{"images": " and ".join(sets_of[note]), **note.to_plain()} for note in first]


def tell_notes(worker: Worker, train_set: Dataset, test_set: Dataset | None) -> None:
    """Tell what was taken for what and what is left out."""
    for note in notes_of(train_set, test_set):
        text = f"{note['images']} images: {note['text']}"
        worker.emit({"kind": "message", "text": text, "keep": True, "note": note})


def share_test_set(
    worker: Worker, config: TrainConfig, run: Run, on_missing: Callable[[str], None] | None = None
) -> Dataset | None:
    """Return the test images, as `open_test_set`. Collective.

    Where opening them looks at every image, the first rank alone does so; all others, and later starts, take what it
    found from the run, while the images are those. Other ones are told and looked at again: kNN alone depends on them.
    """
    data = config.data
    is_scanned = kind_of(data.kind, data.root, storage_of(data)) in SCANNED_KINDS
    dataset = None
    if worker.rank == 0:
        stored = _kept_index(run, data, data.test_split, data.max_test_rows) if is_scanned else None
        try:
            dataset = open_test_set(config, on_missing, index=stored)
        except DatasetChanged as error:
            text = f"the test images are other ones than at the last start, kNN goes on with the present ones: {error}"
            worker.emit({"kind": "message", "text": text, "keep": True})
            dataset, stored = open_test_set(config, on_missing), None
        if is_scanned and dataset is not None and (stored is None or _knows_more(dataset.index, stored)):
            run.keep_test_index(dataset.index)
    is_known = worker.all_gather_object(is_scanned and dataset is not None)[0]
    if worker.rank == 0:
        return dataset
    try:
        return open_test_set(config, on_missing, index=run.test_index() if is_known else None)
    except DatasetChanged:
        return open_test_set(config, on_missing)  # `require_same_images` says which rank has other ones


def open_images_of(run: Run, data: DataConfig, split: str, max_rows: int | None) -> Dataset:
    """Return images of a run for one that only reads it: with what the run knows of them, where they are still those.

    Arguments and errors as `dataloading.sources.open_dataset`.
    """
    index = None
    if kind_of(data.kind, data.root, storage_of(data)) in SCANNED_KINDS:
        index = _kept_index(run, data, split, max_rows)
    try:
        return open_images(data, split, max_rows=max_rows, index=index)
    except DatasetChanged:
        return open_images(data, split, max_rows=max_rows)


def _kept_index(run: Run, data: DataConfig, split: str, max_rows: int | None) -> DatasetIndex | None:
    """Return what a run knows of the images of a split, if it was asked for the same ones."""
    asked = question(split, config=data.config, layout_rule=data.layout_rule, max_rows=max_rows)
    kept = run.test_index() if split == data.test_split else None
    if kept is not None and kept.asked == asked:
        return kept
    if split != data.train_split or max_rows != data.max_rows or not run.has_index():
        return None
    try:
        return run.index()
    except DatasetError:
        return None  # it can be made again from the images


def _knows_more(found: DatasetIndex, stored: DatasetIndex) -> bool:
    """Whether later starts would have less to look at with the index found now than with the stored one."""
    return (found.offsets_N is not None and stored.offsets_N is None) or any(
        getattr(found, name) != getattr(stored, name) for name in ("files", "versions", "rules")
    )


def open_test_set(
    config: TrainConfig, on_missing: Callable[[str], None] | None = None, *, index: DatasetIndex | None = None
) -> Dataset | None:
    """Return the test images, None where there are none; `on_missing` is told why. index: a saved one.

    Raises AmbiguousLayout where it is not clear which they are, NoSplit where a split of another name than the usual
    one is not there, since what a person named is never left out, and DatasetChanged where the index does not fit.
    """
    try:
        return open_images(config.data, config.data.test_split, max_rows=config.data.max_test_rows, index=index)
    except (AmbiguousLayout, DatasetChanged):
        raise
    except DatasetError as error:
        if isinstance(error, NoSplit) and config.data.test_split != DataConfig().test_split:
            raise
        if on_missing:
            on_missing(str(error))
        return None


def require_same_images(worker: Worker, train_set: Dataset, test_set: Dataset | None) -> None:
    """Raise RunError where the ranks have different images, as with a stale copy on one machine. Collective."""
    own = [
        None if dataset is None else [dataset.index.num_rows, dataset.index.digest] for dataset in (train_set, test_set)
    ]
    by_rank = worker.all_gather_object(own)
    for rank, other in enumerate(by_rank):
        for name, first, found in zip(("training", "test"), by_rank[0], other, strict=True):
            if first != found:
                raise RunError(
                    f"rank {rank} has other {name} images than rank 0 (rows and digest): found {found}, expected "
                    f"{first}. Give every machine the same data root"
                )
