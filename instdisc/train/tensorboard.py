"""TensorBoard events of a run: what is written under which tag, and what a person should conclude from it.

torch.utils.tensorboard takes seconds to import; it is imported when the first event is written, so that commands which
only look at runs never wait for it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

if TYPE_CHECKING:
    from dataloading.index import Dataset
    from instdisc.evaluate.knn import Neighbours
    from instdisc.train.event_file import EventSink

TAGS: dict[str, str] = {
    "train/loss": "mean loss over the valid images of the steps since the last point",
    "train/lr": "learning rate of the last step, for the global batch",
    "train/images_per_s": "images of all workers per second, data waits included, evaluation excluded",
    "train/data_wait": "share of the time that the slowest rank waited for data, 0 to 1; above 0.1 data are the limit",
    "train/positive_score": "mean cosine of an image's feature with its own bank row; rises in training",
    "train/negative_score": "mean cosine with the rows of the batch's other images; near 1 the features have collapsed",
    "nce/log_z": "log Z that the NCE loss uses",
    "nce/log_z_running": "log of the running estimate of Z; more than 1 away from nce/log_z the loss misleads",
    "nce/log_z_drift": "nce/log_z_running less nce/log_z; beyond 6 either way the run ends",
    "bank/row_norm_min": "length of the shortest of up to 4,096 bank rows of each rank; 1 up to the bank's rounding",
    "bank/row_norm_mean": "mean length of these rows",
    "bank/row_norm_max": "length of the longest of these rows",
    "bank/written_share": "share of all rows that were written at least once; 1 after the first epoch",
    "bank/staleness_mean": "steps since a written row was last written, the mean over these rows; about half an epoch",
    "bank/staleness_steps": "the same, its distribution over rows of rank 0; at most two epochs",
    "bank/effective_rank": "effective rank of the written ones of these rows, the least of the ranks; near 1 collapsed",
    "data/bad_rows": "damaged training images that the run knows of; bad_images.jsonl names them",
    "data/augmented_batch": "the first images of this attempt as the encoder sees them",
    "knn/top1_reencoded": "weighted kNN accuracy in percent, training images encoded by the present encoder",
    "knn/top1_bank": "weighted kNN accuracy in percent, training images as the memory bank has them",
    "knn/neighbours": "test images and their nearest training images",
    "checkpoint/stall_s": "seconds that training waited for the snapshot of a checkpoint, the slowest rank's",
    "checkpoint/write_s": "seconds from the snapshot of a checkpoint to its last object, beside training",
    "checkpoint/megabytes": "written for a checkpoint: the whole memory bank, or what changed of it",
    "checkpoint/age_s": "seconds of training that no committed checkpoint has: lost if all workers died now",
    "checkpoint/age_steps": "the same in steps",
    "cluster/workers": "workers of this group",
    "cluster/restarts": "times that workers of the run were started again, whatever the cause",
    "cluster/preemptions": "of these, because a machine of theirs was about to be taken away",
    "cluster/resizes": "of these, because there was room for more or fewer workers",
    "cluster/recovery_s": "seconds from the end of the group before, by the driver's clock, to the first step of this "
    "one, by the clock of rank 0's machine",
    "cluster/events": "every start of the run's workers: when, how many, from which step, and why",
    "about": "what each tag means",
    "config": "the configuration of the run",
}
"""Every tag that is written, and what it means; the same table stands in TensorBoard under `about`."""

_KNN_TAGS = {"knn_top1": "knn/top1_reencoded", "knn_bank_top1": "knn/top1_bank"}
_MAX_BINS = 64
_MAX_LOG_Z_DISTANCE = 1.0


class EventWriter:
    """Writes the events of one attempt of a run to a URI, which exists from the first event on.

    A folder gets them within 20 seconds; any other place gets files that never change, after 30 seconds at first and
    after 10 minutes at most (`event_mirror`), without training ever waiting for it.
    purge_step: a continued run writes beside the files of the attempts before; their points at this step and later,
    which happened after the checkpoint that the run goes on from, are no longer shown. None: nothing is purged.
    on_failure: told once, in words, if events cannot be written (a full disk), and if they do not reach the store;
    training goes on.
    """

    def __init__(
        self,
        uri: str,
        *,
        attempt: int,
        purge_step: int | None,
        on_failure: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._uri, self._attempt, self._purge_step, self._on_failure = uri, attempt, purge_step, on_failure
        self._sink: EventSink | None = None
        self._has_failed = False

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write a point per tag of `TAGS`; None and values that are not finite are left out."""
        for tag, value in values.items():
            _check_tag(tag)
            if value is not None and math.isfinite(value):
                self._add(step, lambda summary, tag=tag, value=value: summary.scalar(tag, float(value)))

    def histogram(self, step: int, tag: str, values: ArrayLike) -> None:
        """Write the distribution of numbers (any shape; a tensor on the CPU); none where no number is finite."""
        _check_tag(tag)
        # float64: the writer squares and sums in the type that it is given, and int32 would overflow.
        numbers = np.asarray(values, dtype=np.float64).ravel()
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            self._add(step, lambda summary: summary.histogram(tag, numbers, _MAX_BINS))

    def image(self, step: int, tag: str, pixels_HWC: NDArray[np.uint8]) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        _check_tag(tag)
        assert pixels_HWC.dtype == np.uint8, pixels_HWC.dtype
        assert pixels_HWC.ndim == 3, pixels_HWC.shape
        self._add(step, lambda summary: summary.image(tag, pixels_HWC, dataformats="HWC"))

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text in Markdown."""
        _check_tag(tag)
        self._add(step, lambda summary: summary.text(tag, text))

    def knn(self, step: int, scores: Mapping[str, float]) -> None:
        """Write kNN accuracies in percent: "knn_top1" and "knn_bank_top1"."""
        self.scalars(step, {_KNN_TAGS[name]: score for name, score in scores.items()})

    def neighbours(self, step: int, train: Dataset, test: Dataset, neighbours: Neighbours) -> None:
        """Write the picture of test images and their nearest training images."""
        from instdisc.train.neighbours import draw_neighbours

        png = draw_neighbours(train, test, neighbours, f"Nearest neighbours after {step:,} steps")
        if png is None:
            return
        with Image.open(io.BytesIO(png)) as picture:
            self.image(step, "knn/neighbours", np.asarray(picture.convert("RGB")))

    def flush(self) -> None:
        """Write out what is still in memory; what goes to a store other than a folder gets there soon."""
        with self._failing_once():
            if self._sink is not None and not self._has_failed:
                self._sink.flush()

    def close(self) -> None:
        """Write out everything and end; a second call does nothing. A store is waited for, 20 seconds at most."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with self._failing_once():
                sink.close()
            self._tell(sink.take_problem())

    def _add(self, step: int, summarize: Callable[[Any], Any]) -> None:
        """Write `summarize(torch.utils.tensorboard.summary)`, unless writing has failed before."""
        if self._has_failed:
            return
        from torch.utils.tensorboard import summary

        with self._failing_once():
            self._write(self._opened(summary), step, summarize(summary))

    def _opened(self, summary: Any) -> EventSink:
        if self._sink is None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore - generated code

            from instdisc.train.event_file import open_events

            self._sink = open_events(self._uri, self._attempt)
            if self._purge_step is not None:
                self._sink.add(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))
            rows = "\n".join(f"| {tag} | {meaning} |" for tag, meaning in TAGS.items())
            about = summary.text("about", f"| tag | meaning |\n|---|---|\n{rows}")
            self._write(self._sink, self._purge_step or 0, about)
        return self._sink

    def _write(self, sink: EventSink, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore - generated code

        sink.add(Event(step=step, summary=summary))
        self._tell(sink.take_problem())

    def _tell(self, problem: str | None) -> None:
        if problem is not None:
            self._on_failure(problem)

    @contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Report the first failure to write, and leave it at that: a run is worth more than its curves."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                reason = error.strerror or str(error)
                self._on_failure(
                    f"TensorBoard events cannot be written to {self._uri}: {reason}. Training goes on without them; "
                    "the next start of the run writes them again"
                )


def log_z_advice(log_z: float, log_z_running: float) -> str | None:
    """Return what it means that the Z in use is far from its running estimate, and what to do; None where all is well.

    More than 1 apart, the loss's posterior is off by more than a factor of e; on data sets of fewer than about a
    million images the constant of the first batch then lets the loss grow without end.
    """
    distance = log_z_running - log_z
    if not math.isfinite(distance) or abs(distance) <= _MAX_LOG_Z_DISTANCE:
        return None
    how = "below" if distance > 0 else "above"
    return (
        f"log Z of NCE is {log_z:.2f}, {abs(distance):.2f} {how} its running estimate of {log_z_running:.2f}: Z was "
        "estimated while the bank was still random, and with a wrong Z the loss can grow without end while kNN "
        "accuracy falls. Start a new run with objective.z=ema, which follows the running estimate."
    )


def _check_tag(tag: Any) -> None:
    assert tag in TAGS, f"{tag!r} is not documented: add it to TAGS with what it means"
