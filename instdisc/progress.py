"""What a person sees while something long goes on: one live line in a terminal, plain lines in a log.

An event is a small dict; `kind` says what it is:

    progress  step, num_steps, epoch, loss, images_per_s, data_wait (0 to 1), lr, eta_s (seconds or None)
    knn       step, epoch, knn_top1, knn_bank_top1 (percent), num_queries, num_test_images
    message   text
    phase     text, such as "embedding 3,000 of 10,000"
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from cluster.credentials import without_credentials

LOG_INTERVAL_S = 10.0
"""Seconds between two progress lines of a log."""
_REDRAW_INTERVAL_S = 0.1
_BAR_CELLS = 20
_CLEAR = "\r\x1b[K"
_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Progress:
    """Shows events on a stream (default: standard error).

    In a terminal the newest progress or phase is one line, redrawn in place and cut to the width, and everything else
    stands above it. In a log or a pipe every event is a plain line at once, except that progress, and phases that
    differ from the one before only in their numbers, come at most every 10 seconds.
    is_terminal: None asks the stream.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = _is_terminal(self._stream) if is_terminal is None else is_terminal
        self._clock = clock
        self._shown_s = -math.inf
        self._shown_kind = ""
        self._live: Mapping[str, Any] | None = None
        self._is_shown = True

    @property
    def is_terminal(self) -> bool:
        """Whether the newest progress is one line that is redrawn."""
        return self._is_terminal

    def update(self, event: Mapping[str, Any]) -> None:
        """Show an event; kinds that are not known are left out."""
        kind = event.get("kind")
        if "text" in event:
            event = {**event, "text": without_credentials(str(event["text"]))}
        if kind in ("progress", "phase"):
            self._live, self._is_shown = event, False
            if self._is_due(event):
                self._show_live()
        elif kind in ("knn", "message"):
            self._show_lasting(_knn_line(event) if kind == "knn" else event["text"])

    def close(self) -> None:
        """End the live line: the last progress stays, shown if it was held back; a phase is over and goes."""
        if self._live is not None and self._live["kind"] == "progress":
            if not self._is_shown:
                self._show_live()
            if self._is_terminal:
                self._write("\n")
        elif self._live is not None and self._is_terminal:
            self._write(_CLEAR)
        self._live = None

    def _is_due(self, event: Mapping[str, Any]) -> bool:
        # Phases count up in their text: without the digits, one phase has one text.
        kind = "progress" if event["kind"] == "progress" else re.sub(r"\d[\d,.]*", "0", str(event["text"]))
        interval_s = _REDRAW_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S
        if kind == self._shown_kind and self._clock() - self._shown_s < interval_s:
            return False
        self._shown_kind, self._shown_s = kind, self._clock()
        return True

    def _show_live(self) -> None:
        assert self._live is not None
        self._is_shown = True
        if self._is_terminal:
            self._write(_CLEAR + self._live_line(self._live))
        else:
            line = _progress_line(self._live) if self._live["kind"] == "progress" else _one_line(self._live["text"])
            self._write(line + "\n")

    def _show_lasting(self, text: str) -> None:
        if self._is_terminal and self._live is not None:
            self._write(f"{_CLEAR}{text}\n{self._live_line(self._live)}")
            self._is_shown = True
        else:
            self._write(text + "\n")

    def _live_line(self, event: Mapping[str, Any]) -> str:
        # The last column stays empty: some terminals wrap as soon as it is written.
        width = _width(self._stream) - 1
        if event["kind"] == "phase":
            return _cut(_one_line(event["text"]), width)
        line = _progress_line(event)
        done = min(1.0, event["step"] / max(1, event["num_steps"]))
        bar = _bar(done, self._stream)
        return f"{bar} {line}" if len(bar) + 1 + _columns(line) <= width else _cut(line, width)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float | None) -> str:
    """Return a time as m:ss or h:mm:ss; "?" for None or a number that is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest_s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes}:{rest_s:02d}"


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_bytes(num_bytes: int) -> str:
    """Return a number of bytes with three figures: "512 B", "1.23 MB", "45.6 GB"."""
    # Compared after rounding: 999,999 bytes are 1.00 MB and not 1,000 kB.
    size, unit = next(((size, unit) for size, unit in _UNITS if num_bytes >= 0.9995 * size), (1, "B"))
    value = num_bytes / size
    if unit == "B" or value >= 99.95:
        return f"{value:,.0f} {unit}"
    return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"


def _progress_line(event: Mapping[str, Any]) -> str:
    """Return what matters first first, since a narrow terminal cuts the end."""
    step, num_steps = event["step"], event["num_steps"]
    # Floored: 100 % only when nothing is left.
    percent = 100 * step // max(1, num_steps)
    loss = "?" if event["loss"] is None else f"{event['loss']:.3f}"
    return (
        f"step {step:,}/{num_steps:,} ({percent}%), {duration(event['eta_s'])} left, epoch {event['epoch']:.2f}, "
        f"loss {loss}, {event['images_per_s']:,.0f} images/s, waiting for data {event['data_wait']:.0%}, "
        f"lr {event['lr']:.3g}"
    )


def _knn_line(event: Mapping[str, Any]) -> str:
    found = [
        f"{event[name]:.1f} % {what}"
        for name, what in (("knn_top1", "images re-encoded"), ("knn_bank_top1", "memory bank"))
        if event.get(name) is not None
    ]
    left_out = ""
    if event.get("num_queries") != event.get("num_test_images"):
        left_out = f"; of {event['num_queries']:,} of {event['num_test_images']:,} test images"
    return f"kNN accuracy at step {event['step']:,} (epoch {event['epoch']:.2f}): {', '.join(found)}{left_out}"


def _bar(done: float, stream: TextIO) -> str:
    full, empty = ("█", "░") if "utf" in (getattr(stream, "encoding", None) or "").lower() else ("#", ".")
    num_full = int(done * _BAR_CELLS)
    return full * num_full + empty * (_BAR_CELLS - num_full)


def _one_line(text: Any) -> str:
    """Return the text on one line without control characters, which would move the cursor."""
    return "".join(c for c in " ".join(str(text).split()) if unicodedata.category(c) != "Cc")


def _columns(text: str) -> int:
    """Return the columns of a terminal that the text takes: wide characters (file names have them) take two."""
    return sum(_columns_of(c) for c in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, width: int) -> str:
    used = 0
    for place, character in enumerate(text):
        used += _columns_of(character)
        if used > width:
            return text[:place]
    return text


def _width(stream: TextIO) -> int:
    """Return the terminal's present width; it may change while one looks."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class ImagesTold:
    """Tells how far a long work on images came: images, speed and the time to go."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], what: str, done_before: str = "done") -> None:
        """tell: takes the events. what: such as "packing train". done_before: what an earlier start did with images
        that it left."""
        self._tell, self._what, self._done_before = tell, what, done_before
        self._start: tuple[float, int, int] | None = None

    def __call__(self, done: int, total: int, num_bytes: int = 0) -> None:
        """Say that `done` of `total` images are done, and how many bytes that were; first at the start."""
        now_s = time.monotonic()
        if self._start is None:
            self._start = (now_s, done, num_bytes)
        start_s, first, first_bytes = self._start
        text = f"{self._what}: {done:,} of {total:,} images"
        if done > first:
            spent_s = max(1e-9, now_s - start_s)
            left = duration((total - done) * spent_s / (done - first))
            speed = (done - first) / spent_s
            text += f", {speed:,.0f} images/s"
            if num_bytes > first_bytes:
                text += f", {(num_bytes - first_bytes) / spent_s / 1e6:,.1f} MB/s"
            text += f", {left} left"
        elif done:
            text += f" were {self._done_before} before"
        self._tell({"kind": "phase", "text": text})


class BytesTold:
    """Tells how far a long work on bytes came: how many, speed and the time to go."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], what: str) -> None:
        """tell: takes the events. what: such as "verifying"."""
        self._tell, self._what = tell, what
        self._start_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` bytes are done."""
        # In the unit of the total throughout: a log takes texts that differ in more than numbers for new phases.
        size, unit = next(((s, u) for s, u in _UNITS if total >= s), (1, "B"))
        text = f"{self._what}: {done / size:,.1f} of {total / size:,.1f} {unit}"
        if done:
            spent_s = max(1e-9, time.monotonic() - self._start_s)
            left = duration((total - done) * spent_s / done)
            text += f", {done / spent_s / 1e6:,.1f} MB/s, {left} left"
        self._tell({"kind": "phase", "text": text})
