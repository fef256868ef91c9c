"""Machines that are only there while a job needs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_hosts
from autoscaling import WORKERS

from instdisc.runs import Run

TIMEOUT_S = 480


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_machines_come_for_a_job_and_go_when_it_has_ended(tmp_path):
    reason = ray_hosts.why_not()
    if reason:
        pytest.skip(reason)
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), str(tests.parents[1])])}
    before = os.environ | environment
    done = ray_hosts.run_in_a_network(
        [sys.executable, str(tests / "autoscaling.py"), str(tmp_path)],
        environment=before, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "head.log").read_text()[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    numbers = [number for _, number in document["machines"]]
    print(document["machines"])
    assert document["exit_code"] == 0, document["log"]
    assert (numbers[0], max(numbers), numbers[-1]) == (0, WORKERS, 0)
    result = Run(str(tmp_path / "run")).result()
    assert result is not None
    assert result.finished
    assert (
        subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.count(f"hosts{os.getpid()}") == 0
    )
