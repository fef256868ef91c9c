"""Retries of requests to a storage that is there but does not answer well: 503, stalls, resets, a restart.

What is retried may have been carried out, its answer lost: only what may be done twice goes through here. A server that
is gone for minutes is outlasted. A place that never answered is given up soon: its address is probably wrong. That it
answered a process is known to those that this one starts (`reached`, `expect`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from cluster.s3_errors import chain, code_of

_LOG = logging.getLogger("instdisc.storage")
Result = TypeVar("Result")

PATIENCE_S = 300.0
FIRST_PATIENCE_S = 10.0
_reached: set[str] = set()
_expected: set[str] = set()
_listeners: list[Callable[[str], None]] = []
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 3.0
_TELL_S = 10.0
_TRANSIENT_NUMBERS = frozenset(
    {
        *(errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETRESET),
    }
)
_TRANSIENT_CODES = frozenset(
    {
        *("SlowDown", "ErrTooManyRequest", "TooManyRequests", "Throttling", "ThrottlingException"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "RequestTimeout", "RequestTimeoutException"),
        *("InternalError", "ServiceUnavailable", "RequestThrottled"),
        # Two conditional writes of one key at the same time: neither is told to have lost.
        *("ConditionalRequestConflict", "OperationAborted"),
        # Bytes that changed on the way.
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"),
    }
)
_TRANSIENT_NAMES = frozenset(
    {
        *("HTTPClientError", "ConnectionError", "ResponseStreamingError", "ClientPayloadError", "ClientOSError"),
        *("ServerDisconnectedError", "IncompleteReadError", "FlexibleChecksumError", "ResponseParserError"),
    }
)
_TRANSIENT_STATUS = (429, 500, 502, 503, 504)


def reached() -> tuple[str, ...]:
    """Return the kinds of storage ("s3") that answered this process, or one that it was started by."""
    return tuple(sorted(_reached | _expected))


def expect(kinds: Iterable[str], on_reached: Callable[[str], None] | None = None) -> None:
    """Wait for storages of these kinds from the first request on, as they answered whoever started this process.

    on_reached: is called with the kind of one that answers for the first time, for those who start others later.
    """
    _expected.update(kinds)
    if on_reached is not None:
        _listeners.append(on_reached)


class Patience:
    """Makes requests again until they succeed, for as long as waiting makes sense. Safe in threads."""

    def __init__(self, place: str, patience_s: float = PATIENCE_S) -> None:
        self._place, self._patience_s = place, patience_s
        self._kind = place.partition("://")[0]
        self._answered = self._kind in _expected
        self._told_s = -float("inf")
        self._lock = threading.Lock()

    @property
    def has_answered(self) -> bool:
        """Whether the place ever answered, here or to whoever started this process."""
        return self._answered

    def call(self, function: Callable[[], Result]) -> Result:
        """Return function(); what it raises is raised where it is no passing failure, or where it does not pass."""
        started_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                result = function()
            except Exception as error:
                if _is_an_answer(error):
                    self._note_answer()
                waited_s = time.monotonic() - started_s
                limit_s = self._patience_s if self._answered else min(self._patience_s, FIRST_PATIENCE_S)
                if not is_transient(error) or waited_s + pause_s > limit_s:
                    raise
                self._tell(error, limit_s - waited_s)
                # Spread out, or all that wait come back in the same moment.
                time.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._note_answer()
                return result

    def _note_answer(self) -> None:
        self._answered = True
        if self._kind not in _reached:
            _reached.add(self._kind)
            for listener in _listeners:
                listener(self._kind)

    def _tell(self, error: Exception, left_s: float) -> None:
        with self._lock:
            if time.monotonic() - self._told_s < _TELL_S:
                return
            self._told_s = time.monotonic()
        _LOG.warning(
            "%s does not answer (%s: %s); trying again for %.0f s", self._place, type(error).__name__, error, left_s
        )


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: what a network or a busy server does, unlike a wrong name or password."""
    for seen in chain(error):
        if isinstance(seen, (ConnectionError, TimeoutError, asyncio.TimeoutError, asyncio.IncompleteReadError)):
            return True
        if isinstance(seen, OSError) and seen.errno in _TRANSIENT_NUMBERS:
            return True
        if _is_transient_of_a_client(seen):
            return True
    return False


def _is_an_answer(error: BaseException) -> bool:
    """Whether a storage said this itself, in its own words; a bare 503 may come from anything at that address."""
    code = code_of(error)
    return bool(code) and not str(code).isdigit()


def _is_transient_of_a_client(error: BaseException) -> bool:
    # By name: the libraries of S3 are imported only where S3 is used.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _TRANSIENT_NAMES:
        return True
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return False
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS or code in map(str, _TRANSIENT_STATUS)
