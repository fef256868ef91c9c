"""Reads that outlast an outage: what is tried again, for how long, and what is not."""

import errno

import pytest

from cluster import patience
from cluster.patience import Patience, is_transient


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(patience.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now_s += seconds


class HTTPClientError(Exception):
    """Named as botocore's."""


class ClientError(Exception):
    def __init__(self, code, status):
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.EBUSY, "slow down"),
        HTTPClientError(),
        ClientError("SlowDown", 503),
        ClientError("", 502),
        ClientError("InternalError", 500),
        chained(OSError("translated"), ClientError("SlowDown", 503)),
    ],
)
def test_what_passes_by_itself_is_tried_again(error, monkeypatch):
    Clock(monkeypatch)
    answers = [error, error, "data"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Patience("s3://bucket").call(read) == "data"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        ValueError(),
        OSError(errno.ENOSPC, "full"),
        ClientError("AccessDenied", 403),
        ClientError("NoSuchKey", 404),
        KeyboardInterrupt(),
    ],
)
def test_what_does_not_pass_is_raised_at_once(error, monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def read():
        calls.append(None)
        raise error

    with pytest.raises(type(error)):
        Patience("s3://bucket").call(read)
    assert len(calls) == 1
    assert clock.now_s == 100.0
    assert not is_transient(error)


def test_a_place_that_answered_is_waited_for_and_one_that_never_did_is_given_up_soon(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    known, unknown = Patience("s3://known"), Patience("s3://unknown")
    assert known.call(lambda: 1) == 1

    def fail():
        raise ConnectionRefusedError

    waited = []
    for place in (unknown, known):
        before = clock.now_s
        with pytest.raises(ConnectionRefusedError):
            place.call(fail)
        waited.append(clock.now_s - before)
    assert 3 < waited[0] <= patience.FIRST_PATIENCE_S
    assert patience.PATIENCE_S - 15 < waited[1] <= patience.PATIENCE_S
    # Told every ten seconds at most, and not at every try.
    assert 1 < len([r for r in caplog.records if "s3://known" in r.message]) < 40


def test_a_local_place_is_never_waited_for(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(TimeoutError):
        Patience("/folder", 0.0).call(lambda: (_ for _ in ()).throw(TimeoutError()))
    assert clock.now_s == 100.0


def test_a_place_that_answered_whoever_started_this_process_is_waited_for_from_the_first_request_on(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(patience, "_expected", set())
    monkeypatch.setattr(patience, "_reached", set())
    monkeypatch.setattr(patience, "_listeners", [])

    def waited_s(place: str) -> float:
        started_s, tries = clock.now_s, []

        def refuse():
            tries.append(None)
            raise ConnectionRefusedError

        with pytest.raises(ConnectionRefusedError):
            Patience(place).call(refuse)
        return clock.now_s - started_s

    heard: list[str] = []
    patience.expect([], heard.append)
    assert waited_s("s3://bucket/run") <= patience.FIRST_PATIENCE_S
    assert patience.reached() == ()
    Patience("s3://bucket/run").call(lambda: "data")
    Patience("s3://another/run").call(lambda: "data")
    assert (patience.reached(), heard) == (("s3",), ["s3"])
    assert waited_s("s3://wrong/run") <= patience.FIRST_PATIENCE_S, "in this process another address may be meant"
    patience.expect(["s3"])
    assert waited_s("s3://bucket/data") > patience.PATIENCE_S - 5
    assert waited_s("gs://bucket/data") <= patience.FIRST_PATIENCE_S
