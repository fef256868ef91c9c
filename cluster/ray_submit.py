"""A training as a job of a Ray cluster: submitted, followed, and submitted again when its driver or head is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.job import PENDING, Job, JobRefusedError, JobsError, Verdict, judge, next_id
from cluster.ray_job_log import JobLog
from cluster.ray_jobs import HeadAwayError, RayJobs

MAX_FRUITLESS = 3
"""Submissions in a row that may end without a new checkpoint."""
FIRST_PAUSE_S, PAUSE_FACTOR = 2.0, 8
"""Before a submission after a loss; the next pause if that one is fruitless, too."""
POLL_S = 1.0
END_OF_LOG_S = 10.0
"""How long to try to read the end of the log of a job that is known to be over: its head may be gone for good."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 5.0
RUN, SUBMISSION = "run", "submission"
"""Keys of a job's metadata."""
Answer = TypeVar("Answer")
Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What is submitted. name: ids are `name-1`, `name-2`, … run: what one job at a time may work on."""

    name: str
    run: str
    entrypoint: str
    runtime_env: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class End:
    """How it ended. ids: of the jobs that were followed. cause: why, in words; empty if all is well."""

    verdict: Verdict
    ids: tuple[str, ...]
    status: str
    exit_code: int | None
    cause: str = ""


class HeadLostError(RuntimeError):
    """The head did not come back in time."""


class Submission:
    """Submits a job or finds the one that works on the same run, follows it, and submits it again when it is lost.

    checkpoint: returns what changes with every new checkpoint of the run, and raises where the run cannot be read.
    on_text: gets the log, in pieces. on_event: gets {"kind": "message" or "phase", "text"}. patience_s: how long the
    head may be away at a time.
    """

    def __init__(
        self,
        jobs: RayJobs,
        spec: JobSpec,
        *,
        checkpoint: Callable[[], object],
        on_text: Callable[[str], None],
        on_event: Callable[[Event], None],
        patience_s: float,
    ) -> None:
        self._jobs, self._spec, self._checkpoint = jobs, spec, checkpoint
        self._on_text, self._on_event, self._patience_s = on_text, on_event, patience_s
        self._followed: list[str] = []
        self._can_read_run = True
        self._is_line_whole = True

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the jobs that were submitted or found, the last one last."""
        return tuple(self._followed)

    def start(self) -> Job:
        """Submit the job, or find the one that is at work on the same run.

        JobRefusedError where that one was started with another command, or the cluster does not take ours.
        """
        job = self._patiently(self._start)
        self._followed.append(job.id)
        return job

    def finish(self) -> End:
        """Follow the job that was started, and its successors, to the end."""
        fruitless, before = 0, self._newest_checkpoint()
        while True:
            job = self._follow(self._followed[-1])
            verdict, cause = judge(job)
            after = self._newest_checkpoint()
            is_fruitless = after is None or after == before
            if verdict is Verdict.MISTAKE and (len(self._followed) > 1 or not is_fruitless):
                verdict = Verdict.LOST  # the same command worked before: something else is wrong, and may pass
            fruitless, before = fruitless + 1 if is_fruitless else 0, before if after is None else after
            if verdict is not Verdict.LOST or fruitless >= MAX_FRUITLESS:
                return self._end(verdict, job, cause)
            pause_s = FIRST_PAUSE_S * PAUSE_FACTOR ** max(0, fruitless - 1)
            self._tell(f"{self._followed[-1]}: {cause}. Submitting it again in {pause_s:.0f} s")
            time.sleep(pause_s)
            self.start()

    def _end(self, verdict: Verdict, job: Job | None, cause: str) -> End:
        if verdict is Verdict.LOST:
            kind = "without a new checkpoint" if self._can_read_run else "(whether they saved anything cannot be seen)"
            cause = f"gave up after {MAX_FRUITLESS} submissions in a row {kind}; the last one: {cause}"
        status, code = (job.status, job.exit_code) if job else ("UNKNOWN", None)
        return End(verdict=verdict, ids=self.ids, status=status, exit_code=code, cause=cause)

    def _start(self) -> Job:
        known = self._jobs.list()
        job = next((job for job in known if job.metadata.get(RUN) == self._spec.run and not job.is_over), None)
        if job is None:
            id = next_id(self._spec.name, (job.id for job in known), at_least=len(self._followed) + 1)
            job = self._send(id)
            if job is None:
                raise HeadAwayError(f"it took the job {id} and does not know it")
            self._tell(f"submitted job {job.id} to {self._jobs.address}")
        else:
            self._tell(f"job {job.id} works on this run: following it")
        if job.entrypoint != self._spec.entrypoint:
            raise JobRefusedError(
                f"job {job.id} on {self._jobs.address} works on run {self._spec.run} with another command:\n"
                f"  found     {job.entrypoint}\n  asked for {self._spec.entrypoint}\n"
                f"Give its command to follow it, stop it first ({self._jobs.stop_command(job.id)}), "
                "or give another --run"
            )
        return job

    def _send(self, id: str) -> Job | None:
        metadata = {RUN: self._spec.run, SUBMISSION: id.rpartition("-")[2]}
        self._jobs.submit(id, self._spec.entrypoint, metadata, self._spec.runtime_env)
        return self._jobs.find(id)

    def _follow(self, id: str) -> Job | None:
        """Show a job's log until the job is over, and return it; None if the cluster lost it."""
        log, was_pending = JobLog(self._jobs, id), False

        def find() -> Job | None:
            try:
                return self._jobs.find(id)
            except HeadAwayError:
                log.disconnect()
                raise

        try:
            while True:
                job, was_away = self._patiently_told(find, self._patience_s)
                if job is None or job.is_over:
                    break
                if was_away:
                    # Does nothing to a job that is there; but a new head looks only then after those that an
                    # external database of Ray's has kept.
                    self._patiently(lambda: self._send(id))
                if job.status == PENDING:
                    self._on_event({"kind": "phase", "text": f"job {id} waits for its start"})
                elif was_pending:
                    # Or a terminal would go on showing the phase before.
                    self._on_event({"kind": "phase", "text": f"job {id} runs"})
                was_pending = job.status == PENDING
                self._show(log, POLL_S)
            if job is not None:
                self._show_rest(log)
            return job
        finally:
            log.disconnect()
            if not self._is_line_whole:
                self._text("\n")

    def _show(self, log: JobLog, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if text := log.read(left_s):
                self._text(text)

    def _show_rest(self, log: JobLog) -> None:
        try:
            if text := self._patiently(log.finish, END_OF_LOG_S):
                self._text(text)
        except (JobsError, HeadLostError) as error:
            self._tell(f"the end of the log of job {log.job_id} is missing here: {error}")

    def _newest_checkpoint(self) -> object | None:
        """Return what tells the run's newest checkpoint from others, None where it has none or cannot be read."""
        could_read = self._can_read_run
        try:
            newest = self._checkpoint()
        except Exception as error:
            self._can_read_run = False
            if could_read:
                reason = str(error).partition("\n")[0]
                self._tell(f"the run cannot be read from here now, so submissions are counted: {reason}")
            return None
        self._can_read_run = True
        return newest

    def _patiently(self, ask: Callable[[], Answer], limit_s: float | None = None) -> Answer:
        return self._patiently_told(ask, self._patience_s if limit_s is None else limit_s)[0]

    def _patiently_told(self, ask: Callable[[], Answer], limit_s: float) -> tuple[Answer, bool]:
        """Return ask(), repeated while the head is away, and whether it was. HeadLostError where it stays away."""
        started_s, pause_s, was_away = time.monotonic(), _FIRST_WAIT_S, False
        while True:
            try:
                answer = ask()
            except HeadAwayError as error:
                was_away, waited_s = True, time.monotonic() - started_s
                if waited_s > limit_s:
                    raise HeadLostError(
                        f"the head at {self._jobs.address} has been away for {waited_s:.0f} s: {error}. What runs on "
                        "the cluster may go on; the same command follows it, or goes on with the run"
                    ) from error
                text = f"waiting for the head at {self._jobs.address} ({error}): {waited_s:.0f} of "
                self._on_event({"kind": "phase", "text": f"{text}{limit_s:.0f} s"})
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_WAIT_S)
            else:
                if was_away:
                    self._tell(f"the head answers again after {time.monotonic() - started_s:.0f} s")
                return answer, was_away

    def _text(self, text: str) -> None:
        self._is_line_whole = text.endswith("\n")
        self._on_text(text)

    def _tell(self, text: str) -> None:
        self._on_event({"kind": "message", "text": text})
