"""`instdisc verify`: check packed images against their manifest."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from typing import Any

from instdisc.cli.output import printable
from instdisc.command_line import command_line

_NUM_SHOWN = 20


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "verify",
        help="check packed images against their checksums",
        description="Read all shards below DST, compare them and their images with the manifest's checksums, and "
        "decode every image. The exit code is 1 where anything is wrong.",
    )
    parser.add_argument("target", metavar="DST", help="folder or URI of packed images")
    parser.add_argument("--split", default="all", help="split to check (default: train and test)")
    parser.add_argument("--workers", type=int, help="processes; 0: this one (default: one for each usable core)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Check, telling the progress on standard error, and print what is wrong."""
    from cluster.parallel import ProcessMap
    from dataloading.index import DatasetError, NoSplit
    from dataloading.layout import SPLITS
    from dataloading.packed import open_manifest
    from dataloading.shards import MANIFEST
    from dataloading.verify import verify
    from instdisc.images import storage_of
    from instdisc.launch import absolute
    from instdisc.progress import ImagesTold, Progress

    parallel = ProcessMap(len(os.sched_getaffinity(0)) if options.workers is None else options.workers)
    started_s, num_images, problems, opened = time.monotonic(), 0, {}, {}
    target = absolute(options.target)
    storage = replace(storage_of(), cache=None)  # what is asked about is the place itself, and no copy of it here
    for split in SPLITS if options.split == "all" else (options.split,):
        try:
            opened[split] = open_manifest(target, split, storage)
        except NoSplit:
            if options.split != "all":
                raise
    if not opened:
        raise DatasetError(
            f"no packed images in {target}: found neither {' nor '.join(f'{split}/{MANIFEST}' for split in SPLITS)}; "
            f"correct the path or URI, or pack images there ({command_line('pack', 'SRC', target)})"
        )
    for split, (manifest, source) in opened.items():
        progress = Progress()
        try:
            problems[split] = list(verify(manifest, source, parallel, ImagesTold(progress.update, f"checking {split}")))
        finally:
            progress.close()
        num_images += manifest.index.num_rows
    seconds = round(time.monotonic() - started_s, 2)
    document = {"target": options.target, "num_rows": num_images, "problems": problems, "seconds": seconds}
    found = [printable(f"{split}/{problem}") for split, lines in problems.items() for problem in lines]
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        shown = [*found[:_NUM_SHOWN], *([f"… and {len(found) - _NUM_SHOWN} more"] if len(found) > _NUM_SHOWN else [])]
        verdict = f"{len(found)} problems" if found else "nothing wrong"
        print("\n".join([*shown, f"{options.target}: {num_images:,} images checked, {verdict} ({seconds} s)"]))
    return 1 if found else 0
