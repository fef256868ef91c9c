"""What follows from the end of a job."""

from __future__ import annotations

import pytest

from cluster.job import FAILED, STOPPED, SUCCEEDED, Job, Verdict, judge, next_id

RAYS_MESSAGE = (
    "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\n"
    "something else\ninstdisc: error: unknown recipe 'x'\n  did you mean y\n"
    "Running entrypoint for job run-1: python -m it\n"
)


def job(status, exit_code=None, message="", entrypoint="python -m it"):
    return Job(id="run-1", status=status, entrypoint=entrypoint, exit_code=exit_code, message=message)


@pytest.mark.parametrize(
    ("ended", "verdict", "cause"),
    [
        (job(SUCCEEDED, 0), Verdict.SUCCEEDED, ""),
        (job(FAILED, 2, RAYS_MESSAGE), Verdict.MISTAKE, "instdisc: error: unknown recipe 'x'\n  did you mean y"),
        (job(FAILED, 127, "sh: 1: python: not found"), Verdict.MISTAKE, "cannot run `python`"),
        (job(STOPPED), Verdict.STOPPED, "stopped"),
        (job(FAILED, 130), Verdict.STOPPED, "stopped"),
        (job(FAILED, -9), Verdict.LOST, "SIGKILL"),
        (job(FAILED, 137), Verdict.LOST, "SIGKILL"),
        (job(FAILED, 1, "loss is not finite"), Verdict.LOST, "exit code 1: loss is not finite"),
        (job(FAILED, None, "Job supervisor actor died: node"), Verdict.LOST, "Job supervisor actor died"),
        (None, Verdict.LOST, "started anew"),
    ],
)
def test_only_what_may_end_differently_the_next_time_is_tried_again(ended, verdict, cause):
    found, why = judge(ended)
    assert found is verdict
    assert cause in why


def test_ids_are_numbered_from_those_that_the_cluster_knows():
    assert next_id("run", []) == "run-1"
    assert next_id("run", ["run-1", "run-10", "other-40", "run-x"]) == "run-11"
    assert next_id("run", ["run-2"], at_least=7) == "run-7"
    assert next_id("a.b", ["axb-3"]) == "a.b-1"
