"""A training run on a cluster whose machines come and go, die, are cut off and lose their storage: it finishes.

    PYTHONPATH=tests:tests/cluster python tests/instdisc/chaos.py FOLDER --events kill join drain join cut head s3
    PYTHONPATH=tests:tests/cluster python tests/instdisc/chaos.py FOLDER --random 20 --seed 1

Hosts are network namespaces with a Ray node each; the run lies on a real S3 server; `instdisc submit` sends it from
outside. Events come from outside by wall clock. Afterwards every row's last write is compared with the stream, in
checkpoints of every epoch. Results are added to FOLDER/events.jsonl; FOLDER/report.json sums up what is there. Needs
root, for the namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray_hosts
from metadata_server import MetadataServer
from ray_hosts import Host, Hosts
from seaweed import Seaweed

from cluster.attempts import attempt_numbers
from cluster.checkpoint_reader import Checkpoint
from cluster.inventory import take_stock
from cluster.phase import VARIABLE, read_phase
from cluster.store import Store
from dataloading.stream import last_steps

WORKERS, EVERY = 3, 20
DRAIN_S, CUT_S, S3_DOWN_S = 20, 60.0, 3.0
QUIET_S = 12.0
"""After which an event that ended no worker counts as over."""
EVENT_TIMEOUT_S, END_TIMEOUT_S = 300.0, 900.0
_SAMPLE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Event:
    """What one event cost.

    steps_lost: steps that had been made and were made again. next_step_s: from the event to the next step that was new;
    pause_s: the longest time without a new step around the event. workers: before and after.
    """

    trial: int
    kind: str
    at_step: int
    resumed: int | None
    steps_lost: int
    next_step_s: float
    pause_s: float
    workers: tuple[int, int]


@dataclass
class Steps:
    """Watches from outside which processes train and how far they are."""

    folder: Path
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, process, step), whenever a process's step changed."""

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._last: dict[int, int] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self._ending.set()

    def _watch(self) -> None:
        while not self._ending.wait(_SAMPLE_S):
            for path in list(self.folder.iterdir()):
                found = read_phase(self.folder, int(path.name))
                if found is not None and found[1] >= 0 and self._last.get(int(path.name)) != found[1]:
                    self._last[int(path.name)] = found[1]
                    self.samples.append((time.monotonic(), int(path.name), found[1]))

    def newest(self) -> int:
        """Return the most steps that any process has made."""
        return max((step for _, _, step in self.samples), default=-1)

    def living(self) -> list[int]:
        """Return the processes that train now."""
        return [pid for pid in self._last if psutil.pid_exists(pid)]


class Chaos:
    """A cluster, a run on it, and what is done to them."""

    def __init__(self, folder: Path, num_steps: int, seed: int | None) -> None:
        self.folder, self.num_steps = folder, num_steps
        self.chance = random.Random(seed)
        self.events = [Event(**json.loads(line)) for line in _lines(folder / "events.jsonl")]
        self.trial = 1 + max((event.trial for event in self.events), default=0)
        self.uri = f"s3://images/chaos-{self.trial}-{random.SystemRandom().randrange(10**9)}"
        self.server = Seaweed(folder / "seaweed", address=f"{ray_hosts.SUBNET}.{ray_hosts.OUTSIDE}")
        phases = folder / f"phases-{self.trial}-{time.time_ns()}"
        phases.mkdir(parents=True)
        self.steps = Steps(phases)
        # As in an image: "python" has the project.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **self.server.environment,
            VARIABLE: str(phases),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PATH": path,
        }
        os.environ.update(self.server.environment)
        self.hosts: Hosts | None = None
        self.down: list[Host] = []
        self.clouds: dict[Host, MetadataServer] = {}
        """What hosts that are watched hear from their cloud."""

    def run(self, kinds: Iterable[str]) -> dict[str, Any]:
        """Train to the end through events of these kinds; return what the run came to."""
        kinds = list(kinds)
        self.server.start()
        try:
            with ray_hosts.cluster(_short(self.folder), self.environment, WORKERS) as self.hosts:
                with open(self.folder / "submit.log", "ab") as log:
                    job = subprocess.Popen(self._command(), env=self.hosts.environment, stdout=log, stderr=log)
                self._wait(lambda: len(self.steps.living()) == WORKERS and self.steps.newest() > 2 * EVERY, job)
                if "notice" in kinds:
                    for host in self.hosts.workers:
                        self._watch(host)
                for kind in kinds:
                    time.sleep(self.chance.uniform(2, 8))
                    if job.poll() is not None:
                        print("the run ended before all events came", flush=True)
                        break
                    self._event(kind, job)
                assert job.wait(END_TIMEOUT_S) == 0, (self.folder / "submit.log").read_text()[-3000:]
            return self._check()
        finally:
            self.steps.close()
            self.server.kill()

    def _command(self) -> list[str]:
        assert self.hosts is not None
        return [
            *(sys.executable, "-m", "instdisc.cli.main", "submit", "quickstart", "--address", self.hosts.dashboard),
            *("--run", self.uri, "--workers", f"1..{WORKERS}", "--checkpoint.every_steps", str(EVERY)),
            *("--checkpoint.every_minutes", "none", "--checkpoint.overlap", "wait", "--eval.every_epochs", "0"),
            *("--optim.epochs", str(self.num_steps * 128 / 4000), "--eval.baselines", "no"),
            *("--optim.norm_group", "32"),
            *("--checkpoint.keep_every_steps", str(EVERY)),
            *("--elastic.start_settle_s", "20", "--elastic.grow_settle_s", "5", "--elastic.resize_interval_s", "15"),
        ]

    def _event(self, kind: str, job: subprocess.Popen) -> None:
        assert self.hosts is not None
        known, before = {pid for _, pid, _ in self.steps.samples}, len(self.steps.living())
        up = [host for host in self.hosts.workers if host not in self.down]
        victim = self.chance.choice(up)
        at_s, at_step = time.monotonic(), self.steps.newest()
        print(f"{kind} at step {at_step}", flush=True)
        after = getattr(self, f"_{kind}")(victim)
        new_group = kind not in ("coordinator", "s3")
        deadline = time.monotonic() + EVENT_TIMEOUT_S
        while True:
            assert job.poll() is None, (self.folder / "submit.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"no step after {kind}"
            fresh = [s for s in list(self.steps.samples) if s[1] not in known and s[0] > at_s]
            resumed = fresh[0][2] if fresh else None
            done = [s for s in fresh if s[2] > (resumed or 0)] if resumed is not None else []
            if done:
                next_s = done[0][0]
                break
            if not new_group and time.monotonic() - at_s > QUIET_S:
                later = [s for s in list(self.steps.samples) if s[0] > at_s]
                if later and later[-1][2] > at_step:
                    next_s = later[0][0]
                    break
            time.sleep(_SAMPLE_S)
        made = max((s[2] for s in self.steps.samples if s[1] in known), default=at_step)
        times = sorted(s[0] for s in self.steps.samples if s[0] > at_s - 2)
        event = Event(
            trial=self.trial, kind=kind, at_step=at_step, resumed=resumed,
            steps_lost=0 if resumed is None else max(0, made - resumed),
            next_step_s=round(next_s - at_s, 2),
            pause_s=round(max((b - a for a, b in pairwise(times)), default=0.0), 2),
            workers=(before, len({s[1] for s in fresh} or self.steps.living())),
        )  # fmt: skip
        self.events.append(event)
        with open(self.folder / "events.jsonl", "a") as file:
            file.write(json.dumps(asdict(event)) + "\n")
        print(event, flush=True)
        after()

    def _kill(self, victim: Host) -> Callable[[], None]:
        victim.kill()
        self.down.append(victim)
        return lambda: None

    def _drain(self, victim: Host) -> Callable[[], None]:
        assert self.hosts is not None
        self.hosts.drain(victim, DRAIN_S)
        self.down.append(victim)
        timer = threading.Timer(DRAIN_S, victim.kill)
        timer.start()
        return timer.join

    def _watch(self, host: Host) -> None:
        """Start the daemon that a node of ray_config.yaml has, and what it asks."""
        assert self.hosts is not None
        cloud = self.clouds[host] = MetadataServer("aws", host=f"{ray_hosts.SUBNET}.{ray_hosts.OUTSIDE}")
        command = [sys.executable, "-m", "cluster.spot_watch", "--node-ip", host.address, "--metadata-url", cloud.url]
        with open(self.folder / "spot_watch.log", "ab") as log:
            subprocess.Popen(host.command(command), env=host.environment, stdout=log, stderr=log)

    def _notice(self, victim: Host) -> Callable[[], None]:
        self.clouds[victim].interrupt("terminate", time.time() + DRAIN_S)
        self.down.append(victim)
        timer = threading.Timer(DRAIN_S, victim.kill)
        timer.start()
        return timer.join

    def _join(self, victim: Host) -> Callable[[], None]:
        assert self.hosts is not None
        del victim
        host = self.down.pop()
        host.kill()
        host.start_ray(self.hosts.head, self.hosts.num_cpus)
        if self.clouds:
            self._watch(host)
        return lambda: None

    def _cut(self, victim: Host) -> Callable[[], None]:
        victim.cut()
        timer = threading.Timer(CUT_S, victim.mend)
        timer.start()

        def after() -> None:
            timer.join()
            time.sleep(15)
            assert self.hosts is not None
            if victim.address not in {node["NodeManagerAddress"] for node in self.hosts.alive()}:
                self.down.append(victim)  # Ray gave it up: a machine has to join anew

        return after

    def _coordinator(self, victim: Host) -> Callable[[], None]:
        assert self.hosts is not None
        del victim
        (pid,) = [pid for pid in self.hosts.head.pids() if "ray::CoordinatorActor" in _title(pid)]
        os.kill(pid, 9)
        return lambda: None

    def _head(self, victim: Host) -> Callable[[], None]:
        assert self.hosts is not None
        del victim
        self.hosts.head.kill()
        for host in self.hosts.workers:
            host.kill()  # without their head they would end in a minute
        self.hosts.start_head()
        for host in self.hosts.workers:
            if host not in self.down:
                host.start_ray(self.hosts.head, self.hosts.num_cpus)
                if self.clouds:
                    self._watch(host)
        return lambda: None

    def _s3(self, victim: Host) -> Callable[[], None]:
        del victim
        self.server.kill()
        time.sleep(S3_DOWN_S)
        self.server.start()
        return lambda: None

    def _wait(self, condition: Callable[[], bool], job: subprocess.Popen) -> None:
        deadline = time.monotonic() + EVENT_TIMEOUT_S
        while not condition():
            assert job.poll() is None, (self.folder / "submit.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the workers do not come"
            time.sleep(_SAMPLE_S)

    def _check(self) -> dict[str, Any]:
        """Compare the end with the stream: every row's last write, the number of steps; return the kNN accuracy."""
        store = Store(f"{self.uri}/checkpoints")
        result = json.loads(Store(self.uri).get("results.json"))
        steps = result["num_steps"]
        chain = [Checkpoint(store, entry.manifest) for entry in take_stock(store).usable if entry.manifest is not None]
        assert (max(kept.step for kept in chain), result["step"]) == (steps, steps)
        for kept in chain:  # less than an epoch apart
            rows = kept.rows("bank_last_step")
            assert rows.tolist() == last_steps(len(rows), 0, 128, kept.step).tolist(), kept.step
        attempts = len(attempt_numbers(store))
        knn = result["metrics"]["knn_top1"][-1][1]
        return {"trial": self.trial, "steps": steps, "attempts": attempts, "checkpoints": len(chain), "knn": knn}


def random_events(chance: random.Random, number: int) -> list[str]:
    """Return so many events; machines that went come back, so that somebody is left to train."""
    kinds, down = [], 0
    while len(kinds) < number:
        possible = ["coordinator", "s3", "head"] + ["kill", "drain"] * 2 * (down < WORKERS - 1) + ["join"] * 4 * down
        kind = chance.choice(possible)
        down += {"kill": 1, "drain": 1, "join": -1}.get(kind, 0)
        kinds.append(kind)
    return kinds


def report(folder: Path) -> dict[str, Any]:
    """Return a table of events by kind."""
    events = [Event(**json.loads(line)) for line in _lines(folder / "events.jsonl")]
    table = {}
    for kind in dict.fromkeys(event.kind for event in events):
        mine = [event for event in events if event.kind == kind]
        table[kind] = {
            "number": len(mine),
            "steps_lost": [event.steps_lost for event in mine],
            "next_step_s": [event.next_step_s for event in mine],
            "median_next_step_s": statistics.median(event.next_step_s for event in mine),
            "pause_s": [event.pause_s for event in mine],
        }
    return {"steps_between_saves": EVERY, "events": table, "trials": [asdict(event) for event in events]}


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


def _short(folder: Path) -> Path:
    """Return a short path for Ray's sockets."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="rc-"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", nargs="+", default=[])
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if ray_hosts.VARIABLE not in os.environ:
        return ray_hosts.run_in_a_network([sys.executable, *sys.argv]).returncode
    options.folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(options.folder.absolute(), options.steps, options.seed)
    kinds = options.events or random_events(chaos.chance, options.random)
    outcome = chaos.run(kinds)
    outcomes = options.folder / "outcomes.jsonl"
    with open(outcomes, "a") as file:
        file.write(json.dumps(outcome) + "\n")
    document = {**report(options.folder), "runs": [json.loads(line) for line in _lines(outcomes)]}
    (options.folder / "report.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document["events"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
