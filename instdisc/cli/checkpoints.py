"""`instdisc checkpoints`: list a run's checkpoints, read them back, remove old ones, look into one."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from instdisc.cli.output import printable

if TYPE_CHECKING:
    from cluster.manifest import ManifestId
    from cluster.pruning import Plan
    from cluster.retention import Retention
    from cluster.store import Store
    from instdisc.runs import Run

_NUM_SHOWN = 20
_PIPE_WIDTH = 200
_TRIES = 3


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("checkpoints", help="list, verify, prune and look into the checkpoints of a run")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    ls = _action(actions, "ls", list_all, "list a run's checkpoints, and what would be deleted next")
    ls.description = "List the checkpoints of a run that trains, died or is finished. Reads only."

    verify = _action(actions, "verify", verify_some, "read back every byte of a checkpoint")
    verify.description = (
        "Read the newest valid checkpoint, or the one that is asked for, and compare it with its checksums. "
        "The exit code is 1 where anything is damaged or missing."
    )
    _add_which(verify)
    verify.add_argument("--all", action="store_true", help="all valid checkpoints; what they share is read once")

    prune = _action(actions, "prune", remove_old, "delete checkpoints that no rule keeps, orphans and torn saves")
    prune.description = (
        "Delete the checkpoints that none of the rules keeps, those of attempts that were left behind, and what torn "
        "saves left. A rule that is not given is the run's. A run that "
        "somebody trains is refused. Objects are looked at by their size only: verify first."
    )
    prune.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N (default: as the run does)")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="and the first at or after each multiple")
    prune.add_argument("--keep-best", metavar="METRIC", help="and the one with the highest value of a metric")
    prune.add_argument("--damaged", action="store_true", help="delete damaged and incomplete ones as well")
    prune.add_argument("--dry-run", action="store_true", help="show what would be deleted, and delete nothing")
    prune.add_argument("--yes", action="store_true", help="do not ask")

    cat = _action(actions, "cat", print_one, "print a manifest, one value of it, or rows of a table")
    cat.description = "Print a manifest as JSON, one value of it, or rows of a table. KEY stands right behind RUN."
    cat.add_argument("key", nargs="?", metavar="KEY", help="dotted name of one value: state.normalizer, tables.bank")
    _add_which(cat)
    cat.add_argument("--rows", nargs=3, metavar=("TABLE", "START", "STOP"), help="print these rows: bank 0 10")
    return parser


def _action(actions: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("uri", metavar="RUN", help="folder or URI of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=function)
    return parser


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--attempt", type=int, metavar="A", help="the one of this attempt, where several have the step")


def list_all(options: argparse.Namespace) -> int:
    """Print every checkpoint, what torn saves left, who holds the run, and what goes next."""
    from cluster.inventory import take_stock
    from cluster.pruning import plan_after_next_save, plan_prune
    from cluster.stored_object import CheckpointError
    from instdisc.cli.checkpoint_tables import inventory_document, inventory_text
    from instdisc.runs import existing_run

    run = existing_run(options.uri)
    store, retention = run.checkpoints(), _retention(run)
    inventory = take_stock(store)
    try:
        plan = (plan_after_next_save if inventory.is_held else plan_prune)(store, inventory, retention)
    except CheckpointError as error:
        plan = str(error)
    now = datetime.now(UTC)
    if options.json:
        print(json.dumps(inventory_document(inventory, plan, inventory.is_held, now), indent=1))
    else:
        width = shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns
        print(inventory_text(inventory, plan, inventory.is_held, now, width))
    return 0


def verify_some(options: argparse.Namespace) -> int:
    """Read checkpoints back, telling the progress on standard error, and print what is damaged."""
    from cluster.manifest import describe
    from cluster.stored_object import CheckpointError
    from cluster.verification import verify
    from instdisc.progress import BytesTold, Progress, counted, in_bytes
    from instdisc.runs import existing_run

    if options.all and (options.step is not None or options.attempt is not None):
        raise ValueError("--all: found --step or --attempt beside it, expected one or the other")
    store = existing_run(options.uri).checkpoints()
    started_s = time.monotonic()
    # A running training may delete what was chosen before it is read.
    ids, found = [], []
    for _ in range(_TRIES):
        ids, progress = _chosen(store, options), Progress()
        try:
            what = describe(ids) if len(ids) == 1 else counted(len(ids), "checkpoint")
            found = verify(store, ids, on_progress=BytesTold(progress.update, f"verifying {what}"))
        finally:
            progress.close()
        if found:
            break
    if not found:
        raise CheckpointError(f"{describe(ids)} of {store.uri} was deleted meanwhile: the run went on; try again")
    seconds = round(time.monotonic() - started_s, 2)
    problems = list(dict.fromkeys(problem for verified in found for problem in verified.problems))
    document = {
        "uri": store.uri,
        "checkpoints": [
            {
                "step": verified.id.step,
                "attempt": verified.id.attempt,
                "num_objects": verified.num_objects,
                "num_bytes": verified.num_bytes,
                "problems": list(verified.problems),
            }
            for verified in found
        ],
        "deleted_meanwhile": [list(id) for id in ids if id not in {verified.id for verified in found}],
        "seconds": seconds,
    }
    lines = [*problems[:_NUM_SHOWN], *([f"… and {len(problems) - _NUM_SHOWN} more"] if problems[_NUM_SHOWN:] else [])]
    for verified in found:
        about = f"{counted(verified.num_objects, 'object')}, {in_bytes(verified.num_bytes)}"
        verdict = f"DAMAGED, {counted(len(verified.problems), 'problem')}" if verified.problems else "intact"
        lines.append(f"{describe([verified.id])}: {about}: {verdict}")
    lines.append(f"{store.uri}: {counted(len(found), 'checkpoint')} read ({seconds} s)")
    print(json.dumps(document, indent=1) if options.json else "\n".join(map(printable, lines)))
    return 1 if problems else 0


def _chosen(store: Store, options: argparse.Namespace) -> list[ManifestId]:
    from cluster.attempts import read_history
    from cluster.verification import choose

    history = read_history(store)
    if getattr(options, "all", False) and history.chain:
        return history.chain
    return [choose(history, store.uri, step=options.step, attempt=options.attempt)]


def remove_old(options: argparse.Namespace) -> int:
    """Delete what no rule keeps, after showing it and asking."""
    from cluster.inventory import read_holding, take_stock
    from cluster.pruning import plan_prune, prune, require_metric
    from instdisc.cli.checkpoint_tables import plan_document, plan_text
    from instdisc.progress import Progress
    from instdisc.runs import existing_run

    run = existing_run(options.uri)
    store, retention = run.checkpoints(), _retention(run, options)
    progress, is_done = Progress(), False
    if options.keep_best is not None:
        require_metric(take_stock(store), options.keep_best)
    if options.dry_run:
        plan = plan_prune(store, take_stock(store), retention, damaged=options.damaged)
    else:
        if not options.yes and not sys.stdin.isatty():
            raise ValueError(
                "prune asks before it deletes, and standard input is no terminal: give --yes to delete without a "
                "question, or --dry-run to see what would be deleted"
            )
        holding = read_holding(store)
        if holding and not holding.is_dead:
            text = f"{holding.holder} holds the run since {holding.since}: watching its heartbeat, 35 s at most"
            progress.update({"kind": "message", "text": printable(text)})

        def agree(plan: Plan) -> bool:
            if options.yes:
                return True
            print(plan_text(plan, "will delete"), "Delete? [y/N] ", sep="\n", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip().lower() in ("y", "yes")

        def tell(done: int, total: int) -> None:
            progress.update({"kind": "phase", "text": f"deleting: {done:,} of {total:,}"})

        try:
            plan, is_done = prune(store, retention, damaged=options.damaged, agree=agree, on_progress=tell)
        finally:
            progress.close()
    document = {"uri": store.uri, "done": is_done, "dry_run": options.dry_run, "plan": plan_document(plan)}
    verb = "deleted" if is_done else "would delete"
    text = plan_text(plan, verb) if is_done or options.dry_run or plan.is_empty else "deleted nothing"
    print(json.dumps(document, indent=1) if options.json else printable(f"{store.uri}: ") + text)
    return 0


def print_one(options: argparse.Namespace) -> int:
    """Print a manifest, one value of it, or rows of a table, as JSON."""
    from dataclasses import asdict

    from cluster.manifest import read_manifest
    from instdisc.runs import existing_run

    if options.rows and options.key:
        raise ValueError(f"--rows: found the key {options.key!r} beside it, expected one or the other")
    store = existing_run(options.uri).checkpoints()
    manifest = read_manifest(store, *_chosen(store, options))
    if not options.rows:
        document = asdict(manifest)
        print(json.dumps(value_at(document, options.key) if options.key else document, indent=1))
        return 0
    from cluster.checkpoint_reader import Checkpoint
    from instdisc.cli.checkpoint_tables import rows_text

    table = options.rows[0]
    try:
        start, stop = (int(number) for number in options.rows[1:])
    except ValueError:
        raise ValueError(f"--rows: found {' '.join(options.rows)}, expected a table and two row numbers") from None
    rows = Checkpoint(store, manifest).rows(table, start, stop).tolist()
    about = {"table": table, "step": manifest.step, "attempt": manifest.attempt, "start": start, "stop": stop}
    print(json.dumps({**about, "rows": _finite(rows)}) if options.json else rows_text(start, rows))
    return 0


def value_at(document: Any, key: str) -> Any:
    """Return the value under a dotted key; names that have dots themselves are found, and numbers count in lists.

    ValueError, with the names that there are, where there is none.
    """
    value, rest, done = document, key.split("."), ""
    while rest:
        for taken in range(len(rest), 0, -1):
            name = ".".join(rest[:taken])
            if isinstance(value, dict) and name in value:
                value, rest = value[name], rest[taken:]
                break
            if isinstance(value, list | tuple) and name.isdecimal() and int(name) < len(value):
                value, rest = value[int(name)], rest[taken:]
                break
        else:
            there = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
            names = ", ".join(str(name) for name in there[:_NUM_SHOWN]) or "no more names, it is a value"
            raise ValueError(f"KEY {key}: found no {rest[0]!r} in {done or 'the manifest'}; there: {names}")
        done = f"{done}.{name}" if done else name
    return value


def _retention(run: Run, options: argparse.Namespace | None = None) -> Retention:
    """Return the rules that the run has; each that is asked for replaces the run's."""
    from dataclasses import replace

    from instdisc.config_sections import METRICS
    from instdisc.runs import retention_of

    config = run.config()
    assert config is not None
    if options is None:
        return retention_of(config)
    for name, number in (("--keep-last", options.keep_last), ("--keep-every", options.keep_every)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: found {number}, expected at least 1")
    asked = {"last": options.keep_last, "every_steps": options.keep_every, "best": options.keep_best}
    if options.keep_best is not None:
        asked["lower_is_better"] = METRICS.get(options.keep_best) == "lower"
    return replace(retention_of(config), **{name: value for name, value in asked.items() if value is not None})


def _finite(value: Any) -> Any:
    """Return numbers as JSON has them: those that are not finite as texts."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
