"""`instdisc doctor`: what this machine has for training, and what is missing; or what is wrong in a cluster's file."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("doctor", help="tell what was found: GPU, DALI, Ray, ports, threads, S3, versions")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="check a cluster's file instead, such as ray_config.yaml or cluster/kuberay.yaml: every key and value",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the findings; a mistake in the file raises ConfigProblems, a ValueError."""
    if options.config:
        from cluster.cluster_file import check_cluster_file

        kind = check_cluster_file(options.config)
        document = {"file": options.config, "kind": kind, "problems": []}
        print(json.dumps(document, indent=1) if options.json else f"{options.config}: {kind}, nothing wrong found")
        return 0
    from instdisc.doctor import findings
    from instdisc.findings import as_document, as_table

    found = findings()
    print(json.dumps(as_document(found), indent=1) if options.json else as_table(found))
    return 0
