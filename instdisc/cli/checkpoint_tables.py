"""What `instdisc checkpoints` prints of a run: documents for programs, tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from cluster.inventory import Entry, Inventory, State
from cluster.manifest import describe
from cluster.pruning import Plan
from instdisc.cli.output import printable
from instdisc.progress import counted, in_bytes

NARROW = 100
"""Columns of a terminal below which the times of day are left out."""
_NUM_SHOWN = 3


def inventory_document(inventory: Inventory, plan: Plan | str, is_next_save: bool, now: datetime) -> dict[str, Any]:
    """Return everything as one JSON-able document. plan: what goes next, or why nothing does."""
    holding = inventory.holding
    goes = {entry.id for entry in plan.deleted} if isinstance(plan, Plan) else set()
    return {
        "uri": inventory.uri,
        "num_bytes": sum(inventory.sizes.values()),
        "num_objects": len(inventory.sizes),
        "attempt": inventory.attempt,
        "problem": inventory.problem or None,
        "held": {
            "process": holding.holder.pid,
            "host": holding.holder.host,
            "since": holding.since,
            "renewed": holding.renewed,
            "is_dead": holding.is_dead,
        }
        if holding
        else None,
        "checkpoints": [{**entry_document(entry, now), "goes": entry.id in goes} for entry in inventory.entries],
        "remains": [
            {
                "attempt": remains.attempt,
                "step": remains.step,
                "save": remains.save,
                "num_objects": remains.num_objects,
                "num_bytes": remains.num_bytes,
                "may_be_written_now": remains.is_open,
            }
            for remains in inventory.remains
        ],
        "strays": list(inventory.strays),
        "next_removal": {
            "by": "the next save" if is_next_save else "prune",
            **(plan_document(plan) if isinstance(plan, Plan) else {"refused": plan}),
        },
    }


def entry_document(entry: Entry, now: datetime) -> dict[str, Any]:
    """Return one checkpoint as a JSON-able document."""
    manifest = entry.manifest
    created = _time_of(entry)
    base = entry.base
    return {
        "step": entry.id.step,
        "attempt": entry.id.attempt,
        "state": str(entry.state),
        "problem": entry.problem or None,
        "created": manifest.created if manifest else None,
        "age_s": round((now - created).total_seconds()) if created else None,
        "own_bytes": entry.own_bytes if manifest else None,
        "num_bytes": entry.num_bytes if manifest else None,
        "num_objects": len(manifest.objects()) if manifest else None,
        "num_increments": entry.num_increments if manifest else None,
        "base": {"step": base.step, "attempt": base.attempt} if base else None,
        "metrics": dict(manifest.metrics) if manifest else {},
        "versions": dict(manifest.versions) if manifest else {},
    }


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return what goes and what stays as a JSON-able document."""
    return {
        "num_bytes": plan.num_bytes,
        "num_objects": plan.num_objects,
        "deleted": [{"step": entry.id.step, "attempt": entry.id.attempt} for entry in plan.deleted],
        "kept": [{"step": entry.id.step, "attempt": entry.id.attempt} for entry in plan.kept],
        "problems": list(plan.problems),
    }


def inventory_text(inventory: Inventory, plan: Plan | str, is_next_save: bool, now: datetime, width: int) -> str:
    """Return everything for people, the table cut to a terminal of `width` columns. plan: as `inventory_document`."""
    num, total = len(inventory.entries), in_bytes(sum(inventory.sizes.values()))
    lines = [f"{inventory.uri}: {counted(num, 'checkpoint')}, {total} in {counted(len(inventory.sizes), 'object')}"]
    lines += [_holding_line(inventory)]
    if inventory.entries:
        lines += ["", *_table(inventory, plan, now, width), ""]
    lines += _problem_lines(inventory)
    for remains in inventory.remains:
        what = "being written, or left by a torn save" if remains.is_open else "left by a torn save"
        lines.append(
            f"without a manifest: {in_bytes(remains.num_bytes)} in {counted(remains.num_objects, 'object')} of step "
            f"{remains.step:,} (attempt {remains.attempt}), {what}"
        )
    if inventory.strays:
        shown = ", ".join(inventory.strays[:_NUM_SHOWN])
        more = f" and {len(inventory.strays) - _NUM_SHOWN} more" if len(inventory.strays) > _NUM_SHOWN else ""
        lines.append(f"not ours: {shown}{more}")
    lines += _version_lines(inventory)
    who = "the next save" if is_next_save else "`instdisc checkpoints prune`"
    if isinstance(plan, Plan):
        lines.append(f"{who} would delete {deletions(plan)}")
    elif plan:
        lines.append(f"{who} would delete nothing: {plan}")
    return "\n".join(map(printable, lines))


def plan_text(plan: Plan, verb: str) -> str:
    """Return what goes and what stays for people. verb: "would delete", "deleted"."""
    lines = [f"{verb} {deletions(plan)}"]
    if plan.deleted:
        lines.append(f"  of {describe_range(plan.deleted)}")
    lines.append(f"  kept: {describe_range(plan.kept) if plan.kept else 'none'}")
    lines += [f"  {problem}" for problem in plan.problems]
    return "\n".join(map(printable, lines))


def deletions(plan: Plan) -> str:
    """Return in words what a plan deletes."""
    if plan.is_empty:
        return "nothing"
    states = [entry.state for entry in plan.deleted]
    orphans = states.count(State.ORPHAN)
    of_these = f" ({counted(orphans, 'orphan')} among them)" if orphans else ""
    return (
        f"{counted(len(states), 'checkpoint')}{of_these} and {counted(plan.num_objects, 'object')}: "
        f"{in_bytes(plan.num_bytes)}"
    )


def describe_range(entries: Sequence[Entry]) -> str:
    """Return which checkpoints, in words: all of a few, the oldest and newest of many."""
    ids = [entry.id for entry in entries]
    if len(ids) <= 2 * _NUM_SHOWN:
        return describe(ids)
    return f"{len(ids)} from {describe(ids[:1])} to {describe(ids[-1:])}"


def rows_text(start: int, rows: Iterable[Any]) -> str:
    """Return rows of a table, one a line, behind their numbers."""
    lines = []
    for number, row in enumerate(rows, start):
        values = row if isinstance(row, list) else [row]
        lines.append(f"{number}  " + " ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    return "\n".join(lines)


def _holding_line(inventory: Inventory) -> str:
    holding = inventory.holding
    if holding is None:
        return "nobody trains the run"
    if holding.is_dead:
        return f"{holding.holder} trained the run since {holding.since} and died; last heartbeat {holding.renewed}"
    return f"held by {holding.holder} since {holding.since}; last heartbeat {holding.renewed}"


def _table(inventory: Inventory, plan: Plan | str, now: datetime, width: int) -> list[str]:
    goes = {entry.id for entry in plan.deleted} if isinstance(plan, Plan) else set()
    header = ["step", "attempt", "age", "saved (UTC)", "new", "in all", "increments", "state", "next"]
    rows = [header]
    for entry in inventory.entries:
        created = _time_of(entry)
        rows.append(
            [
                f"{entry.id.step:,}",
                str(entry.id.attempt),
                age(None if created is None else (now - created).total_seconds()),
                f"{created:%Y-%m-%d %H:%M}" if created else "?",
                in_bytes(entry.own_bytes) if entry.manifest else "?",
                in_bytes(entry.num_bytes) if entry.manifest else "?",
                _increments(entry, with_words=width >= NARROW),
                str(entry.state),
                "goes" if entry.id in goes else "stays",
            ]
        )
    left_out = {"saved (UTC)"} if width < NARROW else set()
    columns = [place for place, name in enumerate(header) if name not in left_out]
    widths = [max(len(row[place]) for row in rows) for place in columns]
    lines = []
    for row in rows:
        cells = [
            row[place].ljust(size) if header[place] in ("increments", "state", "next") else row[place].rjust(size)
            for place, size in zip(columns, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _increments(entry: Entry, *, with_words: bool) -> str:
    if entry.manifest is None:
        return "?"
    if entry.base is None:
        return "-"
    word = "attempt " if with_words else ""
    other = f" ({word}{entry.base.attempt})" if entry.base.attempt != entry.id.attempt else ""
    return f"{entry.num_increments} on {entry.base.step:,}{other}"


def _problem_lines(inventory: Inventory) -> list[str]:
    lines = [f"problem: {inventory.problem}"] if inventory.problem else []
    for entry in inventory.entries:
        if entry.problem:
            lines.append(f"problem: {describe([entry.id])}: {entry.problem}")
        elif entry.state is State.DAMAGED:
            lines.append(
                f"problem: {describe([entry.id])}: a restore found it damaged, and it is kept for inspection "
                f"(instdisc checkpoints verify RUN --step {entry.id.step} --attempt {entry.id.attempt})"
            )
    return lines


def _version_lines(inventory: Inventory) -> list[str]:
    groups: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
    for entry in inventory.entries:
        if entry.manifest:
            groups.setdefault(tuple(sorted(entry.manifest.versions.items())), []).append(entry)
    lines = []
    for versions, entries in groups.items():
        which = f" ({describe_range(entries)})" if len(groups) > 1 else ""
        lines.append(f"written with{which}: " + ", ".join(f"{name} {version}" for name, version in versions))
    return lines


def age(seconds: float | None) -> str:
    """Return how long ago something was, in one unit."""
    if seconds is None:
        return "?"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _time_of(entry: Entry) -> datetime | None:
    if entry.manifest is None:
        return None
    try:
        created = datetime.fromisoformat(entry.manifest.created)
    except (TypeError, ValueError):
        return None
    return created.astimezone(UTC) if created.tzinfo else created.replace(tzinfo=UTC)
