"""A run on machines that come and go; see chaos.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_hosts
from chaos import EVERY

EVENTS = ("kill", "join", "drain", "join", "notice", "join", "cut", "coordinator", "s3", "head")
TIMEOUT_S = 1500


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_a_run_finishes_by_itself_whatever_happens_to_its_machines(tmp_path):
    reason = ray_hosts.why_not()
    if reason:
        pytest.skip(reason)
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent, here.parent / "cluster", here.parents[1])))
    done = subprocess.run(
        [sys.executable, str(here / "chaos.py"), str(tmp_path), "--events", *EVENTS, "--steps", "2000"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    print(json.dumps(document["events"], indent=1))
    lost = {kind: max(events["steps_lost"]) for kind, events in document["events"].items()}
    assert set(lost) == set(EVENTS)
    assert max(lost["drain"], lost["notice"]) <= 1
    assert lost["join"] == lost["coordinator"] == lost["s3"] == 0
    # A save may still be on its way when the machine dies.
    assert max(lost.values()) <= 2 * EVERY
