"""`instdisc doctor`: what this machine has for training, and what is missing."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("doctor", help="tell what was found: GPU, DALI, Ray, threads, S3, versions")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the findings."""
    from instdisc.doctor import as_document, as_table, findings

    found = findings()
    print(json.dumps(as_document(found), indent=1) if options.json else as_table(found))
    return 0
