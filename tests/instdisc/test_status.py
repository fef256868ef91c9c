"""`instdisc status`: what a person learns of a run that trains, died, was stopped, never started or is finished."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch

import instdisc
from cluster.attempts import read_attempts, record_start, win_number
from cluster.lease import KEY as HEARTBEAT
from cluster.lease import read_heartbeat
from cluster.manifest import encode_document
from cluster.starts import Start
from cluster.store import Store
from cluster.worker import Cause, Worker
from instdisc.cli.main import main
from instdisc.cli.overrides import parse_overrides
from instdisc.cli.status import status_text
from instdisc.launch import train_worker
from instdisc.recipes import RECIPES, overrides_of, recipe
from instdisc.runs import Run
from instdisc.status import WAITING_S, last_workers, status_of, train_command

STEPS = 12
SMALL: dict[str, Any] = {
    "optim.global_batch": 40, "optim.epochs": STEPS * 40 / 200, "optim.warmup_epochs": 0, "data.max_rows": 200,
    "data.max_test_rows": 50, "model.width": 8, "eval.k": 5, "eval.baselines": False, "eval.every_epochs": 0,
    "system.log_every": 1, "checkpoint.every_steps": 4, "checkpoint.overlap": "wait", "bank.momentum": 0.4,
}  # fmt: skip
TIMEOUT_S = 120.0


def small(**overrides: Any):
    return recipe("quickstart", **{**SMALL, **overrides})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("status") / "run")
    assert instdisc.fit(small(), run=uri).finished
    return uri


class CutOffError(Exception):
    """The process is meant to be killed here."""


def train_some(uri: str, until: int, saved: int, cause: Cause | None = None) -> list[dict[str, Any]]:
    """Train on until a step, wait for the checkpoint of another, and fail there; return the events of the run."""
    told: list[dict[str, Any]] = []
    checkpoints = Run(uri).checkpoints()

    def send(text: str) -> None:
        told.append(json.loads(text))
        if told[-1].get("step", 0) >= until:
            wait_for(lambda: any(key.endswith(f"-{saved:012d}.json") for key in checkpoints.list("manifests/")))
            raise CutOffError

    config = Run(uri).agree_on_config(small())
    worker = Worker(device=torch.device("cpu"), send_event=send, cause=cause or Cause())
    with pytest.raises(CutOffError):
        train_worker(worker, config.to_json(), uri)
    return told


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> str:
    """A run that failed after step 6, with a checkpoint of step 4."""
    uri = str(tmp_path_factory.mktemp("stopped") / "run")
    train_some(uri, until=6, saved=4)
    return uri


def status(uri: str, capsys) -> tuple[dict[str, Any], str]:
    """Return what a program reads and what a person reads."""
    assert main(["status", uri, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(["status", uri]) == 0
    return document, capsys.readouterr().out


def rewrite_heartbeat(store: Store, age_s: float, **holder: str) -> None:
    """Make the heartbeat that of a holder that renewed it so long ago, by this machine's clock."""
    found = read_heartbeat(store)
    assert found is not None
    renewed = datetime.now(UTC) - timedelta(seconds=age_s)
    document = {
        **found,
        "holder": {**found["holder"], **holder},
        "released": False,
        "renewed": renewed.isoformat(timespec="seconds"),
    }
    store.put(HEARTBEAT, encode_document(document))


def test_a_finished_run_says_what_it_came_to(finished, capsys):
    document, text = status(finished, capsys)
    result = Run(finished).result()
    assert result is not None
    assert document["state"] == "finished"
    assert (document["step"], document["num_steps"]) == (STEPS, STEPS)
    assert document["knn_top1"] == result.metrics["knn_top1"][-1][1]
    assert document["checkpoint"]["step"] == STEPS
    sizes = dict(Run(finished).checkpoints().list_sizes("objects/"))
    assert 0 < document["checkpoint"]["num_bytes"] <= sum(sizes.values())
    assert document["restarts"] == 0
    assert f"finished, kNN {document['knn_top1']:.1f} %" in text
    assert f"step {STEPS} of {STEPS} (100 %) is safe" in text
    assert f"instdisc show {finished}" in text


def test_the_answer_needs_neither_torch_nor_ray_and_comes_at_once(finished):
    code = (
        "import sys; from instdisc.cli.main import main; code = main(['status', sys.argv[1], '--json']);"
        "print([m for m in ('torch', 'ray', 'tensorboard') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    before_s = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code, finished], capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - before_s
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.strip() == "[]"
    assert json.loads(answer.stdout)["state"] == "finished"
    assert seconds < 10, "about a second on a quiet machine"


def test_a_run_that_was_asked_for_and_never_trained_says_how_to_start_it(tmp_path, capsys):
    uri = str(tmp_path / "run")
    Run(uri).agree_on_config(small())
    document, text = status(uri, capsys)
    assert (document["state"], document["step"], document["num_steps"]) == ("new", 0, None)
    assert (document["checkpoint"], document["heartbeat"], document["attempts"]) == (None, None, [])
    assert "nothing was ever trained" in text
    assert document["command"] in text
    assert main(shlex.split(f"{document['command']} --workers 0")[1:]) == 0
    capsys.readouterr()
    assert status(uri, capsys)[0]["state"] == "finished"


def test_a_run_whose_driver_waits_for_machines_says_so_until_workers_start_or_it_is_not_heard_any_more(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.agree_on_config(small())
    assert status_of(run).state == "new"
    run.say_waiting("waiting for machines: room for 2 of at least 8 workers")
    status = status_of(run)
    assert (status.state, status.beat) == ("waiting", None)
    text = status_text(status)
    assert "waiting for machines: room for 2 of at least 8 workers (on " in text
    assert "not started" not in text
    assert status_of(run, datetime.now(UTC) + timedelta(seconds=2 * WAITING_S)).state == "new"
    time.sleep(1.1)  # the record of a start has whole seconds
    record_start(run.checkpoints(), win_number(run.checkpoints()), None)
    assert status_of(run).state != "waiting"


def test_a_place_that_holds_no_run_is_refused_with_advice(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "no run at" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{]")
    assert main(["status", str(tmp_path)]) == 2
    assert "config.json of run" in capsys.readouterr().err


def test_a_run_that_is_trained_by_another_process_and_then_killed(tmp_path, capsys):
    uri = str(tmp_path / "run")
    long = {**SMALL, "optim.epochs": 5000.0}
    flags = [flag for name, value in long.items() for flag in (f"--{name}", "no" if value is False else str(value))]
    command = [sys.executable, "-m", "instdisc.cli.main", "train", "quickstart", "--run", uri, "--workers", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: process.poll() is not None or Run(uri).checkpoints().list("manifests/"))
        document, text = status(uri, capsys)
        assert document["state"] == "training"
        assert document["heartbeat"]["process"] == process.pid
        assert document["heartbeat"]["is_same_clock"]
        assert document["checkpoint"]["step"] % 4 == 0
        assert document["attempts"][0]["workers"] == 1
        assert f"held by process {process.pid} on {document['here']} since" in text
        assert "1 worker, rank 0 on" in text
        assert "tensorboard --logdir" in text
        assert "clocks" not in text
        process.send_signal(signal.SIGKILL)
    document, text = status(uri, capsys)
    assert document["state"] == "died"
    assert "the process that trained it died" in text
    assert document["command"] in text
    assert "--workers 1" in document["command"]


def test_a_stopped_run_tells_the_command_that_goes_on_to_the_end(tmp_path, capsys):
    uri = str(tmp_path / "run")
    train_some(uri, until=6, saved=4)
    document, text = status(uri, capsys)
    assert document["state"] == "stopped"
    assert document["checkpoint"]["step"] == 4
    assert "and released it" in text
    assert main(shlex.split(document["command"].replace("--workers 1", "--workers 0"))[1:]) == 0
    capsys.readouterr()
    document, text = status(uri, capsys)
    assert document["state"] == "finished"
    assert [attempt["from_step"] for attempt in document["attempts"]] == [0, 4]
    assert "started again 1 time" in text


@pytest.mark.parametrize(
    ("age_s", "state", "says"),
    [
        (3, "training", "ago, by the clocks of this machine"),
        (30, "training", "of far-away"),
        (90, "silent", "or the clocks differ by as much"),
        (86_400, "silent", "24 h ago"),
        (-40, "unclear", "ahead"),
    ],
)
def test_a_holder_on_another_machine_is_judged_by_two_clocks_and_that_is_said(stopped, capsys, age_s, state, says):
    rewrite_heartbeat(Run(stopped).checkpoints(), age_s, host="far-away", boot="another")
    document, text = status(stopped, capsys)
    assert document["state"] == state
    assert not document["heartbeat"]["is_same_clock"]
    assert document["heartbeat"]["age_s"] == pytest.approx(age_s, abs=3)
    assert says in text
    assert f"Ages are by the clock of this machine ({document['here']})" in text


def test_a_run_whose_workers_are_still_restoring_is_starting(stopped, tmp_path, capsys):
    uri = str(shutil.copytree(stopped, tmp_path / "run"))
    store = Run(uri).checkpoints()
    rewrite_heartbeat(store, 1, boot="another")
    win_number(store)
    assert status(uri, capsys)[0]["state"] == "starting"


def test_why_workers_were_started_again_is_told_counted_and_drawn(tmp_path, capsys):
    from test_tensorboard import read, scalars

    uri = str(tmp_path / "run")
    since = time.time() - 7
    train_some(uri, until=5, saved=4)
    drained = Cause(kind="drain", text="node a goes: 3 workers on 2 machines", since=since)
    told = train_some(uri, until=9, saved=8, cause=drained)
    died = Cause(kind="failure", text="rank 1 died | pipe\nand line", since=time.time() + 3600)
    train_some(uri, until=11, saved=8, cause=died)
    document, text = status(uri, capsys)
    assert [attempt["kind"] for attempt in document["attempts"]] == ["start", "drain", "failure"]
    assert (document["restarts"], document["preemptions"], document["failures"], document["resizes"]) == (2, 1, 1, 0)
    assert "drain: node a goes: 3 workers on 2 machines" in text
    assert "started again 2 times: 1 failure, 1 preemption, 0 resizes" in text

    went_on = [event["text"] for event in told if str(event.get("text", "")).startswith("went on after")]
    assert len(went_on) == 1
    assert went_on[0].endswith("s (node a goes: 3 workers on 2 machines)")
    events = f"{uri}/tensorboard"
    ((step, seconds),) = scalars(events, "cluster/recovery_s")
    assert step == 5, "the first step of the second attempt; clocks that disagree are not shown"
    assert 7 <= seconds < 7 + TIMEOUT_S
    assert float(went_on[0].split()[3]) == pytest.approx(seconds, abs=0.06)
    assert scalars(events, "cluster/workers") == [(step, 1.0) for step in range(1, 11)]
    for tag, last in (("cluster/restarts", 2), ("cluster/preemptions", 1), ("cluster/resizes", 0)):
        assert scalars(events, tag)[-1] == (10, last)
    table = read(events).Tensors("cluster/events/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["1", "2", "3"]
    assert rows[3][4:] == ["4", "drain", "node a goes: 3 workers on 2 machines"]
    assert rows[4][6] == "rank 1 died / pipe and line"


def test_what_no_checkpoint_has_is_drawn_and_falls_when_one_is_committed(finished):
    from test_tensorboard import scalars

    steps = dict(scalars(f"{finished}/tensorboard", "checkpoint/age_steps"))
    assert steps[1] == 1
    assert steps[4] == 4
    assert steps[9] <= 5, "before the save of step 8 that of step 4 was committed"
    assert all(age >= 0 for _, age in scalars(f"{finished}/tensorboard", "checkpoint/age_s"))


def test_a_run_on_s3_is_told_alike(server, capsys):
    uri = "s3://images/runs/told"
    train_some(uri, until=6, saved=4)
    document, text = status(uri, capsys)
    assert (document["state"], document["checkpoint"]["step"], document["num_steps"]) == ("stopped", 4, STEPS)
    assert f"tensorboard --logdir {uri}" not in text
    assert f"--run {uri}" in document["command"]
    assert Run(uri).store.list("tensorboard/"), "what was written before the failure reached the store"
    assert main(shlex.split(document["command"].replace("--workers 1", "--workers 0"))[1:]) == 0
    capsys.readouterr()
    left = {thread.name for thread in threading.enumerate()} & {"event-mirror", "cluster-events"}
    assert not left, "the end of a run waits for the last events"
    document, text = status(uri, capsys)
    assert document["state"] == "finished"
    assert len(document["attempts"]) == 2
    assert len(read_attempts(Run(uri).checkpoints())) == 2


def test_a_store_that_is_not_there_is_a_mistake_in_what_was_asked(server, capsys):
    assert main(["status", "s3://no-such-bucket-here/run"]) == 2
    assert "instdisc: error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "data.root": "/some where/images",
            "data.kind": "folder",
            "optim.epochs": 3.5,
            "checkpoint.every_minutes": None,
        },
        {"augment.jitter": (0.1, 0.2, 0.3, 0.4), "objective.temperature": 0.1, "eval.baselines": False, "seed": 7},
        {
            "data.root": "/x",
            "data.kind": "cifar10",
            "data.download": True,
            "bank.device": "mapped",
            "bank.mapped_dir": "--odd",
        },
    ],
)
def test_the_command_that_is_shown_makes_the_configuration_that_the_run_has(name, overrides):
    config = recipe(name, **overrides)
    agreed = config.with_overrides({"optim.norm_group": config.optim.norm_group or config.optim.global_batch})
    command = train_command(agreed, "runs/a b", workers="3")
    assert command is not None
    words = shlex.split(command)
    assert words[:7] == ["instdisc", "train", name, "--run", "runs/a b", "--workers", "3"]
    assert recipe(name, **parse_overrides(words[7:])) == config


def test_the_command_has_as_many_workers_as_the_last_command_had():
    def starts(*found: tuple[str, int | None]) -> list[Start]:
        return [
            Start(attempt=n, created="", from_step=0, workers=workers, host="", kind=kind, text="")
            for n, (kind, workers) in enumerate(found, 1)
        ]

    assert last_workers(starts()) is None
    assert last_workers(starts(("", None))) is None
    assert last_workers(starts(("start", 8), ("start", 4))) == "4"
    assert last_workers(starts(("start", 8), ("failure", 8), ("failure", 8))) == "8"
    assert last_workers(starts(("start", 9), ("start", 2), ("resize", 5), ("drain", 4))) == "2..5"


def test_a_configuration_of_no_recipe_has_no_command(tmp_path, capsys):
    config = replace(small(), recipe="custom")
    assert overrides_of(config) is None
    uri = str(tmp_path / "run")
    Run(uri).agree_on_config(config)
    document, text = status(uri, capsys)
    assert document["command"] is None
    assert "instdisc.fit(config, run=" in text


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_what_is_safe(finished, tmp_path):
    uri = str(shutil.copytree(finished, tmp_path / "run"))
    store = Run(uri).checkpoints()
    newest = store.list("manifests/")[-1]
    store.put(newest, b"{}")
    found = status_of(Run(uri))
    assert found.saved is not None
    assert found.saved.step == 8
    assert newest in found.problem
