"""`instdisc embed`: features of images by a run's encoder, as a NumPy file."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from instdisc.cli.output import output_file, printable


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("embed", help="write the features of images as a NumPy file")
    parser.add_argument("uri", metavar="RUN", help="folder or URI of the run")
    parser.add_argument("source", metavar="SRC", nargs="?", help="images to embed (default: the run's own)")
    parser.add_argument("--split", default="train", help="split of the images, any name (default: train)")
    parser.add_argument("--config", help="configuration, where SRC holds several data sets")
    parser.add_argument("--out", default="features.npy", help="file to write (default: features.npy)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Embed the images and write float32 (N, D); row numbers are those of `instdisc index`.

    Rows of images that cannot be used are zeros, and named in a file beside it.
    """
    import numpy as np

    from instdisc.bad_images import BadImage, to_jsonl
    from instdisc.config_sections import DataConfig
    from instdisc.embedding import embed_here, left_out_text
    from instdisc.images import open_images
    from instdisc.loading import load_encoder
    from instdisc.progress import Progress
    from instdisc.runs import existing_run
    from instdisc.train.image_sets import open_images_of

    out = output_file(options.out)
    encoder = load_encoder(options.uri, device="auto")
    data = encoder.config.data
    if options.source:
        data = DataConfig(root=options.source, config=options.config, **asdict(data.pixel_rules))
        dataset = open_images(data, options.split)
    else:
        rows = data.max_rows if options.split == data.train_split else data.max_test_rows
        dataset = open_images_of(existing_run(options.uri), data, options.split, rows)
    started_s = time.monotonic()
    progress = Progress()
    try:
        embedded = embed_here(encoder, dataset, progress.update)
    finally:
        progress.close()
    features_ND, damaged = embedded.features_RD.cpu().numpy(), embedded.damaged
    with open(out, "wb") as file:
        np.save(file, features_ND, allow_pickle=False)
    list_of_damaged = out.with_name(f"{out.name}.damaged.jsonl")
    if damaged:
        list_of_damaged.write_bytes(to_jsonl(BadImage(bad.row, bad.name, bad.reason, None) for bad in damaged))
    else:
        list_of_damaged.unlink(missing_ok=True)  # of an earlier run of the command
    document = {
        "out": str(out),
        "num_damaged": len(damaged),
        "damaged": [asdict(bad) for bad in damaged],
        "damaged_list": str(list_of_damaged) if damaged else None,
        "num_rows": len(features_ND),
        "dim": features_ND.shape[1],
        "source": dataset.index.source,
        "digest": dataset.index.digest,
        "notes": [note.to_plain() for note in dataset.index.notes],
        "seconds": round(time.monotonic() - started_s, 2),
    }
    text = f"{out}: {len(features_ND):,} features of {features_ND.shape[1]} numbers, {document['seconds']} s"
    if damaged:
        told = left_out_text(damaged, len(features_ND), "images", "have rows of zeros")
        text += f"\n{printable(told)}; {list_of_damaged} names them all"
    print(json.dumps(document) if options.json else text)
    return 0
