"""`instdisc submit` on a real Ray head on loopback: to the end, and through the loss of the driver and of the head."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_head import RayHead

from cluster.attempts import attempt_numbers, manifest_ids
from cluster.phase import VARIABLE, Phase, read_phase
from instdisc.runs import Run

STEPS = 400
TINY = [
    *("--workers", "1", "--data.max_rows", "96", "--data.max_test_rows", "20", "--optim.global_batch", "16"),
    *("--model.width", "4", "--eval.every_epochs", "0", "--eval.baselines", "no", "--eval.k", "5"),
    *("--system.tensorboard", "no", "--checkpoint.every_steps", "10", "--checkpoint.every_minutes", "none"),
]
LONG = [*TINY, "--optim.epochs", str(STEPS * 16 / 96)]
TIMEOUT_S = 180.0


class Submitting:
    """The command at work, its standard error read as it comes."""

    def __init__(self, head: RayHead, uri: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "instdisc.cli.main", "submit", "quickstart", "--address", head.dashboard]
        self.process = subprocess.Popen(
            [*command, "--run", uri, *arguments],
            env={**head.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.told += line

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.told:
            assert self.process.poll() is None, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Wait for the end: its exit code, and what stands on standard output."""
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            printed = stdout.read()
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(10)
        return code, printed


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module")
def head(phases):
    with RayHead(variables={VARIABLE: str(phases)}) as running:
        yield running


def wait_until(is_so, what: str, submitting: Submitting) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert submitting.process.poll() is None, submitting.told
        assert time.monotonic() < deadline, (what, submitting.told)
        time.sleep(0.02)


def processes_that_stepped(phases: Path) -> set[str]:
    """Return the numbers of the processes that have made a step since they started."""
    found = set()
    for path in phases.iterdir():
        seen = read_phase(phases, int(path.name))
        if seen is not None and seen[0] is not Phase.START and seen[1] >= 1:
            found.add(path.name)
    return found


def test_a_submitted_training_is_followed_to_its_end_by_two_and_a_mistake_there_ends_it(head, tmp_path):
    uri = str(tmp_path / "run")
    submitting = Submitting(head, uri, *TINY, "--optim.epochs", "6", "--json")
    submitting.wait_for("submitted job instdisc-run-")
    second = Submitting(head, uri, *TINY, "--optim.epochs", "6", "--json")
    (code, printed), (second_code, second_printed) = submitting.end(), second.end()
    assert (code, second_code) == (0, 0), (submitting.told, second.told)
    document = json.loads(printed)
    assert (document["status"], document["submissions"], document["run"]) == ("SUCCEEDED", 1, uri)
    assert json.loads(second_printed) == document
    assert document["step"] == 36
    assert document["metrics"]["knn_top1"][-1][0] == 36
    for told in (submitting.told, second.told):
        assert told.count("Finished: 36 steps") == 1
        assert "/36 (" in told
        assert head.token not in told
    assert "following it" in second.told
    another = Submitting(head, uri, *TINY, "--optim.epochs", "6", "--optim.global_batch", "32")
    code, printed = another.end()
    assert code == 2
    assert "was started with another configuration" in another.told
    assert "Traceback" not in another.told
    assert another.told.count("submitted job") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_replaced_and_the_run_on_s3_goes_on(plain_server, phases):
    variables = {**plain_server.environment, VARIABLE: str(phases)}
    with RayHead(variables=variables) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in plain_server.environment.items():
            patch.setenv(name, value)
        uri = "s3://images/driver"
        submitting = Submitting(head, uri, *LONG, "--json", environment=plain_server.environment)
        wait_until(lambda: manifest_ids(Run(uri).checkpoints()), "a checkpoint", submitting)
        before = processes_that_stepped(phases)
        (driver,) = head.drivers("train")
        driver.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until(lambda: processes_that_stepped(phases) - before, "a step", submitting)
        print(f"\nfrom the kill of the driver to the next step: {time.monotonic() - killed_s:.1f} s")
        code, printed = submitting.end()
    assert code == 0, submitting.told
    assert json.loads(printed)["submissions"] == 2
    assert "SIGKILL" in submitting.told
    assert "continuing from the checkpoint of step" in submitting.told
    assert json.loads(printed)["step"] == STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_head_that_comes_back_gets_the_job_again(phases, tmp_path):
    uri = str(tmp_path / "run")
    with RayHead(variables={VARIABLE: str(phases)}) as head:
        submitting = Submitting(head, uri, *LONG, "--json")
        wait_until(lambda: manifest_ids(Run(uri).checkpoints()), "a checkpoint", submitting)
        before = processes_that_stepped(phases)
        head.kill()
        killed_s = time.monotonic()
        submitting.wait_for("waiting for the head at")
        head.start()
        print(f"\nfrom the kill of the head to a new one: {time.monotonic() - killed_s:.1f} s")
        wait_until(lambda: processes_that_stepped(phases) - before, "a step", submitting)
        print(f"from the kill of the head to the next step: {time.monotonic() - killed_s:.1f} s")
        code, printed = submitting.end()
    assert code == 0, submitting.told
    document = json.loads(printed)
    assert (document["submissions"], document["step"]) == (2, STEPS)
    assert "answers again" in submitting.told
    assert "started anew" in submitting.told
    assert len(set(attempt_numbers(Run(uri).checkpoints()))) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_detaches_and_a_stopped_job_saves_and_says_so(head, tmp_path):
    uri = str(tmp_path / "run")
    endless = [*TINY, "--optim.epochs", "9999", "--checkpoint.every_steps", "500"]
    submitting = Submitting(head, uri, *endless, "--json")
    submitting.wait_for("step 1/")
    submitting.process.send_signal(signal.SIGINT)
    code, printed = submitting.end()
    assert code == 130
    (job,) = json.loads(printed)["jobs"]
    assert f"Detached: job {job} goes on" in submitting.told
    again = Submitting(head, uri, *endless)
    again.wait_for("following it")
    ray = str(Path(sys.executable).with_name("ray"))
    stop = [ray, "job", "stop", job, "--address", head.dashboard]
    subprocess.run(stop, env=head.environment, check=True, capture_output=True, timeout=TIMEOUT_S)
    code, printed = again.end()
    assert code == 130, again.told
    assert "was stopped" in printed
    stopped_at = max(manifest_ids(Run(uri).checkpoints())).step
    assert f"Stopped at step {stopped_at:,} of 59,994; a checkpoint is saved" in again.told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_in_a_plain_ray_job_writes_plain_lines_and_keeps_its_exit_codes(head, tmp_path):
    ray = str(Path(sys.executable).with_name("ray"))
    project = tmp_path / "project"
    project.mkdir()
    (project / "notes.txt").write_text("what a working directory has")
    submit = [
        ray,
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--working-dir",
        str(project),
        "--",
        "instdisc",
        "train",
    ]

    def job(*arguments):
        done = subprocess.run(
            [*submit, "quickstart", *TINY, *arguments],
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        return done.returncode, done.stdout + done.stderr

    code, told = job("--optim.epochs", "6")
    assert code == 0, told
    assert "starting 1 worker on the Ray cluster at 127.0.0.2" in told
    assert "/36 (" in told
    assert "Finished: 36 steps" in told
    assert "\x1b[K" not in told
    assert "lies in a copy of the job's files" in told
    code, told = job("--optim.epochs", "6", "--objective.temperature", "-1")
    assert code == 1  # that of `ray job submit`, whatever the job's was
    assert "instdisc: error: " in told
    assert "failed with exit code 2" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_runs_in_a_copy_of_the_working_directory(head, tmp_path):
    project = tmp_path / "project"
    (project / "sitting").mkdir(parents=True)
    (project / "sitecustomize.py").write_text("print('the copy is used', flush=True)")
    arguments = ["--working-dir", str(project), "--no-wait"]
    code, printed = Submitting(head, str(tmp_path / "run"), *TINY, "--optim.epochs", "1", *arguments).end()
    assert code == 0
    assert printed.startswith("Submitted: job instdisc-run-")
    following = Submitting(head, str(tmp_path / "run"), *TINY, "--optim.epochs", "1")
    assert following.end()[0] == 0, following.told
    assert "the copy is used" in following.told
