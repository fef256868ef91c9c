"""What a job on a cluster is, how it ended, and what follows from that. Knows nothing of Ray."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED = "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"
_MISTAKE, _CANNOT_EXECUTE, _NOT_FOUND, _INTERRUPTED = 2, 126, 127, 130
_KILLED = (-9, 137)
"""By SIGKILL: the second is how a shell tells it."""
_RAYS_LINE = "Running entrypoint for job"
"""Written late: it may stand below what a program said that ended at once."""
_ERROR = re.compile(r"[\w .-]+: (error|failed)\b")


class JobsError(ConnectionError):
    """The cluster's job server cannot be used as asked: says where, what was found, and what to do."""


class JobRefusedError(ValueError):
    """The job cannot be submitted as asked."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job as the cluster tells of it.

    id: chosen by who submits it. exit_code: of the driver, None while it runs and where its end was not seen.
    """

    id: str
    status: str
    entrypoint: str
    message: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in (SUCCEEDED, FAILED, STOPPED)


class Verdict(Enum):
    """What the end of a job asks for."""

    SUCCEEDED = "succeeded"
    MISTAKE = "mistake"
    """Doing the same again would end in the same way."""
    STOPPED = "stopped"
    LOST = "lost"
    """It is worth another try."""


def judge(job: Job | None) -> tuple[Verdict, str]:
    """Return what follows from the end of a job, and its cause. None: the cluster does not know it any more."""
    if job is None:
        return Verdict.LOST, "the cluster does not know the job any more: its head was started anew"
    code = job.exit_code
    if job.status == SUCCEEDED:
        return Verdict.SUCCEEDED, ""
    if job.status == STOPPED or code == _INTERRUPTED:
        return Verdict.STOPPED, "the job was stopped"
    if code == _MISTAKE:
        return Verdict.MISTAKE, _error_in(job.message)
    if code in (_CANNOT_EXECUTE, _NOT_FOUND):
        return Verdict.MISTAKE, (
            f"{_error_in(job.message)}\nThe head of the cluster cannot run `{job.entrypoint.split()[0]}`: put the "
            "package into the cluster's image, or activate its environment before `ray start`"
        )
    if code in _KILLED:
        return Verdict.LOST, "the driver was killed (SIGKILL: from outside, or the head ran out of memory)"
    if code is not None:
        return Verdict.LOST, f"the driver ended with exit code {code}: {_error_in(job.message)}"
    return Verdict.LOST, _error_in(job.message)


def next_id(name: str, known: Iterable[str], at_least: int = 1) -> str:
    """Return `name-N` with N above those of the ids that are known, and `at_least`."""
    matches = (re.fullmatch(rf"{re.escape(name)}-(\d+)", id) for id in known)
    return f"{name}-{max([at_least, *(int(match[1]) + 1 for match in matches if match)])}"


def _error_in(message: str) -> str:
    """Return what a program said last: its error ("name: error: …", to the end), or the last line.

    message: Ray's, which has a sentence of its own before the last lines of the log.
    """
    _, found, log = message.partition("chars):\n")
    lines = (log if found else message).strip().splitlines()
    lines = [line for line in lines if not line.startswith(_RAYS_LINE)] or [""]
    starts = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    return "\n".join(lines[starts[-1] if starts else -1 :])
