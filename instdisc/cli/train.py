"""`instdisc train`: start a run, or go on with it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from typing import Any

from cluster.credentials import without_credentials
from instdisc.cli.overrides import parse_overrides
from instdisc.command_line import command_line, tensorboard_command
from instdisc.config import TrainConfig
from instdisc.config_effects import refuse_idle
from instdisc.launch import LAUNCHERS, fit
from instdisc.overrides import field_names
from instdisc.recipes import RECIPES, made_from
from instdisc.runs import NEIGHBOURS, Run, RunResult

DEFAULT_WORKERS = 2


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "train",
        help="train a recipe; the same command goes on where it stopped",
        description=_wrapped(
            "Train a recipe. The same command, with the same --run, goes on where it stopped. Ctrl-C, SIGTERM and "
            "SIGHUP save a checkpoint and end; SIGUSR1 saves one and goes on; a second Ctrl-C ends at once."
        ),
        epilog=_wrapped(f"recipes: {', '.join(RECIPES)}")
        + "\n\nfields for --SECTION.FIELD VALUE:\n  "
        + "\n  ".join(_fields()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", help="what to train (default: quickstart)")
    parser.add_argument("--run", metavar="URI", dest="uri", help="folder or URI of the run (default: runs/RECIPE)")
    parser.add_argument(
        "--workers",
        metavar="W|MIN..MAX",
        help="DDP workers; 0 trains in this process; 2..16: as many as the cluster has room for (default: 2, or 1 "
        "where BatchNorm is taken over the whole batch)",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="ray", help="what runs the workers (default: ray)")
    parser.add_argument("--address", help="address of a Ray cluster (default: a Ray of our own on this machine)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.set_defaults(run=run, takes_overrides=True)
    return parser


def run(options: argparse.Namespace) -> int:
    """Train, telling what happens on standard error, and the result on standard output."""
    from cluster.this_machine import visible_gpus
    from instdisc.progress import Progress

    overrides = parse_overrides(options.overrides)
    config = made_from(options.recipe, overrides)
    uri = options.uri or f"runs/{options.recipe}"
    already, stored = Run(uri).result(), Run(uri).config()
    if stored is None:
        refuse_idle(config, overrides)  # a run that was begun with such an option goes on
    is_elsewhere = options.address is not None or "RAY_ADDRESS" in os.environ
    progress, notes, told = Progress(), [], []

    def on_event(event: dict[str, Any]) -> None:
        # Workers that start anew tell it again.
        if "note" in event and event["note"] not in notes:
            notes.append(event["note"])
        if event["kind"] == "message" and (text := without_credentials(event["text"])) not in told:
            told.append(text)
        progress.update(event)

    try:
        result = fit(
            config,
            run=uri,
            workers=options.workers or default_workers(stored or config, 0 if is_elsewhere else visible_gpus()),
            launcher=options.launcher,
            address=options.address,
            on_event=on_event,
        )
    finally:
        progress.close()
    if options.json:
        document = {"uri": uri, "step": result.step, "finished": result.finished, "metrics": result.metrics}
        document["summary"] = result.summary
        print(json.dumps({**document, "notes": notes, "told": told}))
    elif result.finished:
        print(summary(result, uri, was_finished=already is not None))
    else:
        saved = "a checkpoint is saved" if result.step else "there is nothing to save yet"
        print(f"Stopped at step {result.step:,} of {result.num_steps:,}; {saved}. Go on with:")
        print(f"  {command_line(*sys.argv[1:])}")
    return 0 if result.finished else 130


def default_workers(config: TrainConfig, num_gpus: int = 0) -> str:
    """Return how many workers train where nobody says: two, or one where a batch is one normalisation group.

    num_gpus: of the machine that trains, where that is known: with fewer than that, all would train on the CPU.
    """
    size = config.optim.norm_group
    most = DEFAULT_WORKERS if size is None or size < config.optim.global_batch else 1
    return str(min(most, num_gpus or most))


def summary(result: RunResult, uri: str, *, was_finished: bool) -> str:
    """Return what a finished run came to, and what to do next, as text."""
    head = "This run is finished" if was_finished else "Finished"
    lines = [f"{head}: {result.step:,} steps, run {uri}", *metric_lines(result)]
    folder = Run(uri).folder
    if folder is not None and (folder / NEIGHBOURS).exists():
        lines.append(f"  {'picture':<24}  {folder / NEIGHBOURS}")
    lines += [
        "Next:",
        f"  {command_line('show', uri)}",
        f"  {tensorboard_command(uri)}",
        f"  {command_line('embed', uri, '--out', 'features.npy')}",
        "  instdisc train cifar10-cpu      # real images (fetches CIFAR-10), minutes on a laptop",
    ]
    return "\n".join(lines)


def metric_lines(result: RunResult) -> list[str]:
    """Return a line of text for each kNN accuracy that the run ended with."""
    names = {
        "knn_raw_pixels_top1": "kNN on raw pixels",
        "knn_top1": "kNN, images re-encoded",
        "knn_bank_top1": "kNN, memory bank",
    }
    lines = []
    for name, title in names.items():
        points = result.metrics.get(name)
        if not points:
            continue
        before = f"  (untrained encoder: {points[0][1]:.1f} %)" if name == "knn_top1" and points[0][0] == 0 else ""
        lines.append(f"  {title:<24}{points[-1][1]:6.1f} %{before}")
    return lines


def _wrapped(text: str) -> str:
    """Return a paragraph as argparse wraps it; it leaves alone the texts of a parser that lists fields line by line."""
    return textwrap.fill(text, max(20, shutil.get_terminal_size().columns - 2), break_on_hyphens=False)


def _fields() -> list[str]:
    return [name for name in field_names(TrainConfig) if name != "recipe"]
