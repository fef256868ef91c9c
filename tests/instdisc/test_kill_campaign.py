"""Campaigns of kills against a real S3 server: short ones, for the slow tests; see kill_campaign.py for long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from seaweed import weed_binary

HERE = Path(__file__).parent


def campaign(folder: Path, *options: str) -> dict:
    """Run a campaign to its end, which judges it, and return its report."""
    command = [sys.executable, str(HERE / "kill_campaign.py"), str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(autouse=True)
def server():
    try:
        weed_binary()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [
        ("--kills", "8"),
        ("--kills", "3", "--launcher", "ray"),
        ("--kills", "3", "--faults", "0.1"),
        ("--kills", "3", "--server-kills"),
    ],
    ids=["local", "Ray", "S3 faults", "S3 server killed"],
)
def test_whatever_is_killed_a_run_ends_bit_for_bit_like_one_that_nobody_disturbed(tmp_path, options):
    report = campaign(tmp_path, *options)
    assert report["kills"] == int(options[1])
    assert report["runs"] >= 1
    assert report["looks"] > 0
    assert max(map(int, report["steps_lost"]), default=0) <= 2 * report["steps_between_saves"]
