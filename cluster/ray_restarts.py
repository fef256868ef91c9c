"""Whether a group of workers that ended is followed by another: Ray Train's controller asks, this decides.

Machines and connections fail, and the next group goes on from the newest checkpoint. What the program itself raised
would only be raised again. A run that fails again and again without a new checkpoint ends with the cause.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from cluster.failures import Failure, Preempted, root_cause
from cluster.ray_mailbox import Post
from cluster.ray_restart_limit import RestartLimit, TooManyRestartsError
from cluster.worker import Cause

MAILBOX_TIMEOUT_S = 30.0


class Restarts(FailurePolicy):
    """Decides what follows the end of a group. Lives in Ray Train's controller.

    limit: None where there are no checkpoints, so that nothing could go on.
    """

    def __init__(self, failure_config: FailureConfig, mailbox: Any, limit: RestartLimit | None) -> None:
        super().__init__(failure_config)
        self._mailbox, self._limit = mailbox, limit
        self._post = Post(mailbox)

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """RETRY or RAISE."""
        error = training_failed_error
        if self._limit is None:
            return FailureDecision.RAISE
        if isinstance(error, ControllerError):
            cause = error.controller_failure
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                # A machine that was counted is gone, or somebody else was faster: count again.
                self._post.tell("the workers found no place on the machines that seemed free: looking again")
                return FailureDecision.RETRY
            # The second: between the last worker's start and the moment from which they are watched.
            if not isinstance(cause, WorkerGroupStartupFailedError | RayActorError):
                return FailureDecision.RAISE
            silence: str = ray.get(self._mailbox.silence.remote(), timeout=MAILBOX_TIMEOUT_S)
            return self._again(silence or f"workers could not start: {_reason(cause)}")
        failures: list[Failure] = ray.get(self._mailbox.failures.remote(), timeout=MAILBOX_TIMEOUT_S)
        if any(failure.kind == Preempted.__name__ for failure in failures):
            return FailureDecision.RETRY
        if failures and not (root_cause(failures).is_echo() or root_cause(failures).may_pass):
            return FailureDecision.RAISE
        return self._again(_what_happened(error, failures))

    def _again(self, text: str) -> FailureDecision:
        assert self._limit is not None
        try:
            more = self._limit.count(text)
        except TooManyRestartsError as error:
            self._post.tell(str(error))
            return FailureDecision.RAISE
        cause = Cause(kind="failure", text=text, since=time.time())
        ray.get(self._mailbox.announce.remote(asdict(cause)), timeout=MAILBOX_TIMEOUT_S)
        self._post.tell(f"{text}: going on from the newest checkpoint{more}")
        return FailureDecision.RETRY


def _what_happened(error: Any, failures: list[Failure]) -> str:
    """Return which rank ended and how, in a line: a death rather than what the others saw of it."""
    if isinstance(error, PreemptionError):
        return "a machine was taken away"
    deaths = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for rank, death in sorted(deaths.items()):
        if isinstance(death, WorkerHealthCheckFailedError):
            death = death.health_check_failure
        if isinstance(death, RayError) and not any(failure.rank == rank for failure in failures):
            return f"the worker of rank {rank} died"
    if failures:
        cause = root_cause(failures)
        if cause.is_echo():
            return f"rank {cause.rank} lost its connection to another worker"
        return f"rank {cause.rank}: {cause.summary.splitlines()[0]}"
    return _first_line(error)


def _reason(error: Exception) -> str:
    """Return why a start failed, in a line: of a traceback in the text the error that it ends with."""
    lines = str(error).strip().splitlines()
    of_ray = [line for line in lines if line.startswith(("ray.exceptions.", "The actor "))]
    return (of_ray or lines or [repr(error)])[0].removeprefix("ray.exceptions.")


def _first_line(error: Any) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
