"""`instdisc pack`: pack images of any source into tar shards with a manifest."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from dataloading.choices import DEEP_SAMPLES, ORIENTATIONS
from instdisc.cli.output import printable
from instdisc.command_line import command_line
from instdisc.config_sections import SOURCE_KINDS


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "pack",
        help="pack images into tar shards, every image decoded once",
        description="Pack the images of SRC into tar shards and a manifest below DST. Every image is decoded in full; "
        "damaged ones are listed with the reason. A command that was interrupted goes on when it is given again.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="folder or URI of images, WebDataset tars, CIFAR or parquet files"
    )
    parser.add_argument("target", metavar="DST", help="folder or URI to pack into")
    parser.add_argument("--kind", choices=SOURCE_KINDS, default="auto", help="what SRC holds (default: auto)")
    parser.add_argument("--split", default="all", help="split to pack, any name (default: train and test)")
    parser.add_argument("--config", help="configuration, where SRC holds several data sets")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="size of a shard in 10^6 bytes (default: 64)")
    parser.add_argument("--keep-bad", action="store_true", help="pack damaged images too, marked as damaged")
    parser.add_argument(
        "--no-shuffle",
        action="store_true",
        help="shards hold the images in the order of the source (always so for tars and parquet files)",
    )
    parser.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        default=ORIENTATIONS[0],
        help="which images are turned as EXIF says: all, or TIFF files only, as runs of older versions have it",
    )
    parser.add_argument(
        "--deep-samples",
        choices=DEEP_SAMPLES,
        default=DEEP_SAMPLES[0],
        help="samples of more than 8 bits: scaled by their range, or clipped, as runs of older versions have it",
    )
    parser.add_argument("--workers", type=int, help="processes; 0: this one (default: one for each usable core)")
    parser.add_argument(
        "--address", help='pack on the Ray cluster at host:port, or "auto"; DST must be reachable there'
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Pack, telling the progress on standard error, and print what was packed."""
    from cluster.store import Store
    from dataloading.index import DatasetError, NoSplit
    from dataloading.layout import SPLITS, Part
    from dataloading.pack import pack
    from dataloading.pixel_rules import PixelRules
    from dataloading.sources import list_images
    from instdisc.images import storage_of
    from instdisc.launch import absolute
    from instdisc.progress import ImagesTold, Progress

    parallel = _parallel_map(options)
    source, target = (absolute(place) for place in (options.source, options.target))
    if _lies_in(target, source):
        raise DatasetError(f"DST {target} lies in SRC {source}: shards would become images; choose another place")
    started_s, documents, missing = time.monotonic(), [], None
    for split in SPLITS if options.split == "all" else (options.split,):
        try:
            images = list_images(options.kind, source, split, config=options.config, storage=storage_of())
        except NoSplit as error:
            missing = missing or error
            continue
        in_order = options.no_shuffle or images.index.source.startswith(("webdataset", "parquet"))
        progress = Progress()
        try:
            packed = pack(
                images,
                Store(target),
                Part(split).folder,
                parallel=parallel,
                shard_mb=options.shard_mb,
                shuffle=not in_order,
                keep_bad=options.keep_bad,
                rules=PixelRules(options.orientation, options.deep_samples),
                on_progress=ImagesTold(progress.update, f"packing {split}", "packed"),
            )
        finally:
            progress.close()
        documents.append(
            {
                "split": split,
                "source": images.index.source,
                "notes": [note.to_plain() for note in images.index.notes],
                "num_rows": packed.num_rows,
                "num_shards": packed.num_shards,
                "num_bytes": packed.num_bytes,
                "digest": packed.digest,
                "was_packed": packed.was_packed,
                "num_bad": len(packed.damaged),
                "bad": packed.damaged,
            }
        )
    if missing is not None and not documents:
        raise missing
    document = {"target": target, "splits": documents, "seconds": round(time.monotonic() - started_s, 2)}
    print(json.dumps(document, indent=1) if options.json else _as_text(document, options.keep_bad))
    return 0


def _lies_in(target: str, source: str) -> bool:
    """Whether DST is SRC or below it, links followed."""
    from dataloading.storage import is_remote, local_path

    if is_remote(source) or is_remote(target):
        return target == source or target.startswith(source.rstrip("/") + "/")
    return Path(local_path(target)).resolve().is_relative_to(Path(local_path(source)).resolve())


def _parallel_map(options: argparse.Namespace) -> Any:
    if options.address:
        from cluster.ray_map import RayMap

        return RayMap(options.address)
    from cluster.parallel import ProcessMap

    return ProcessMap(len(os.sched_getaffinity(0)) if options.workers is None else options.workers)


def _as_text(document: dict[str, Any], keep_bad: bool) -> str:
    from instdisc.progress import counted

    lines = []
    for part in document["splits"]:
        before = ", as it was" if part["was_packed"] else ""
        lines.append(
            f"{part['split']}: {part['num_rows']:,} images in {counted(part['num_shards'], 'shard')}, "
            f"{part['num_bytes'] / 1e6:,.1f} MB{before}; {part['num_bad']:,} damaged "
            f"{'and marked' if keep_bad else 'and left out'}"
        )
        lines.append(f"  digest {part['digest']}")
        lines += [f"  {printable(note['text'])}" for note in part["notes"]]
        lines += [
            f"  damaged: {printable(name)}: {printable(reason)}" for name, reason in list(part["bad"].items())[:10]
        ]
        if part["num_bad"] > 10:
            lines.append(f"  … and {part['num_bad'] - 10:,} more in {part['split']}/damaged.jsonl")
    lines += [
        f"Packed in {document['target']} ({document['seconds']} s). Next:",
        f"  {command_line('verify', document['target'])}",
        f"  {command_line('train', 'RECIPE', '--data.root', document['target'])}",
    ]
    return "\n".join(lines)
