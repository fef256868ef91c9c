"""One TensorBoard event file, written in this thread so that a failure to write is the caller's to handle."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore - generated code
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore - generated code
from tensorboard.summary.writer.record_writer import RecordWriter

_FILE_VERSION = "brain.Event:2"


class EventFile:
    """An event file in `folder`, which is made if need be; bytes reach the disk at the latest after `flush_s` seconds.

    purge_step: TensorBoard forgets what earlier files of the folder say of this step and later ones. None: nothing.
    Every method raises OSError if the file cannot be written.
    """

    def __init__(self, folder: str, *, purge_step: int | None, flush_s: float) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # TensorBoard recognises the name's first part and reads files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(Path(folder) / name, "xb"))  # noqa: SIM115
        self._flush_s, self._flushed_s = flush_s, time.monotonic()
        self._write(Event(file_version=_FILE_VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, step: int, summary: Summary) -> None:
        """Write what a step has to show."""
        self._write(Event(step=step, summary=summary))
        if time.monotonic() - self._flushed_s >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._records.flush()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        """Write out and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
