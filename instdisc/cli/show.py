"""`instdisc show`: what a run is and how far it came, from its folder alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from instdisc.config import TrainConfig, rules_kept
from instdisc.runs import NEIGHBOURS, Run, existing_run, read_curves
from instdisc.start_advice import keeps
from instdisc.status import train_command


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("show", help="tell what a run is and how far it came")
    parser.add_argument("uri", metavar="RUN", help="folder or URI of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the run's state."""
    document = describe(existing_run(options.uri))
    print(json.dumps(document, indent=1) if options.json else as_text(document))
    return 0


def describe(run: Run) -> dict[str, Any]:
    """Return the run's state as one JSON-able document."""
    from cluster.checkpoint import read_latest

    config, result = run.config(), run.result()
    assert config is not None
    checkpoint = read_latest(run.checkpoints())
    curves = result.metrics if result else read_curves(checkpoint.state["curves"]) if checkpoint else {}
    return {
        "uri": run.uri,
        "recipe": config.recipe,
        "finished": result is not None,
        "step": result.step if result else checkpoint.step if checkpoint else 0,
        "attempt": checkpoint.attempt if checkpoint else None,
        "metrics": curves,
        "summary": result.summary if result else {},
        "command": train_command(config, run.uri),
        "picture": f"{run.uri.rstrip('/')}/{NEIGHBOURS}" if run.store.exists(NEIGHBOURS) else None,
        "rules_kept": rules_kept(config),
        "config": json.loads(config.to_json()),
    }


def as_text(document: dict[str, Any]) -> str:
    """Return the document for people."""
    state = "finished" if document["finished"] else "not finished"
    lines = [f"{document['uri']}: recipe {document['recipe']}, {state}, step {document['step']:,}"]
    if document["attempt"] is not None:
        lines.append(f"  newest checkpoint: attempt {document['attempt']}")
    for name, points in document["metrics"].items():
        lines.append(f"  {name}: " + "  ".join(f"{step:,}: {value:.1f}" for step, value in points[-8:]))
    config = document["config"]
    objective, optim = config["objective"], config["optim"]
    epochs = "1 epoch" if optim["epochs"] == 1 else f"{optim['epochs']:g} epochs"
    lines.append(
        f"  {config['model']['architecture']}, {objective['name']} τ={objective['temperature']}, global batch "
        f"{optim['global_batch']} in groups of {optim['norm_group']}, {epochs}, lr {optim['lr']}"
    )
    kept = keeps(TrainConfig.from_json(json.dumps(config)))
    if kept:
        lines.append(f"  {kept}")
    if document["picture"]:
        lines.append(f"  picture: {document['picture']}")
    if not document["finished"]:
        command = document["command"] or f"instdisc.fit(config, run={document['uri']!r})"
        lines.append(f"  go on with: {command}")
    return "\n".join(lines)
