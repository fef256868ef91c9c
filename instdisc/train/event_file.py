"""TensorBoard event files, and where those of a run are written: into its folder, or through a mirror into its store.

Written in the caller's thread, so that a failure to write is the caller's to handle.
"""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import BinaryIO, Protocol

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore - generated code
from tensorboard.summary.writer.record_writer import RecordWriter

from cluster.store import Store

_FILE_VERSION = "brain.Event:2"
_FLUSH_S = 20.0


class EventSink(Protocol):
    """Takes the events of one attempt of a run. Every method raises OSError where nothing can be written."""

    def add(self, event: Event) -> None:
        """Write an event; it gets the present time."""
        ...

    def flush(self) -> None:
        """Bring what was written to where TensorBoard reads it, now or soon."""
        ...

    def close(self) -> None:
        """Bring all that was written there, and end."""
        ...

    def take_problem(self) -> str | None:
        """Return what went wrong beside training and is worth telling, once."""
        ...


def open_events(uri: str, attempt: int) -> EventSink:
    """Return where the events of an attempt of a run go, below the URI of its events."""
    store = Store(uri)
    if store.protocol == "file":
        return EventFolder(store.root, attempt)
    from instdisc.train.event_mirror import EventMirror

    mirror = EventMirror(store, attempt)
    mirror.start()
    return mirror


def event_file_name(attempt: int, number: int) -> str:
    """Return the name of an attempt's event file number `number`.

    TensorBoard recognises the name's first part and reads files in the order of their names: that of the attempts, and
    not that of the clocks of the machines that rank 0 was on.
    """
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    return f"events.out.tfevents.{attempt:010d}.{number:06d}.{host}"


class EventFile:
    """An event file, written to a stream that it owns."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self._records = RecordWriter(stream)
        self.add(Event(file_version=_FILE_VERSION))

    @property
    def num_bytes(self) -> int:
        return self.stream.tell()

    def add(self, event: Event) -> None:
        """Write an event; it gets the present time."""
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def content(self) -> bytes:
        """Return the whole file. The stream can be read."""
        self.stream.seek(0)
        return self.stream.read()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._records.flush()

    def close(self) -> None:
        """Write out and close the stream."""
        self._records.close()


class EventFolder:
    """Events in one file of a folder, which is made if need be; bytes reach it at the latest after 20 seconds."""

    def __init__(self, folder: str, attempt: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = EventFile(open(Path(folder) / event_file_name(attempt, 0), "xb"))  # noqa: SIM115
        self._flushed_s = time.monotonic()

    def add(self, event: Event) -> None:
        """See `EventSink`."""
        self._file.add(event)
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """See `EventSink`."""
        self._file.flush()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        """See `EventSink`."""
        self._file.close()

    def take_problem(self) -> str | None:
        """See `EventSink`; what goes wrong in a folder is raised."""
        return None
