"""Who trains a run: a heartbeat object that its holder renews, and that others read before they take over.

A heartbeat says that somebody is there, and since when; it is not what keeps checkpoints safe (that is the number of
the attempt, which only one can win). Times of different machines are never compared: who wants to take over watches
whether the heartbeat still changes.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cluster.manifest import ManifestError, decode_document, encode_document
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

KEY = "heartbeat.json"
BEAT_S = 10.0
LEASE_S = 35.0
_WATCH_S = 1.0


class RunHeldError(CheckpointError):
    """Another process trains this run."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A driver process: what tells it from others, and on its own machine whether it still lives.

    token: random. boot, pid_namespace, started: so that no other machine's or later process passes for it.
    """

    token: str
    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> Holder:
        """Return the holder that stands for this process; the same at each call."""
        return _holder_of(os.getpid())

    def is_surely_dead(self) -> bool:
        """Whether this was a process of this machine that has ended. Of others one cannot tell."""
        here = Holder.of_this_process()
        if (self.boot, self.pid_namespace) != (here.boot, here.pid_namespace):
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _holder_of(pid: int) -> Holder:
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        pid_namespace=os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        pid=pid,
        started=_started(pid),
    )


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if there is none or it is a zombie."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


class Lease:
    """A holder's heartbeat in a run's store. `take` it, renew it with `beat`, and `release` it."""

    def __init__(
        self,
        store: Store,
        holder: Holder,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._holder = store, holder
        self._lease_s, self._clock, self._sleep = lease_s, clock, sleep
        self._since = ""
        self._beats = 0
        self._held = False
        self._released = False
        # A beat that is on its way when the lease is released would take it again.
        self._writing = threading.Lock()

    def take(self) -> None:
        """Take the lease: at once if nobody has it, if the one who had it released it or surely ended, or is us.

        Else watch the heartbeat: RunHeldError if it is renewed; without a renewal for `lease_s` seconds it is taken.
        """
        first = self._read()
        deadline = self._clock() + self._lease_s
        while True:
            found = self._read()
            if found is None or found["released"]:
                break
            other = Holder(**found["holder"])
            if other.token == self._holder.token or other.is_surely_dead():
                break
            if first is None or found["beats"] != first["beats"] or found["holder"] != first["holder"]:
                raise RunHeldError(
                    f"{self._store.uri} is trained by {other} since {found['since']}: its heartbeat goes on. Wait for "
                    "its end or stop it, then give the same command again; or give another --run"
                )
            if self._clock() >= deadline:
                break
            self._sleep(_WATCH_S)
        self._since, self._beats = datetime.now(UTC).isoformat(timespec="seconds"), 0
        self._held, self._released = True, False
        self._write(released=False)

    def beat(self) -> bool:
        """Renew the heartbeat; False, and nothing is written, if somebody else has the lease by now.

        Of a holder whose coordinator was started again it is renewed, too.
        """
        found = self._read()
        with self._writing:
            self._resume(found)
        if not self._held:
            return True
        if found is not None and found["holder"]["token"] != self._holder.token:
            self._held = False
            return False
        self._beats += 1
        self._write(released=False)
        return True

    def release(self) -> None:
        """Say that nobody trains the run any more."""
        with self._writing:
            if not self._held:
                self._resume(self._read())
            was_held = self._held
            self._held, self._released = False, True
            if was_held:
                self._put(released=True)

    def _resume(self, found: dict[str, Any] | None) -> None:
        """Go on with the lease that this holder took before its coordinator was killed and started again."""
        if self._held or self._released or found is None or found["released"]:
            return
        if found["holder"]["token"] == self._holder.token:
            self._since, self._beats, self._held = found["since"], found["beats"], True

    def _write(self, *, released: bool) -> None:
        with self._writing:
            if self._held:
                self._put(released=released)

    def _put(self, *, released: bool) -> None:
        document = {
            "holder": asdict(self._holder),
            "since": self._since,
            "beats": self._beats,
            "released": released,
            "renewed": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._store.put(KEY, encode_document(document))

    def _read(self) -> dict[str, Any] | None:
        return read_heartbeat(self._store)


def read_heartbeat(store: Store) -> dict[str, Any] | None:
    """Return {"holder", "since", "beats", "released", "renewed"}, None if there is none that can be read.

    NewerFormatError if a newer version of this package wrote it.
    """
    try:
        document: Mapping[str, Any] = decode_document(store.get(KEY), f"{KEY} in {store.uri}")
        Holder(**document["holder"])
        return {name: document[name] for name in ("holder", "since", "beats", "released", "renewed")}
    except (ObjectMissingError, ManifestError, KeyError, TypeError):
        return None
