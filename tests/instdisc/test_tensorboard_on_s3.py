"""A real `tensorboard --logdir s3://…` beside a run that trains on a real S3 server, is killed, and goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.attempts import read_attempts
from instdisc.runs import Run

READY_S, WATCH_S = 90.0, 120.0
URI = "s3://images/runs/watched"
TRAIN = """
import sys, time
from instdisc.train import event_mirror
from instdisc.train.step import Stepper
from instdisc.cli.main import main
event_mirror.SHORTEST_S = event_mirror.LONGEST_S = 2.0  # 30 s to 10 minutes otherwise
step = Stepper.step
Stepper.step = lambda self, batch: (time.sleep(0.1), step(self, batch))[1]  # long enough to be watched
sys.exit(main(sys.argv[1:]))
"""
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Board:
    """A TensorBoard that runs, asked through its HTTP interface."""

    def __init__(self, address: str, run: str) -> None:
        self.address, self.run = address, run

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        """Return (step, value) of a tag as a browser gets them, [] where there is none yet."""
        query = urllib.parse.urlencode({"run": self.run, "tag": tag})
        try:
            found: list[Any] = self._get(f"data/plugin/scalars/scalars?{query}")
        except urllib.error.HTTPError:
            return []
        return [(step, value) for _, step, value in found]

    def text(self, tag: str) -> str:
        found = self._get(
            f"data/plugin/text/text?{urllib.parse.urlencode({'run': self.run, 'tag': f'{tag}/text_summary'})}"
        )
        return found[-1]["text"]

    def _get(self, path: str) -> Any:
        with NO_PROXY.open(f"{self.address}/{path}", timeout=30) as answer:
            return json.load(answer)


@contextmanager
def tensorboard(logdir: str, run: str, log: Path) -> Iterator[Board]:
    command = [
        *(sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"),
        *("--reload_interval", "1", "--samples_per_plugin", "scalars=100000"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield Board(_address(process, log), run)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def watched(look: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Return what `look` finds, as soon as it finds anything; a process has to run until then."""
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        assert process is None or process.poll() is None, "the run ended before anything was seen"
        time.sleep(0.3)
    raise TimeoutError("nothing was seen in time")


def train(temporary: Path) -> subprocess.Popen[bytes]:
    arguments = [
        *("train", "quickstart", "--run", URI, "--workers", "0", "--optim.epochs", "4", "--system.log_every", "1"),
        *("--optim.warmup_epochs", "2", "--data.max_rows", "2000", "--data.max_test_rows", "200", "--eval.k", "20"),
        *("--eval.every_epochs", "0", "--eval.baselines", "no", "--checkpoint.every_steps", "10"),
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tensorboard_shows_a_run_on_s3_while_it_trains_and_after_it_was_killed_and_went_on(server, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    store = Run(URI).store
    seen: dict[str, int] = {}
    with tensorboard("s3://images/runs", "watched/tensorboard", tmp_path / "first.log") as board:
        with train(temporary) as process:
            # Twice, so that points of a second file come to a TensorBoard that runs.
            first = watched(lambda: board.scalars("train/loss"), process)
            watched(
                lambda: len(board.scalars("train/loss")) > len(first) and len(store.list("tensorboard/")) > 2, process
            )
            watched(lambda: Run(URI).checkpoints().list("manifests/"), process)
            process.kill()
        seen.update(store.list_sizes("tensorboard/"))
        with train(temporary) as process:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
        result = Run(URI).result()
        assert result is not None
        attempts = read_attempts(Run(URI).checkpoints())
        assert len(attempts) == 2
        assert attempts[2].parent is not None

        def whole_curve() -> list[tuple[int, float]]:
            points = board.scalars("train/loss")
            return points if points and points[-1][0] == result.num_steps else []

        running = watched(whole_curve)
        assert [step for step, _ in running] == list(range(1, result.num_steps + 1)), (
            f"every step once, those after step {attempts[2].parent.step} from the second attempt"
        )
        assert board.scalars("cluster/restarts")[-1][1] == 1
        assert {value for _, value in board.scalars("cluster/workers")} == {1}
        assert f"<td>{attempts[2].parent.step}</td>" in board.text("cluster/events")
        assert "mean loss over the valid images" in board.text("about")
    assert seen.items() <= dict(store.list_sizes("tensorboard/")).items(), "no file changes once it is there"
    # One that starts afterwards shows the same.
    with tensorboard(f"{URI}/tensorboard", ".", tmp_path / "second.log") as board:
        assert watched(whole_curve) == running
    left = [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
    assert left == [], "of the killed run and the one that ended"
