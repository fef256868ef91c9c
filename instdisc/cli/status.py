"""`instdisc status`: what a run is doing now, from its store alone, cluster up or down."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from instdisc.cli.output import printable
from instdisc.command_line import command_line, tensorboard_command

if TYPE_CHECKING:
    from cluster.starts import Start
    from instdisc.status import Status

_NUM_SHOWN = 8


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("status", help="tell whether a run is being trained, what is safe, what to do next")
    parser.description = (
        "Tell from a run's store alone whether somebody trains it, which step is safe, and why its workers were "
        "started again. Reads only, and waits for nothing: a heartbeat is judged by its age."
    )
    parser.add_argument("uri", metavar="RUN", help="folder or URI of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print how the run stands."""
    from instdisc.runs import existing_run
    from instdisc.status import status_document, status_of

    status = status_of(existing_run(options.uri))
    print(json.dumps(status_document(status), indent=1) if options.json else status_text(status))
    return 0


def status_text(status: Status) -> str:
    """Return everything for people."""
    lines = [f"{status.uri}: recipe {status.config.recipe}, {_verdict(status)}"]
    lines += [f"  {line}" for line in (*_training_lines(status), *_checkpoint_lines(status))]
    if status.problem:
        lines.append(f"  problem: {status.problem}")
    if status.starts:
        lines += ["", *_table(status.starts[-_NUM_SHOWN:]), _counts_line(status)]
    if status.beat is None or not status.beat.is_same_clock:
        lines.append(
            f"Ages are by the clock of this machine ({status.here}), times by the clocks of the machines that wrote "
            "them; clocks can differ."
        )
    lines += ["Next:", *(f"  {line}" for line in _next_lines(status))]
    return "\n".join(map(printable, lines))


def _verdict(status: Status) -> str:
    from cluster.lease import LEASE_S
    from instdisc.status import State

    knn = f", kNN {status.knn_top1[1]:.1f} %" if status.knn_top1 else ""
    return {
        State.NEW: "not started: nothing was ever trained",
        State.WAITING: status.waiting,
        State.STARTING: "starting: its workers are restoring",
        State.TRAINING: "training now",
        State.SILENT: f"probably not training: no heartbeat for more than {LEASE_S:.0f} s",
        State.UNCLEAR: "not clear whether it is training: the clocks of two machines differ",
        State.DIED: "not training: the process that trained it died",
        State.STOPPED: "not training",
        State.FINISHED: f"finished{knn}",
    }[status.state]


def _training_lines(status: Status) -> Iterator[str]:
    from instdisc.cli.checkpoint_tables import age
    from instdisc.progress import counted
    from instdisc.status import State

    beat, last = status.beat, status.starts[-1] if status.starts else None
    if beat is None or status.state is State.FINISHED:
        return
    clocks = "" if beat.is_same_clock else f", by the clocks of this machine ({status.here}) and of {beat.holder.host}"
    if beat.is_released:
        yield f"{beat.holder} trained it from {beat.since} and released it {age(beat.age_s)} ago{clocks}"
        return
    yield f"held by {beat.holder} since {beat.since}"
    if status.state is State.UNCLEAR:
        yield (
            f"its last heartbeat is {age(-beat.age_s)} ahead{clocks}; a heartbeat comes every 10 s: look again, and it "
            f"goes on if it is no longer that of {beat.renewed}"
        )
    else:
        yield f"its last heartbeat was {age(beat.age_s)} ago{clocks}"
    if status.state is State.SILENT and not beat.is_same_clock:
        yield "it ended without a word, cannot reach its storage, or the clocks differ by as much"
    if status.state is State.TRAINING and last is not None and last.workers is not None:
        yield f"{counted(last.workers, 'worker')}, rank 0 on {last.host}, attempt {last.attempt} since {last.created}"


def _checkpoint_lines(status: Status) -> Iterator[str]:
    from instdisc.cli.checkpoint_tables import age
    from instdisc.progress import counted, in_bytes
    from instdisc.status import saved_bytes

    saved, steps = status.saved, "?" if status.steps is None else f"{status.steps:,}"
    if saved is None:
        yield f"no checkpoint yet, of {steps} steps"
        return
    percent = f" ({100 * saved.step // max(1, status.steps)} %)" if status.steps is not None else ""
    yield (
        f"step {saved.step:,} of {steps}{percent} is safe: its checkpoint is {age(status.saved_age_s)} old, "
        f"{in_bytes(saved_bytes(saved))} (attempt {saved.attempt}); {counted(status.num_checkpoints, 'checkpoint')}"
    )


def _table(starts: Sequence[Start]) -> list[str]:
    rows = [["attempt", "started (UTC)", "workers", "from step", "why"]]
    for start in starts:
        why = f"{start.kind}: {start.text}" if start.kind and start.text else start.kind or "not recorded"
        workers = "?" if start.workers is None else f"{start.workers}"
        rows.append([str(start.attempt), _minute(start.created), workers, f"{start.from_step:,}", why])
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    return ["  ".join([*(cell.rjust(n) for cell, n in zip(row, widths, strict=False)), row[4]]) for row in rows]


def _counts_line(status: Status) -> str:
    from cluster.starts import count
    from instdisc.progress import counted

    counts = count(status.starts)
    more = f" (the last {_NUM_SHOWN} starts are shown)" if len(status.starts) > _NUM_SHOWN else ""
    if not counts.restarts:
        return "never started again"
    return (
        f"started again {counted(counts.restarts, 'time')}: {counted(counts.failures, 'failure')}, "
        f"{counted(counts.preemptions, 'preemption')}, {counted(counts.resizes, 'resize')}, the rest by a command{more}"
    )


def _next_lines(status: Status) -> Iterator[str]:
    from instdisc.status import State, last_workers, train_command

    board = tensorboard_command(status.uri)
    if status.state is State.FINISHED:
        yield command_line("show", status.uri)
        yield command_line("knn", status.uri)
        yield board
    elif status.state in (State.TRAINING, State.STARTING, State.WAITING):
        yield board
        yield command_line("status", status.uri)
    else:
        command = train_command(status.config, status.uri, last_workers(status.starts))
        if command is None:
            yield f"instdisc.fit(config, run={status.uri!r})  # its configuration is of no recipe: as before"
        else:
            yield command
            yield "  (with the --launcher and --address that it had)"
        if status.state in (State.SILENT, State.UNCLEAR):
            yield "  (whoever trains it after all is left alone: the command watches its heartbeat first)"


def _minute(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return created
