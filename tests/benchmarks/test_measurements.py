"""The measuring scripts run: short, on few rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slow_link import why_not

HERE = Path(__file__).parent


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(HERE / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_of_many_workers_tells_its_start_its_memory_and_its_steps():
    found = json.loads(run("measure_billion_rows.py", "--rows", "400000", "--workers", "4", "--steps", "3"))
    assert found["rows_of_this_worker"] == 100_000
    assert found["shard_bytes"] == 100_000 * (128 * 2 + 4)
    assert found["step_ms"]["median"] > 0


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=f"no slow link here: {why_not()}")
def test_on_a_slow_link_bytes_are_those_of_the_formula_and_the_picture_is_drawn(tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "timeline.png"
    options = ["--hosts", "2", "--trials", "1", "--steps", "3", "--delay-ms", "5"]
    run("measure_slow_link.py", *options, "--out", str(out), "--picture", str(picture))
    (result,) = json.loads(out.read_text())["results"]
    assert 1 < result["sent_over_formula"] < 1.1
    assert picture.stat().st_size > 1000
