"""A run: one URI (a folder, or any place that fsspec knows) that holds everything of it.

    config.json            what it computes, with what the first start decided (the normalisation group)
    dataset/index.parquet  the images, so that a run can say what differs when they changed
    dataset/digest.json    their number and digest
    dataset/test_index.parquet  the test images, so that later starts and commands need not look at them
    checkpoints/           cluster.checkpoint's format
    tensorboard/           events
    bad_images.jsonl       damaged images, with the reasons; only where there are any
    bad_test_images.jsonl  test images that are left out of kNN, with the reasons; only where there are any
    waiting.json           what a driver last said while it waited for machines, and when
    results.json           written last: the run is finished
    neighbours.png         what it learned, to look at

This module imports neither torch nor Ray, so that a finished run is known to be finished at once.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.coordination import CoordinatorSpec
from cluster.document_kinds import FLAG, MAPPING, WHOLE, require_kinds
from cluster.retention import Retention
from cluster.store import ObjectMissingError, Store
from dataloading.index import DatasetError, DatasetIndex
from instdisc.command_line import command_line
from instdisc.config import TrainConfig, as_begun, resume_differences
from instdisc.config_sections import METRICS, ConfigError
from instdisc.progress import counted
from instdisc.recipes import left_open

CONFIG = "config.json"
INDEX = "dataset/index.parquet"
TEST_INDEX = "dataset/test_index.parquet"
DIGEST = "dataset/digest.json"
RESULTS = "results.json"
_OF_RESULT = {"step": WHOLE, "num_steps": WHOLE, "finished": FLAG, "metrics": MAPPING, "summary": MAPPING}
NEIGHBOURS = "neighbours.png"
WAITING = "waiting.json"


class RunError(ValueError):
    """A run that cannot be used as asked: says what, where, and what to do."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    metrics: curves by name, each a list of (step, value): "knn_top1" (gallery re-encoded by the present encoder),
    "knn_bank_top1" (gallery = the memory bank), "knn_raw_pixels_top1" (normalised pixels, where they are in memory and
    `eval.baselines` asks for them), all in percent. finished: False where it was stopped before the end.
    """

    uri: str
    step: int
    num_steps: int
    finished: bool
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


class Run:
    """Reads and writes what belongs to a run, besides its checkpoints."""

    def __init__(self, uri: str) -> None:
        self.uri = os.path.expanduser(uri)
        self.store = Store(uri)
        if self.store.shown != self.store.uri:
            raise RunError(
                f"run {self.store.shown}: found a user name or password in its URI, which would stand in logs and "
                "files; expected credentials in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, …) or a role"
            )
        if not self.store.is_exclusive:
            raise RunError(
                f"run {self.store.shown}: found {self.store.protocol}://, where it is not known that one of several "
                "writers wins; expected a folder or s3:// for a run (images may lie there)"
            )

    @property
    def folder(self) -> Path | None:
        """The run's folder on this machine, None where the run is elsewhere."""
        if self.uri.startswith("file://"):
            return Path(self.uri.removeprefix("file://"))
        return None if "://" in self.uri else Path(os.path.abspath(self.uri))

    def checkpoints(self) -> Store:
        """Return the store of the run's checkpoints."""
        return Store(self.uri.rstrip("/") + "/checkpoints")

    def coordinator(self, config: TrainConfig) -> CoordinatorSpec:
        """Return what the coordinator of the run's checkpoints is started with."""
        return CoordinatorSpec(uri=self.checkpoints().uri, retention=retention_of(config))

    def config(self) -> TrainConfig | None:
        """Return the stored configuration, None before the first start."""
        text = self._read(CONFIG)
        if text is None:
            return None
        with self._readable(CONFIG):
            return TrainConfig.from_json(text)

    def agree_on_config(self, asked: TrainConfig, *, workers: int = 1) -> TrainConfig:
        """Store the configuration at the first start; later return `asked` with what the first start decided.

        What may change when a run goes on is stored by whoever then trains it (`keep_config`): here nobody knows yet
        whether another process does. A start that never saw its images decided nothing.
        workers: of this start; the normalisation group follows from it if none is asked for. Raises ConfigError where
        a field differs that may not change.
        """
        agreed = self.agreed_config(asked, workers=workers)
        if self.store.create(CONFIG, agreed.to_json().encode()):
            return agreed
        if self.store.exists(DIGEST):
            return as_begun(self.require_same_config(asked), asked, left_open(asked))
        self.keep_config(agreed)
        return agreed

    def agreed_config(self, asked: TrainConfig, *, workers: int = 1) -> TrainConfig:
        """Return what `agree_on_config` does, and store nothing."""
        if self.store.exists(CONFIG) and self.store.exists(DIGEST):
            return as_begun(self.require_same_config(asked), asked, left_open(asked))
        return asked if asked.optim.norm_group is not None else _with_norm_group(asked, max(1, workers))

    def keep_config(self, config: TrainConfig) -> None:
        """Store the configuration of who trains the run now."""
        self.store.put(CONFIG, config.to_json().encode())

    def require_same_config(self, asked: TrainConfig) -> TrainConfig:
        """Return the stored configuration; raise ConfigError where `asked` differs in what may not change."""
        stored = self.config()
        if stored is None:
            raise RunError(f"run {self.uri} has no {CONFIG}: it is damaged. Put the file back, or give another --run")
        differences = resume_differences(stored, asked, left_open(asked))
        if differences:
            raise ConfigError(
                f"run {self.uri} was started with another configuration:\n  " + "\n  ".join(differences) + "\n"
                "Ask for the same values, or give another --run for a new run."
            )
        return stored

    def agree_on_dataset(self, index: DatasetIndex) -> None:
        """Store the index at the first start; later raise RunError where the images are no longer the same."""
        digest = json.dumps({"num_rows": index.num_rows, "digest": index.digest, "source": index.source}).encode()
        if not self.store.exists(INDEX):
            self.store.put(INDEX, index.to_bytes())
        if not self.store.create(DIGEST, digest):
            self.require_same_dataset(index)

    def keep_index(self, index: DatasetIndex) -> None:
        """Store what else is known now of the same training images: where they lie in their tars."""
        self.require_same_dataset(index)
        self.store.put(INDEX, index.to_bytes())

    def keep_test_index(self, index: DatasetIndex) -> None:
        """Store the index of the test images as they are now."""
        self.store.put(TEST_INDEX, index.to_bytes())

    def test_index(self) -> DatasetIndex | None:
        """Return the index of the test images that a start stored last, None where there is none that can be read."""
        try:
            return DatasetIndex.from_bytes(self.store.get(TEST_INDEX), TEST_INDEX)
        except (ObjectMissingError, DatasetError):
            return None

    def require_same_dataset(self, index: DatasetIndex) -> None:
        """Raise RunError where these are not the images that the run was started on, or it has not seen any yet."""
        if not self.has_index():
            raise RunError(f"run {self.uri} has not seen its images yet: start it (instdisc train), then ask again")
        with self._readable(DIGEST):
            stored = json.loads(self.store.get(DIGEST))["digest"]
        if stored != index.digest:
            raise self.other_images(self.index().difference(index) or "the digest differs")

    def other_images(self, difference: str) -> RunError:
        """Return the error that the images are not those that the run was started on."""
        return RunError(
            f"run {self.uri} was started on other images: {difference}. Every image has its own row in the memory "
            "bank, so a run goes on with the same images only: put them back, or give another --run for a new run."
        )

    def has_index(self) -> bool:
        """Whether the run knows its images: it was started before."""
        return self.store.exists(DIGEST)

    def num_rows(self) -> int | None:
        """Return the number of training images, None before the first start has seen them."""
        text = self._read(DIGEST)
        if text is None:
            return None
        with self._readable(DIGEST):
            return int(json.loads(text)["num_rows"])

    def index(self) -> DatasetIndex:
        """Return the stored index of the training images."""
        return DatasetIndex.from_bytes(self.store.get(INDEX), f"{self.uri}/{INDEX}")

    def result(self) -> RunResult | None:
        """Return what the run came to, None where it has not finished."""
        text = self._read(RESULTS)
        if text is None:
            return None
        with self._readable(RESULTS):
            document = json.loads(text)
            require_kinds(document, _OF_RESULT, RESULTS)
            return RunResult(**{**document, "uri": self.uri, "metrics": read_curves(document["metrics"])})

    def say_waiting(self, text: str) -> None:
        """Write down that a driver waits for machines, for whoever asks how the run stands. Errors are ignored."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):
            self.store.put(WAITING, json.dumps({"text": text, "at": now, "host": socket.gethostname()}).encode())

    def waiting(self) -> dict[str, str] | None:
        """Return {"text", "at", "host"} as `say_waiting` wrote it last, None where no driver ever waited."""
        text = self._read(WAITING)
        if text is None:
            return None
        with self._readable(WAITING):
            document = json.loads(text)
            return {name: str(document[name]) for name in ("text", "at", "host")}

    def finish(self, result: RunResult) -> None:
        """Mark the run as finished."""
        document = {
            "step": result.step,
            "num_steps": result.num_steps,
            "finished": True,
            "metrics": result.metrics,
            "summary": result.summary,
        }
        self.store.put(RESULTS, json.dumps(document, indent=1).encode())

    def _read(self, key: str) -> str | None:
        try:
            data = self.store.get(key)
        except ObjectMissingError:
            return None
        with self._readable(key):
            return data.decode()

    @contextmanager
    def _readable(self, key: str) -> Iterator[None]:
        """Say which object it is whose text is not what this version writes."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise RunError(
                f"{key} of run {self.uri} cannot be read: {error}. Expected what instdisc wrote there; put it back "
                "from a copy, or use the version of instdisc that wrote it"
            ) from error


def _with_norm_group(config: TrainConfig, workers: int) -> TrainConfig:
    """Return the configuration with the batch's share of a worker as normalisation group, or less.

    Each worker has a group, and no group holds a single image, which has no variance. Where the batch is too small for
    so many workers it has as many groups as it can.
    """
    batch = config.optim.global_batch
    sizes = [size for size in range(2, batch + 1) if batch % size != 1]
    enough = [size for size in sizes if size <= -(-batch // workers) and -(-batch // size) >= workers]
    return config.with_overrides({"optim.norm_group": max(enough, default=min(sizes))})


def usable_workers(config: TrainConfig, least: int, most: int) -> tuple[int, str]:
    """Return how many of `most` workers have a normalisation group of the batch, and in words why not all ("" if all).

    Raises ConfigError where fewer than `least` have one: the others would stand idle.
    """
    batch, size = config.optim.global_batch, config.optim.norm_group
    groups = most if size is None else -(-batch // size)
    if most <= groups:
        return most, ""
    found = f"a batch of {batch} images has {counted(groups, 'group')} of optim.norm_group={size} for BatchNorm"
    if least <= groups:
        return groups, f"at most {groups} of {most} workers have work: {found}"
    finer = _with_norm_group(config, least).optim.norm_group
    other = "a larger --optim.global_batch" if batch < 2 * least else f"--optim.norm_group {finer}"
    raise ConfigError(
        f"workers: found {least}, but {found}, and the other workers would have no image; give --workers {groups}, or "
        f"start a new run with {other}, which changes what is learnt"
    )


def retention_of(config: TrainConfig) -> Retention:
    """Return which checkpoints a run keeps."""
    kept = config.checkpoint
    return Retention(
        last=kept.keep_last,
        every_steps=kept.keep_every_steps,
        best=kept.keep_best,
        lower_is_better=METRICS.get(kept.keep_best or "") == "lower",
    )


def read_curves(curves: dict[str, list[Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return curves as they came from JSON with their points as tuples."""
    return {name: [(int(step), float(value)) for step, value in points] for name, points in curves.items()}


def existing_run(uri: str) -> Run:
    """Return the run at `uri`. Raises RunError where there is none."""
    run = Run(uri)
    if run.config() is None:
        start = command_line("train", "RECIPE", "--run", run.uri)
        raise RunError(f"no run at {run.uri}: found no {CONFIG}. `{start}` would start one.")
    return run
