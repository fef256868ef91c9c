"""What a cloud's metadata service says about the end of the machine that asks: AWS (IMDSv2) and GCP.

Times are Unix times in seconds. A service that is slow, refuses or talks nonsense raises MetadataUnavailable and
nothing else; what it says is believed only where it has the form that its cloud documents.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit

METADATA_URL = "http://169.254.169.254"  # the same link-local address on AWS and on GCP
REQUEST_TIMEOUT_S = 2.0  # for a whole request: the service answers from the machine's own host
_MAX_BYTES = 64 * 1024

AWS_TOKEN_TTL_S = 21600
_AWS_RENEW_S = 300.0  # before the end of a token
AWS_NOTICE_S = 120.0  # documented; used where a notice names no time
_AWS_ACTIONS = ("terminate", "stop", "hibernate")

GCP_PREEMPTION_NOTICE_S = 30.0
GCP_MAINTENANCE_NOTICE_S = 60.0  # documented for machines in general; those with GPUs have an hour


@dataclass(frozen=True)
class Notice:
    """One thing that the cloud says. deadline_s: when the machine goes; None: it may, so only tell."""

    event: str
    deadline_s: float | None


class MetadataUnavailable(ConnectionError):
    """The metadata service gave no usable answer this time."""


class MetadataService(Protocol):
    """A cloud's metadata service. name: of the cloud, for people."""

    name: str

    def poll(self) -> list[Notice]:
        """Return everything that it says now, equal notices while nothing changes. Raises MetadataUnavailable."""
        ...


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str
    flavor: str | None


class AwsMetadata:
    """EC2's instance metadata, version 2: every question carries a token of this machine."""

    name = "aws"

    def __init__(self, url: str = METADATA_URL):
        self._url = url
        self._token = ""
        self._token_ends_s = 0.0
        self._seen = _Deadlines()

    def answers(self) -> bool:
        """Whether this is EC2: only its service gives out tokens. Raises MetadataUnavailable where nothing answers."""
        answer = self._ask_for_token()
        return answer.status == 200 and bool(answer.text)

    def poll(self) -> list[Notice]:
        """See MetadataService: the interruption of a spot instance, and the advice to leave it (only told)."""
        return _all_of(self._interruption, self._recommendation)

    def _interruption(self) -> Notice | None:
        text = self._read("/latest/meta-data/spot/instance-action")
        if text is None:
            return None
        told = _json_object(text)
        action = told.get("action")
        if action not in _AWS_ACTIONS:
            raise MetadataUnavailable(f"spot/instance-action holds no known action, expected one of {_AWS_ACTIONS}")
        at_s = _utc_seconds(told.get("time"))
        event = f"spot interruption: {action}" + (f" at {told['time']}" if at_s else "")
        return Notice(event, at_s or self._seen.deadline_s(event, AWS_NOTICE_S))

    def _recommendation(self) -> Notice | None:
        text = self._read("/latest/meta-data/events/recommendations/rebalance")
        if text is None:
            return None
        at = _json_object(text).get("noticeTime")
        when = f" of {at}" if _utc_seconds(at) else ""
        return Notice(f"rebalance recommendation{when}: an interruption has become more likely", None)

    def _read(self, path: str) -> str | None:
        """The text at a path, None where there is nothing (404)."""
        if time.monotonic() > self._token_ends_s - _AWS_RENEW_S:
            self._renew()
        answer = self._get(path)
        if answer.status == 401:  # the token ended early: the machine was stopped and started, or restored
            self._renew()
            answer = self._get(path)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise MetadataUnavailable(f"GET {path} was answered with status {answer.status}")
        return answer.text

    def _get(self, path: str) -> _Answer:
        return _request(self._url, "GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _renew(self) -> None:
        answer = self._ask_for_token()
        if answer.status != 200 or not answer.text:
            raise MetadataUnavailable(f"PUT /latest/api/token was answered with status {answer.status}")
        self._token = answer.text.strip()
        self._token_ends_s = time.monotonic() + AWS_TOKEN_TTL_S

    def _ask_for_token(self) -> _Answer:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
        return _request(self._url, "PUT", "/latest/api/token", lifetime)


class GcpMetadata:
    """Compute Engine's metadata: preemption of spot machines, and maintenance that ends the machine."""

    name = "gcp"

    def __init__(self, url: str = METADATA_URL):
        self._url = url
        self._seen = _Deadlines()

    def answers(self) -> bool:
        """Whether this is Compute Engine. Raises MetadataUnavailable where nothing answers."""
        return self._get("preempted").flavor == "Google"

    def poll(self) -> list[Notice]:
        """See MetadataService. The service says what happens, not when: the documented times are counted from here."""
        return _all_of(self._preemption, self._maintenance)

    def _preemption(self) -> Notice | None:
        return self._notice("preempted", GCP_PREEMPTION_NOTICE_S) if self._read("preempted") == "TRUE" else None

    def _maintenance(self) -> Notice | None:
        event = self._read("maintenance-event")
        if event.startswith("TERMINATE"):
            return self._notice(f"maintenance: {event}", GCP_MAINTENANCE_NOTICE_S)
        if event not in ("NONE", ""):
            return Notice(f"maintenance: {event[:80]}", None)  # a live migration: the machine stays
        return None

    def _notice(self, event: str, notice_s: float) -> Notice:
        return Notice(event, self._seen.deadline_s(event, notice_s))

    def _read(self, name: str) -> str:
        answer = self._get(name)
        if answer.flavor != "Google":
            raise MetadataUnavailable("the answer has no header Metadata-Flavor: Google, so it is not Google's")
        if answer.status == 404:
            return ""
        if answer.status != 200:
            raise MetadataUnavailable(f"GET instance/{name} was answered with status {answer.status}")
        return answer.text.strip()

    def _get(self, name: str) -> _Answer:
        return _request(self._url, "GET", f"/computeMetadata/v1/instance/{name}", {"Metadata-Flavor": "Google"})


SERVICES: dict[str, type[AwsMetadata] | type[GcpMetadata]] = {"aws": AwsMetadata, "gcp": GcpMetadata}


def detect(url: str = METADATA_URL) -> AwsMetadata | GcpMetadata:
    """Return the metadata service that answers at `url`. Raises MetadataUnavailable where none does."""
    for kind in SERVICES.values():
        service = kind(url)
        if service.answers():
            return service
    raise MetadataUnavailable("what answers is neither AWS's nor GCP's metadata service")


def _all_of(*questions: Callable[[], Notice | None]) -> list[Notice]:
    """Ask all questions: what one of them found counts though another got no answer. Raises where nothing was found."""
    notices, unanswered = [], None
    try:
        for ask in questions:
            try:
                notice = ask()
            except MetadataUnavailable as error:
                unanswered = error
            else:
                notices += [notice] if notice else []
        if unanswered is not None and not notices:
            raise unanswered
        return notices
    finally:
        unanswered = None  # its traceback holds this frame, and with it the socket, until the garbage collector runs


class _Deadlines:
    """When each event ends that comes without a time: counted from the first sight of it, so that it stays the same."""

    def __init__(self) -> None:
        self._deadlines_s: dict[str, float] = {}

    def deadline_s(self, event: str, notice_s: float) -> float:
        return self._deadlines_s.setdefault(event, time.time() + notice_s)


def _request(url: str, method: str, path: str, headers: dict[str, str]) -> _Answer:
    """One request without proxies or redirects, over within REQUEST_TIMEOUT_S however slowly the answer trickles."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.connect()
        with _hung_up_after(connection.sock, REQUEST_TIMEOUT_S):
            connection.request(method, path, headers=headers)
            with connection.getresponse() as response:
                body = response.read(_MAX_BYTES).decode(errors="replace")
                if response.length:
                    raise ConnectionError(f"{response.length} bytes of the answer are missing")
        return _Answer(response.status, body, response.getheader("Metadata-Flavor"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MetadataUnavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


@contextlib.contextmanager
def _hung_up_after(connected: socket.socket, timeout_s: float) -> Iterator[None]:
    """A socket's own timeout counts from byte to byte; this one ends the whole conversation."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise MetadataUnavailable("found something other than a JSON object")
    return value


def _utc_seconds(value: object) -> float | None:
    """Unix time of "2026-11-26T18:00:00Z"; None for anything else."""
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
