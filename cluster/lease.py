"""Who trains a run: a heartbeat object that its holder renews, and that others read before they take over.

A heartbeat says that somebody is there, since when, and which attempt that is; it is not what keeps checkpoints safe
(that is the number of the attempt, which only one can win), nor what ends a training: only a newer attempt does. Times
of different machines are never compared: who wants to take over watches whether the heartbeat still changes.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cluster.document_kinds import FLAG, MAPPING, TEXT, WHOLE, require_kinds
from cluster.manifest import MAX_BYTES, NewerFormatError, decode_document, encode_document
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

KEY = "heartbeat.json"
BEAT_S = 10.0
LEASE_S = 35.0
_WATCH_S = 1.0
_OF_HEARTBEAT = {
    "holder": MAPPING,
    "attempt": WHOLE,
    "since": TEXT,
    "beats": WHOLE,
    "released": FLAG,
    "renewed": TEXT,
}
_OF_HOLDER = {"pid": WHOLE, **dict.fromkeys(("token", "host", "boot", "pid_namespace", "started"), TEXT)}


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
        started = _started(self.pid)
        return started != self.started and not (started == "" and _is_another_users(self.pid))

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


def _is_another_users(pid: int) -> bool:
    """Whether a process lives about which this user may know nothing else (/proc mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


class Lease:
    """A holder's heartbeat in a run's store. `take` it, renew it with `beat`, and `release` it.

    A heartbeat says which attempt its holder trains, once that has a number: of two holders the one of the newer
    attempt has the run, whichever heartbeat was written last. One that was long on its way harms nobody.
    """

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
        self._attempt = 0
        self._held = False
        self._released = False
        # A beat that is on its way when the lease is released would take it again.
        self._writing = threading.Lock()

    def take(self) -> None:
        """Take the lease: at once if nobody has it, if the one who had it released it or surely ended, or is us.

        Else watch the heartbeat: RunHeldError if it is renewed; without a renewal for `lease_s` seconds it is taken.
        """
        first, _ = self._read()
        deadline = self._clock() + self._lease_s
        while True:
            found, tag = self._read()
            if self._may_take(found, first, deadline):
                self._since, self._beats = _now(), 0
                self._held, self._released = True, False
                with self._writing:
                    if self._put(tag, released=False):
                        return
                # Somebody else took it in this moment.
                self._held = False
                continue
            self._sleep(_WATCH_S)

    def beat(self, attempt: int = 0) -> bool:
        """Renew the heartbeat; False, and nothing is written, if somebody else has the lease by now.

        attempt: the one that this holder trains, as far as it is known; who has an older one, or none yet, has not got
        the lease. Of a holder whose coordinator was started again it is renewed, too.
        """
        with self._writing:
            self._attempt = max(self._attempt, attempt)
            try:
                found, tag = self._read()
            except NewerFormatError:
                return False
            self._resume(found)
            if not self._held:
                return True
            if self._has_lost_to(found):
                self._held = False
                return False
            self._beats += 1
            # What changed in this moment is looked at the next time.
            self._put(tag, released=False)
            return True

    def release(self) -> None:
        """Say that nobody trains the run any more."""
        with self._writing:
            try:
                found, tag = self._read()
                self._resume(found)
                was_held = self._held and not self._has_lost_to(found)
            except NewerFormatError:
                tag, was_held = None, False
            self._held, self._released = False, True
            if was_held:
                self._put(tag, released=True)

    def _may_take(self, found: dict[str, Any] | None, first: dict[str, Any] | None, deadline: float) -> bool:
        """Whether the lease may be taken now. RunHeldError where another holder goes on."""
        if found is None:
            return True
        other = Holder(**found["holder"])
        if found["released"] or other.token == self._holder.token or other.is_surely_dead():
            return True
        if first is None or found["beats"] != first["beats"] or found["holder"] != first["holder"]:
            raise RunHeldError(
                f"{self._store.uri} is trained by {other} since {found['since']}: its heartbeat goes on. Wait for "
                "its end or stop it, then give the same command again; or give another --run"
            )
        return self._clock() >= deadline

    def _has_lost_to(self, found: dict[str, Any] | None) -> bool:
        """Whether a heartbeat is of another process, or of another training of this one, which has the run by now."""
        if found is None or (found["holder"]["token"], found["since"]) == (self._holder.token, self._since):
            return False
        return self._attempt == 0 or found["attempt"] > self._attempt

    def _resume(self, found: dict[str, Any] | None) -> None:
        """Go on with the lease that this holder took before its coordinator was killed and started again."""
        if self._held or self._released or found is None:
            return
        if 0 < found["attempt"] < self._attempt:
            # Of an attempt that this one replaced: it was long on its way.
            self._since, self._beats, self._held = _now(), 0, True
        elif found["holder"]["token"] == self._holder.token and not found["released"]:
            self._since, self._beats, self._held = found["since"], found["beats"], True
            self._attempt = max(self._attempt, found["attempt"])

    def _put(self, tag: str | None, *, released: bool) -> bool:
        """Write the heartbeat unless another was written since the one with this tag; return whether it was."""
        document = {
            "holder": asdict(self._holder),
            "attempt": self._attempt,
            "since": self._since,
            "beats": self._beats,
            "released": released,
            "renewed": _now(),
        }
        return self._store.replace(KEY, encode_document(document), tag)

    def _read(self) -> tuple[dict[str, Any] | None, str | None]:
        return _read_tagged(self._store)


def read_heartbeat(store: Store) -> dict[str, Any] | None:
    """Return {"holder", "attempt", "since", "beats", "released", "renewed"}, None if there is none that can be read.

    attempt: 0 where its holder has no number yet, or is of an older version. NewerFormatError if a newer version of
    this package wrote it.
    """
    return _read_tagged(store)[0]


def _read_tagged(store: Store) -> tuple[dict[str, Any] | None, str | None]:
    """Return the heartbeat, and what the store knows it by."""
    try:
        data, tag = store.get_tagged(KEY, MAX_BYTES + 1)
    except ObjectMissingError:
        return None, None
    try:
        document = {"attempt": 0, **decode_document(data, f"{KEY} in {store.uri}")}
        require_kinds(document, _OF_HEARTBEAT, KEY)
        require_kinds(document["holder"], _OF_HOLDER, KEY)
        Holder(**document["holder"])
        return {name: document[name] for name in _OF_HEARTBEAT}, tag
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, tag


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
