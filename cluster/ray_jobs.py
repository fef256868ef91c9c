"""Ray's Jobs API with time limits, and with errors that tell a head that is away from a request that is wrong."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.ray_constants import RAY_ADDRESS_ENVIRONMENT_VARIABLE, RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.environment import environment
from cluster.job import Job, JobRefusedError, JobsError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 300.0
STOP_WAIT_S = 180
"""How long a job that is told to stop may take to save a checkpoint, before Ray kills it."""
_GATEWAY_STATUS = (502, 503, 504)
_UNKNOWN = 404
_EXISTS = "already exists"
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_TOKEN_PLACES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"


class HeadAwayError(ConnectionError):
    """Nobody answers for the cluster at the moment; it may come back."""


class _StatusError(Exception):
    """The server answered with an HTTP status that is not a success."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(f"status {status}: {_last_line(text)}")


class _Client(JobSubmissionClient):
    """Ray's client, which has no time limits of its own."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        limit_s = UPLOAD_TIMEOUT_S if method == "PUT" else ANSWER_TIMEOUT_S
        try:
            response = super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, limit_s), **options)
        except OSError as error:  # what the HTTP library raises is one
            raise HeadAwayError(_reason(error)) from error
        if response.status_code in _GATEWAY_STATUS:
            raise HeadAwayError(f"a gateway answers with status {response.status_code}")
        return response

    def _raise_error(self, r: Any) -> NoReturn:
        raise _StatusError(r.status_code, r.text)

    def host_names(self) -> set[str]:
        """Return the host names of the cluster's living nodes."""
        response = self._do_request("GET", "/nodes?view=hostNameList")
        if response.status_code != 200:
            self._raise_error(response)
        return set(response.json()["data"]["hostNameList"])


class RayJobs:
    """The jobs of the cluster whose dashboard is at `address` (http://host:8265).

    Every method raises HeadAwayError where nobody answers, and JobsError where the cluster asks for another token.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._needs_mode = False
        self._client = self._connect()

    def _connect(self) -> _Client:
        # The client would take the address from these instead.
        others = (RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE, RAY_ADDRESS_ENVIRONMENT_VARIABLE)
        with environment(dict.fromkeys(others, "")):
            try:
                try:
                    return _Client(self.address)
                except AuthenticationError:
                    # A token is sent unasked only where RAY_AUTH_MODE says so; this cluster asks for it.
                    if "RAY_AUTH_MODE" in os.environ or not maybe_enable_token_auth_if_token_available(False):
                        raise
                    self._needs_mode = True
                    return _Client(self.address)
            except AuthenticationError as error:
                raise self._token_error(error) from None
            except HeadAwayError as error:
                raise JobsError(
                    f"no Ray cluster at {self.address}: {error}. Check that the head is up, that this is the address "
                    "of its dashboard (`ray start --head` prints it), and that this machine may reach it"
                ) from error
            except Exception as error:
                raise JobsError(
                    f"{self.address} answers, but not as the dashboard of a Ray cluster ({_last_line(str(error))}). "
                    "Expected http://HOST:8265, the address that `ray start --head` and `ray dashboard` print"
                ) from error

    def stop_command(self, id: str) -> str:
        """Return the command that stops a job; Ray's own sends the token only where it is told so."""
        mode = "RAY_AUTH_MODE=token " if self._needs_mode else ""
        return mode + shlex.join(["ray", "job", "stop", id, "--address", self.address])

    def host_names(self) -> set[str]:
        """Return the host names of the cluster's living nodes."""
        return self._ask(self._client.host_names)

    def submit(self, id: str, entrypoint: str, metadata: Mapping[str, str], runtime_env: Mapping[str, Any]) -> None:
        """Submit a job; nothing happens where one with this id exists, so that a lost answer does no harm.

        JobRefusedError where the cluster does not take it.
        """

        def send() -> None:
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=id, metadata=dict(metadata), runtime_env=dict(runtime_env)
            )

        try:
            self._ask(send)
        except _StatusError as error:
            if _EXISTS in error.text:
                return
            # A head that is starting has no job agent yet; what an agent refuses comes with 500 on the outside, too.
            if error.status >= 500 and "status code 400" not in error.text:
                raise HeadAwayError(str(error)) from error
            raise JobRefusedError(f"the cluster at {self.address} does not take the job {id}: {error}") from error

    def find(self, id: str) -> Job | None:
        """Return a job, None where the cluster does not know it."""
        try:
            return _job(self._ask(lambda: self._client.get_job_info(id)))
        except _StatusError as error:
            if error.status == _UNKNOWN:
                return None
            raise HeadAwayError(str(error)) from error

    def list(self) -> list[Job]:
        """Return all jobs that were submitted since the head started."""
        try:
            return [_job(found) for found in self._ask(self._client.list_jobs) if found.submission_id]
        except _StatusError as error:
            raise HeadAwayError(str(error)) from error

    def log(self, id: str) -> str:
        """Return what a job has written so far. JobsError where it cannot be read: its machine may be gone."""
        try:
            return self._ask(lambda: self._client.get_job_logs(id))
        except _StatusError as error:
            raise JobsError(f"the log of job {id} cannot be read: {error}") from error

    def tail(self, id: str) -> AsyncIterator[str]:
        """Yield what a job has written and writes, from the start, until it ends or the connection does."""
        return self._client.tail_job_logs(id)

    def _ask(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except AuthenticationError as error:
            raise self._token_error(error) from None

    def _token_error(self, error: AuthenticationError) -> JobsError:
        """Say which of the two is wrong. Nothing of the answer is repeated."""
        if "failed" in error.message.partition(":")[0]:
            what = "refuses the authentication token that was found"
        elif os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
            what = "asks for an authentication token, and RAY_AUTH_MODE=disabled forbids to send one"
        else:
            what = "asks for an authentication token, and none was found"
        return JobsError(
            f"the cluster at {self.address} {what}. Expected the token with which its head was started, in "
            f"{_TOKEN_PLACES} (`ray get-auth-token` on the head prints it), and RAY_AUTH_MODE=token or unset"
        )


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobRefusedError(
            f"--address: found {address!r}, expected the dashboard's, http://HOST:8265 (not the port 6379 of Ray "
            "itself); where only the head reaches it, forward the port: `ray dashboard`, `kubectl port-forward`"
        )
    if parts.username or parts.password:
        raise JobRefusedError(
            "--address: found a user name or password in it, which would be shown in logs; use Ray's token "
            f"authentication ({_TOKEN_PLACES})"
        )
    return address.rstrip("/")


def _job(found: JobDetails) -> Job:
    return Job(
        id=str(found.submission_id),
        status=found.status.value,
        entrypoint=found.entrypoint,
        message=found.message or "",
        exit_code=found.driver_exit_code,
        metadata=found.metadata or {},
    )


def _reason(error: BaseException) -> str:
    """Return the innermost cause, without the layers of the HTTP library."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType] - one of them is not None
    text = str(error).rpartition(">: ")[2] or type(error).__name__
    return text if len(text) < 200 else type(error).__name__


def _last_line(text: str) -> str:
    """Return the last line with words in it: that of a traceback says what happened."""
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1][:300] if lines else "no text"


def runtime_env(variables: Mapping[str, str], package: Path | None = None) -> dict[str, Any]:
    """Return the environment of a job that saves a checkpoint when it is told to stop.

    package: a zip file of the folder to run in. variables: shown by the dashboard to whoever may see it.
    """
    # Read by the process that starts the driver: Ray's own SIGTERM and 3 s leave no time to save.
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    place = {} if package is None else {"working_dir": str(package)}
    return {"env_vars": {**stop, **variables}, **place}
