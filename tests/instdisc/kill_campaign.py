"""Kill a training run on S3 again and again, and show that nothing is lost.

Usage: PYTHONPATH=tests python tests/instdisc/kill_campaign.py FOLDER --kills 100

Three workers train on a real S3 server. SIGKILL comes from outside: at random moments, and for a part of the kills as
soon as a rare phase of a save or a restore is seen, plus a random delay. Whatever dies is started again with the same
command. Meanwhile an observer reads the store: every checkpoint that is visible must be complete to the byte, and never
older than one that was visible before. Each run must end bit for bit like one that nobody disturbed.

Everything is kept in FOLDER: the same command goes on where it stopped. FOLDER/report.json sums up what is there.
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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from fault_proxy import FaultProxy
from killing import differences
from seaweed import Seaweed
from tiny_data import write_cifar10

from cluster.attempts import read_history
from cluster.checkpoint import read_latest
from cluster.checkpoint_reader import verify_share
from cluster.phase import VARIABLE, Phase, read_phase
from cluster.store import Store, StoreError

NUM_ROWS, GLOBAL_BATCH, STEPS, EVERY = 103, 12, 400, 20
START_TIMEOUT_S, END_TIMEOUT_S = 240.0, 120.0
AIMED_SHARE = 0.4
FAULTS = ("503", "429", "stall", "reset", "truncate", "lost", "slow")
STALL_S, BYTES_PER_S = 2.0, 500_000.0
RARE = (Phase.SNAPSHOT, Phase.SNAPSHOT, Phase.MANIFEST, Phase.RESTORE, Phase.UPLOAD)
RAY_AGENTS = ("ray::RuntimeEnv", "ray::Dashboard")
LONGEST_WAIT_S = 10.0
_POLL_S = 0.0005


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What one SIGKILL hit and what it cost. recovery_s: from the kill to the next step that is new."""

    launcher: str
    run: int
    who: str
    aimed: bool
    phase: str
    step: int
    resumed: int
    steps_lost: int
    recovery_s: float


class Observer:
    """Reads a run's checkpoints from outside, all the time, as somebody would who wants to use them."""

    def __init__(self, uri: str) -> None:
        self.store, self.problems, self.num_looks = Store(uri), [], 0
        self._newest = -1
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join(60)

    def _watch(self) -> None:
        while not self._ending.wait(0.3):
            try:
                chain = read_history(self.store).chain
                if not chain:
                    continue
                _, problems = verify_share(self.store, chain[-1], 0, 1, 4)
                if problems and self.store.exists(chain[-1].key):
                    self.problems.append(f"{chain[-1]}: {problems}")
                if chain[-1].step < self._newest:
                    self.problems.append(f"{chain[-1]} is visible after step {self._newest} was")
                self._newest = max(self._newest, chain[-1].step)
                self.num_looks += 1
            except StoreError:
                continue  # the server is down


class Campaign:
    """Kills, and what is known of those that were."""

    def __init__(self, folder: Path, launcher: str, seed: int | None, faults: float) -> None:
        self.folder, self.launcher = folder, launcher
        self.chance = random.Random(seed)
        self.kills = [Kill(**json.loads(line)) for line in _lines(folder / "kills.jsonl")]
        self.server = Seaweed(folder / "seaweed")
        self.faults = faults
        self.endpoint = ""
        self.num_looks = self.num_runs = self.num_server_kills = 0
        self._workers_before: set[int] = set()

    def run(self, num_kills: int, server_kills: bool) -> None:
        """Go on until there are so many kills (of this launcher), and the run that was hit last has ended well."""
        self.server.start()
        os.environ.update(self.server.environment)
        self.endpoint = self.server.endpoint
        proxy = None
        if self.faults:
            shares = dict.fromkeys(FAULTS, self.faults / len(FAULTS))
            proxy = FaultProxy(
                self.server.endpoint, self.chance.randrange(10**6), shares, stall_s=STALL_S, bytes_per_s=BYTES_PER_S
            )
            proxy.start()
            self.endpoint = proxy.endpoint
        try:
            self._make_expected()
            while self._num_kills() < num_kills:
                self._one_run(num_kills, server_kills)
        finally:
            if proxy is not None:
                print(json.dumps({"faults": proxy.counts}), flush=True)
                proxy.stop()
            self.server.kill()

    def _num_kills(self) -> int:
        return sum(kill.launcher == self.launcher for kill in self.kills)

    def _make_expected(self) -> None:
        if not (self.folder / "data").exists():
            write_cifar10(self.folder / "data", NUM_ROWS, 20)
        run = self.folder / "expected"
        if not (run / "results.json").exists():
            done = subprocess.run(self._command(str(run), "local"), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    def _command(self, uri: str, launcher: str) -> list[str]:
        return [
            *(sys.executable, "-m", "instdisc.cli.main", "train", "cifar10-cpu", "--run", uri),
            *("--launcher", launcher, "--workers", "3", "--data.root", str(self.folder / "data")),
            *("--data.max_rows", "none", "--model.architecture", "resnet-small", "--model.width", "16"),
            *("--model.head", "linear", "--model.feature_dim", "64", "--eval.k", "5", "--eval.every_epochs", "0"),
            *("--optim.global_batch", str(GLOBAL_BATCH), "--optim.norm_group", "4", "--eval.baselines", "no"),
            *("--optim.epochs", str(STEPS * GLOBAL_BATCH / NUM_ROWS), "--checkpoint.every_steps", str(EVERY)),
            *("--objective.name", "nce", "--objective.z", "ema", "--objective.num_negatives", "64"),
            *("--system.tensorboard", "no", "--checkpoint.every_minutes", "none", "--checkpoint.overlap", "wait"),
        ]

    def _one_run(self, num_kills: int, server_kills: bool) -> None:
        number = 1 + max((kill.run for kill in self.kills), default=0)
        uri = f"s3://images/{self.launcher}-{number}-{self.chance.randrange(10**9)}"
        ending = threading.Event()
        with Observer(f"{uri}/checkpoints") as observer:
            if server_kills:
                threading.Thread(target=self._kill_servers, args=(ending,), daemon=True).start()
            self._live_and_die(uri, number, num_kills)
            ending.set()
        found, expected = (read_latest(Store(f"{place}/checkpoints")) for place in (uri, str(self.folder / "expected")))
        wrong = [*observer.problems, *differences(found, expected)]
        assert not wrong, f"run {uri}: {wrong}"
        self.num_looks, self.num_runs = self.num_looks + observer.num_looks, self.num_runs + 1
        print(f"run {number} ended as it should, after {observer.num_looks} looks from outside", flush=True)

    def _live_and_die(self, uri: str, number: int, num_kills: int) -> None:
        killed: tuple[float, str, bool, str, int] | None = None
        while True:
            phases = self.folder / "phases" / str(time.time_ns())
            phases.mkdir(parents=True)
            environment = {**os.environ, VARIABLE: str(phases), "AWS_ENDPOINT_URL": self.endpoint}
            with open(self.folder / "driver.log", "ab") as log:
                driver = subprocess.Popen(self._command(uri, self.launcher), stdout=log, stderr=log, env=environment)
            if killed is not None:
                self._take_down(uri, number, killed, driver, phases)
            if self._num_kills() >= num_kills:
                code = driver.wait(600)
                assert code == 0, (self.folder / "driver.log").read_text()[-3000:]
                return
            while (killed := self._kill_somebody(driver, phases)) is not None and self._goes_on_without(killed[1]):
                self._take_down(uri, number, killed, driver, phases)
                if self._num_kills() >= num_kills:
                    killed = None
                    break
            if killed is None:
                assert driver.wait(600) == 0, (self.folder / "driver.log").read_text()[-3000:]
                return

    def _kill_somebody(self, driver: subprocess.Popen[bytes], phases: Path) -> tuple[float, str, bool, str, int] | None:
        """Kill a worker, the coordinator or the driver; None if the run ended before."""
        if not self._wait_for_workers(driver, phases):
            return None
        who = self.chance.choice(["worker", "worker", "coordinator", "driver"])
        aimed = self.chance.random() < AIMED_SHARE
        workers = _ranks(phases)
        if not workers:
            return None
        watched = self.chance.choice(workers)
        if aimed:
            wanted, deadline = self.chance.choice(RARE), time.monotonic() + 20
            while time.monotonic() < deadline and driver.poll() is None:
                now = read_phase(phases, watched)
                if now is not None and now[0] == wanted:
                    break
                time.sleep(_POLL_S)
            time.sleep(self.chance.uniform(0, 0.004))
        else:
            time.sleep(self.chance.uniform(0, LONGEST_WAIT_S))
        family = _family(driver.pid)
        victim = {"worker": watched, "driver": driver.pid}.get(who) or _coordinator(family)
        if driver.poll() is not None or victim is None:
            return None
        before_s = time.monotonic()
        try:
            os.kill(victim, 9)
        except ProcessLookupError:
            return None
        seen = [found for pid in ([watched] if who == "worker" else workers) if (found := read_phase(phases, pid))]
        phase = max(seen, key=lambda found: list(Phase).index(found[0]))[0]
        step = max(found[1] for found in seen)
        self._workers_before = set(workers)
        if not self._goes_on_without(who):
            driver.wait(END_TIMEOUT_S)
            _, alive = psutil.wait_procs(family, timeout=30)
            # Ray's own agents take longer to see that their node is gone; they hold nothing of the run.
            alive = [process for process in alive if not process.name().startswith(RAY_AGENTS)]
            assert not alive, f"left behind: {alive}"
        return before_s, who, aimed, str(phase), step

    def _goes_on_without(self, who: str) -> bool:
        """Whether the driver starts again what was killed."""
        return who == "coordinator" or (who == "worker" and self.launcher == "ray")

    def _wait_for_workers(self, driver: subprocess.Popen[bytes], phases: Path) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(_ranks(phases)) < 3:
            if driver.poll() is not None:
                assert driver.returncode == 0, (self.folder / "driver.log").read_text()[-3000:]
                return False
            assert time.monotonic() < deadline, "the workers do not come"
            time.sleep(0.01)
        return True

    def _take_down(
        self, uri: str, number: int, killed: tuple[float, str, bool, str, int], driver: Any, phases: Path
    ) -> None:
        """Wait for the first new step after a kill, and note what the kill cost."""
        killed_s, who, aimed, phase, step = killed
        resumed, deadline = step, time.monotonic() + START_TIMEOUT_S
        while driver.poll() is None:
            assert time.monotonic() < deadline, "no step after a kill"
            old = self._workers_before if who == "worker" else set()
            new = [pid for pid in _ranks(phases) if pid not in old]
            reached = max((found[1] for pid in new if (found := read_phase(phases, pid))), default=-1)
            if who != "coordinator" and reached >= 0:
                history = read_history(Store(f"{uri}/checkpoints"))
                parent = history.attempts[max(history.attempts)].parent
                resumed = parent.step if parent else 0
            if reached > resumed:
                break
            time.sleep(0.01)
        kill = Kill(
            launcher=self.launcher, run=number, who=who, aimed=aimed, phase=phase, step=step, resumed=resumed,
            steps_lost=max(0, step - resumed) if who != "coordinator" else 0,
            recovery_s=round(time.monotonic() - killed_s, 2),
        )  # fmt: skip
        self.kills.append(kill)
        with open(self.folder / "kills.jsonl", "a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        print(f"{len(self.kills)}: {kill}", flush=True)

    def _kill_servers(self, ending: threading.Event) -> None:
        """Take the S3 server away while something is being saved, again and again."""
        while not ending.wait(self.chance.uniform(1, 6)):
            while not self._is_saving() and not ending.wait(_POLL_S):
                pass
            if ending.is_set():
                return
            self.server.kill()
            self.num_server_kills += 1
            time.sleep(self.chance.uniform(0.2, 2))
            self.server.start()

    def _is_saving(self) -> bool:
        folder = max((self.folder / "phases").iterdir(), default=None)
        seen = [read_phase(folder, pid) for pid in _ranks(folder)] if folder else []
        return any(found and found[0] in (Phase.UPLOAD, Phase.MANIFEST) for found in seen)


def report(folder: Path) -> dict[str, Any]:
    """Return what the kills in a folder came to."""
    kills = [Kill(**json.loads(line)) for line in _lines(folder / "kills.jsonl")]
    ended = [kill for kill in kills if kill.who != "coordinator"]
    return {
        "kills": len(kills),
        "by_launcher": Counter(kill.launcher for kill in kills),
        "by_victim": Counter(kill.who for kill in kills),
        "aimed": sum(kill.aimed for kill in kills),
        "phases": Counter(kill.phase for kill in kills),
        "phases_of_kills_at_random_moments": Counter(kill.phase for kill in kills if not kill.aimed),
        "steps_between_saves": EVERY,
        "steps_lost": Counter(kill.steps_lost for kill in ended),
        "recovery_s": {
            "median": statistics.median(kill.recovery_s for kill in ended) if ended else None,
            "longest": max((kill.recovery_s for kill in ended), default=None),
        },
        "trials": [asdict(kill) for kill in kills],
    }


def _ranks(phases: Path) -> list[int]:
    """Return the numbers of the living processes that train."""
    return sorted(int(path.name) for path in phases.iterdir() if psutil.pid_exists(int(path.name)))


def _family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _coordinator(family: list[psutil.Process]) -> int | None:
    for process in family:
        try:
            if process.name() == "coordinator" or any("CoordinatorActor" in part for part in process.cmdline()):
                return process.pid
        except psutil.NoSuchProcess:
            continue
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--launcher", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--faults", type=float, default=0.0, help="share of requests that a fault hits, each kind alike"
    )
    parser.add_argument("--server-kills", action="store_true", help="kill the S3 server during saves")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options.folder, options.launcher, options.seed, options.faults)
    campaign.run(options.kills, options.server_kills)
    found = report(options.folder)
    found |= {"runs": campaign.num_runs, "looks": campaign.num_looks, "server_kills": campaign.num_server_kills}
    (options.folder / "report.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({name: value for name, value in found.items() if name != "trials"}, indent=1))


if __name__ == "__main__":
    main()
