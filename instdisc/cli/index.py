"""`instdisc index`: look at a data set once, and say what is in it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from dataloading.notes import LABELS
from instdisc.cli.output import output_file, printable
from instdisc.config_sections import SOURCE_KINDS

_BY = {"headers": "with damaged headers", "pixels": "damaged", "packing": "damaged when they were packed"}
_HEADERS_ONLY = "  only the headers were read: training finds what is damaged behind them, `instdisc pack` finds it now"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("index", help="list the images of a data set, with what is wrong with any")
    parser.add_argument(
        "source", metavar="SRC", help="folder or URI of images, packed images, tars, CIFAR or parquet files"
    )
    parser.add_argument("--kind", choices=SOURCE_KINDS, default="auto", help="what SRC holds (default: auto)")
    parser.add_argument("--split", default="train", help="split to look at, any name or path (default: train)")
    parser.add_argument("--config", help="configuration, where SRC holds several data sets")
    parser.add_argument("--out", metavar="FILE", help="write the index as a parquet file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Open the data set and print its index."""
    from dataclasses import asdict

    from instdisc.config_sections import DataConfig
    from instdisc.images import open_images

    started_s = time.monotonic()
    out = output_file(options.out) if options.out else None
    data = DataConfig(kind=options.kind, root=options.source, config=options.config)
    dataset = open_images(data, options.split, as_packed=True)
    index = dataset.index
    if out:
        index.save(out)
    document = {
        "source": index.source,
        "num_rows": index.num_rows,
        "num_bad": int(index.bad_N.sum()),
        "bad_by": dataset.looked_at,
        "bad": {index.names[row]: reason for row, reason in index.reasons.items()},
        "classes": list(index.class_names) if index.labels_N is not None else None,
        "notes": [note.to_plain() for note in index.notes],
        "digest": index.digest,
        "pixels": asdict(index.rules),
        "seconds": round(time.monotonic() - started_s, 2),
    }
    print(json.dumps(document, indent=1) if options.json else _as_text(document, options.out))
    return 0


def _as_text(document: dict[str, Any], out: str | None) -> str:
    from dataloading.headers import TOO_LARGE

    classes = document["classes"]
    large = sum(reason.startswith(TOO_LARGE) for reason in document["bad"].values())
    bad = f"{document['num_bad'] - large} {_BY[document['bad_by']]}" + (f", {large} too large" if large else "")
    # Why there are no labels belongs to the one line that says so.
    why = [note["text"] for note in document["notes"] if note["kind"] == LABELS and not classes]
    known = f"{len(classes)} classes" if classes else printable("; ".join(why)) or "no labels"
    lines = [
        f"{document['source']}: {document['num_rows']:,} images, {bad}, {known} ({document['seconds']} s)",
        f"  digest {document['digest']}",
    ]
    lines += [f"  {printable(note['text'])}" for note in document["notes"] if note["text"] not in why]
    lines += [_HEADERS_ONLY] if document["bad_by"] == "headers" else []
    lines += [
        f"  {'' if reason.startswith(TOO_LARGE) else 'damaged: '}{printable(name)}: {printable(reason)}"
        for name, reason in list(document["bad"].items())[:20]
    ]
    if len(document["bad"]) > 20:
        lines.append(f"  … and {len(document['bad']) - 20} more (--json lists all)")
    if out:
        lines.append(f"  written to {out}")
    return "\n".join(lines)
