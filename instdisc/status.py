"""How a run stands, from its store alone, whether its cluster is up or down. Imports neither torch nor Ray."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from cluster.attempts import History, read_attempts, read_history
from cluster.lease import BEAT_S, LEASE_S, Holder, read_heartbeat
from cluster.manifest import Manifest, ManifestError, NewerFormatError, read_manifest
from cluster.starts import Start, count, starts_of
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError
from instdisc.command_line import command_line
from instdisc.config import TrainConfig
from instdisc.recipes import overrides_of
from instdisc.runs import Run
from instdisc.schedule import num_steps

WAITING_S = 75.0
"""Age up to which what a driver said of waiting for machines holds; it says it again every 30 s."""


class State(StrEnum):
    """What a run is doing.

    NEW: it was never trained. WAITING: its driver waits for machines. STARTING: held, and its newest attempt has not
    begun to train. TRAINING: held, by a heartbeat that goes on. SILENT: held, by one that is old. UNCLEAR: held, by one
    from the future: clocks differ. DIED: its holder was a process of this machine that has ended. STOPPED: its holder
    released it. FINISHED.
    """

    NEW = "new"
    WAITING = "waiting"
    STARTING = "starting"
    TRAINING = "training"
    SILENT = "silent"
    UNCLEAR = "unclear"
    DIED = "died"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A run's heartbeat. age_s: from its last renewal, by its holder's clock, to now, by this machine's clock.

    is_same_clock: whether these are one clock.
    """

    holder: Holder
    since: str
    renewed: str
    is_released: bool
    age_s: float
    is_same_clock: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands. steps: of the whole run, None before its images are known. saved: its newest checkpoint that
    can be read. checkpoints: how many are valid. problem: why it is not clear which ones are; "" where it is.
    here: this machine, by whose clock `now` is. waiting: for what its driver waits, in words; "" where it does not.
    """

    uri: str
    config: TrainConfig
    state: State
    beat: Beat | None
    saved: Manifest | None
    saved_age_s: float | None
    num_checkpoints: int
    steps: int | None
    starts: tuple[Start, ...]
    knn_top1: tuple[int, float] | None
    problem: str
    now: datetime
    here: str
    waiting: str = ""

    @property
    def step(self) -> int:
        """The step that is safe."""
        if self.state is State.FINISHED and self.steps is not None:
            return self.steps
        return self.saved.step if self.saved else 0


def status_of(run: Run, now: datetime | None = None) -> Status:
    """Look at a run. RunError where it has no configuration that can be read, StoreError where it does not answer."""
    now = now or datetime.now(UTC)
    config, result, rows, store = run.config(), run.result(), run.num_rows(), run.checkpoints()
    assert config is not None, "existing_run returned it"
    beat = _beat(store, now)
    attempts = read_attempts(store)
    problems: list[str] = []
    history = History(attempts={}, manifests=[], newest=0)
    try:
        history = read_history(store, attempts)
    except (CheckpointError, NewerFormatError) as error:
        problems.append(str(error))
    saved = _newest(store, history, problems)
    starts = tuple(starts_of(attempts))
    state = state_of(beat, is_finished=result is not None, newest=history.newest, started=max(attempts, default=0))
    waiting = "" if result else _waiting(run, starts, now)
    state = State.WAITING if waiting else state
    curve = (result.metrics if result else {}).get("knn_top1")
    return Status(
        uri=run.uri,
        config=config,
        state=state,
        beat=beat,
        saved=saved,
        saved_age_s=_age_s(saved.created, now) if saved else None,
        num_checkpoints=len(history.chain),
        steps=result.num_steps if result else num_steps(config.optim, rows) if rows else None,
        starts=starts,
        knn_top1=curve[-1] if curve else None,
        problem="; ".join(problems),
        now=now,
        here=socket.gethostname(),
        waiting=waiting,
    )


def state_of(beat: Beat | None, *, is_finished: bool, newest: int, started: int) -> State:
    """Return what a run is doing. newest, started: the highest number of an attempt that was won, that has started.

    A heartbeat is renewed every 10 s; whoever waits for one gives it up after 35 s. Here nobody waits: its age decides.
    """
    if is_finished:
        return State.FINISHED
    if beat is None:
        return State.STOPPED if newest else State.NEW
    if beat.is_released:
        return State.STOPPED
    if beat.holder.is_surely_dead():
        return State.DIED
    if beat.age_s > LEASE_S:
        return State.SILENT
    if beat.age_s < -BEAT_S:
        return State.UNCLEAR
    return State.TRAINING if newest and newest == started else State.STARTING


def train_command(config: TrainConfig, uri: str, workers: str | None = None) -> str | None:
    """Return the command that starts or continues a run; None for a configuration that is made from no recipe.

    workers: as --workers has it.
    """
    overrides = overrides_of(config)
    if overrides is None:
        return None
    words = ["train", config.recipe, "--run", uri]
    words += ["--workers", workers] if workers is not None else []
    for name, value in overrides.items():
        # A value that looks like an option, or is empty, would not be taken for one.
        words += [f"--{name}={value}"] if value.startswith("-") or not value else [f"--{name}", value]
    return command_line(*words)


def status_document(status: Status) -> dict[str, Any]:
    """Return everything as one JSON-able document."""
    beat, saved, counts = status.beat, status.saved, count(status.starts)
    return {
        "uri": status.uri,
        "recipe": status.config.recipe,
        "state": str(status.state),
        "step": status.step,
        "num_steps": status.steps,
        "knn_top1": status.knn_top1[1] if status.knn_top1 else None,
        "heartbeat": {
            "process": beat.holder.pid,
            "host": beat.holder.host,
            "since": beat.since,
            "renewed": beat.renewed,
            "released": beat.is_released,
            "age_s": round(beat.age_s, 1),
            "is_same_clock": beat.is_same_clock,
        }
        if beat
        else None,
        "checkpoint": {
            "step": saved.step,
            "attempt": saved.attempt,
            "created": saved.created,
            "age_s": None if status.saved_age_s is None else round(status.saved_age_s, 1),
            "num_bytes": saved_bytes(saved),
        }
        if saved
        else None,
        "num_checkpoints": status.num_checkpoints,
        "attempts": [asdict(start) for start in status.starts],
        **asdict(counts),
        "waiting": status.waiting or None,
        "problem": status.problem or None,
        "command": train_command(status.config, status.uri, last_workers(status.starts)),
        "now": status.now.isoformat(timespec="seconds"),
        "here": status.here,
    }


def saved_bytes(manifest: Manifest) -> int:
    """Return the bytes of all objects that a restore of a checkpoint reads."""
    return sum(stored.num_bytes for stored in manifest.objects())


def last_workers(starts: Sequence[Start]) -> str | None:
    """Return how many workers the last command had, from fewest to most ("2..5"); None where it is not known."""
    since = max((place for place, start in enumerate(starts) if start.kind == "start"), default=0)
    numbers = [start.workers for start in starts[since:] if start.workers is not None]
    if not numbers:
        return None
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)}..{max(numbers)}"


def _waiting(run: Run, starts: Sequence[Start], now: datetime) -> str:
    """Return for what the driver waits, in words; "" where workers were started since, or it is not heard any more."""
    said = run.waiting()
    age_s = _age_s(said["at"], now) if said else None
    started_s = _age_s(starts[-1].created, now) if starts else None
    if said is None or age_s is None or age_s > WAITING_S or (started_s is not None and started_s < age_s):
        return ""
    return f"{said['text']} (on {said['host']})"


def _beat(store: Store, now: datetime) -> Beat | None:
    found: Mapping[str, Any] | None = read_heartbeat(store)
    age_s = _age_s(found["renewed"], now) if found else None
    if found is None or age_s is None:
        return None
    holder = Holder(**found["holder"])
    return Beat(
        holder=holder,
        since=str(found["since"]),
        renewed=str(found["renewed"]),
        is_released=found["released"] is True,
        age_s=age_s,
        # The same boot of a kernel has one clock, also in its containers.
        is_same_clock=bool(holder.boot) and holder.boot == Holder.of_this_process().boot,
    )


def _newest(store: Store, history: History, problems: list[str]) -> Manifest | None:
    """Return the newest valid manifest that can be read; what is wrong with newer ones is added to `problems`."""
    for id in reversed([id for id in history.chain if id not in history.damaged]):
        try:
            return read_manifest(store, id)
        except ObjectMissingError:
            continue  # retention removed it meanwhile
        except (ManifestError, NewerFormatError) as error:
            problems.append(str(error))
    return None


def _age_s(created: str, now: datetime) -> float | None:
    try:
        then = datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return None
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
