"""`instdisc bench NAME`: measure a part of the system against its alternative, both in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from instdisc.cli.overrides import parse_overrides
from instdisc.config_method import BANK_DTYPES, OBJECTIVES, ObjectiveConfig

CHECKPOINT_PARTS = ("throughput", "steps", "memory")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("bench", help="measure a part of the system against its alternative in the same run")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_step(benchmarks)
    _add_loader(benchmarks)
    _add_bank(benchmarks)
    _add_checkpoint(benchmarks)
    parser.set_defaults(run=run, takes_overrides=True)
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure, telling what happens on standard error, and print the results on standard output."""
    document = options.measure(options)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        from instdisc.benchmark.document import as_text

        print(as_text(document))
    return 0


def _add_step(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "step",
        help="our training step against a plain PyTorch loop over a dense bank",
        description="Our training step against a plain PyTorch loop over a dense bank, in this process. Takes minutes. "
        "--SECTION.FIELD VALUE changes the recipe; images are made up unless --data.root or --data.kind is given.",
    )
    parser.add_argument("--recipe", default="cifar10-cpu", help="network, batch and bank (default: cifar10-cpu)")
    parser.add_argument("--objective", choices=OBJECTIVES, help="objective (default: the recipe's)")
    parser.add_argument("--trials", type=int, default=7, help="timed trials of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a trial (default: 10)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (default: all usable cores)")
    parser.add_argument(
        "--sweep",
        choices=("full", "short"),
        default="full",
        help="settings of the alternative; short leaves out torch.compile and data workers (default: full)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(measure=_measure_step)


def _measure_step(options: argparse.Namespace) -> dict[str, Any]:
    from instdisc.benchmark.step import StepBenchmark, bench_step
    from instdisc.recipes import recipe

    overrides: dict[str, Any] = parse_overrides(options.overrides)
    if options.objective:
        overrides["objective.name"] = options.objective
    benchmark = StepBenchmark(
        config=recipe(options.recipe, **overrides),
        use_own_images=bool({"data.root", "data.kind"} & set(overrides)),
        trials=options.trials,
        steps=options.steps,
        threads=options.threads,
        full_sweep=options.sweep == "full",
    )
    return bench_step(benchmark, lambda line: print(line, file=sys.stderr, flush=True))


def _add_loader(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "loader",
        help="our image path against a torchvision DataLoader, DALI's random crops and decoding alone",
        description="Our image path against a torchvision DataLoader at its best setting, against DALI's own random "
        "crops, and against decoding alone, in this process. Takes minutes. --data.FIELD VALUE changes the source.",
    )
    parser.add_argument("--source", metavar="SRC", help="folder or URI of images (default: 512 made-up photographs)")
    parser.add_argument("--trials", type=int, default=7, help="timed trials of each side (default: 7)")
    parser.add_argument("--batches", type=int, default=16, help="batches of a trial (default: 16)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop in pixels (default: 224)")
    parser.add_argument("--threads", type=int, help="CPU threads of every side (default: all usable cores)")
    parser.add_argument(
        "--sweep",
        choices=("full", "short"),
        default="full",
        help="workers of the DataLoader: 0 to 3, or as many as threads (default: full)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(measure=_measure_loader)


def _measure_loader(options: argparse.Namespace) -> dict[str, Any]:
    from instdisc.benchmark.loader import LoaderBenchmark, bench_loader
    from instdisc.config import TrainConfig

    overrides: dict[str, Any] = parse_overrides(options.overrides)
    if options.source:
        overrides["data.root"] = options.source
    benchmark = LoaderBenchmark(
        data=TrainConfig().with_overrides(overrides).data,
        trials=options.trials,
        batches=options.batches,
        batch=options.batch,
        size=options.size,
        threads=options.threads,
        full_sweep=options.sweep == "full",
    )
    return bench_loader(benchmark, lambda line: print(line, file=sys.stderr, flush=True))


def _add_bank(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "bank",
        help="the memory bank and its objectives against a dense bank, and whether their cost depends on N",
        description="What a training step asks of the memory bank (fetch, score, loss, gradient, update) against a "
        "dense bank with per-sample gather, in this process; the exact softmax against its two matrix products; peak "
        "memory; with --table, banks of several sizes; with --workers, several workers and what they send. Minutes.",
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="nce", help="objective (default: nce)")
    parser.add_argument("--per-sample", action="store_true", help="negatives of each sample's own, as in released code")
    parser.add_argument("--rows", type=int, default=1_281_167, metavar="N", help="rows (default: 1,281,167)")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="numbers of a row (default: 128)")
    parser.add_argument("--negatives", type=int, default=4096, metavar="K", help="negatives (default: 4,096)")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="samples of all workers (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.07, help="temperature (default: 0.07)")
    parser.add_argument("--dtype", choices=BANK_DTYPES, default="float32", help="storage of our rows")
    parser.add_argument("--score-mib", type=int, default=256, help="most MiB of softmax scores (default: 256)")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="measure so many workers of this machine")
    parser.add_argument(
        "--table", type=int, nargs="*", default=[], metavar="N", help="rows of float16 banks to compare"
    )
    parser.add_argument("--trials", type=int, default=7, help="timed trials of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a trial (default: 10)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (default: all usable cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(measure=_measure_bank)


def _measure_bank(options: argparse.Namespace) -> dict[str, Any]:
    from instdisc.benchmark.bank import BankBenchmark, bench_bank

    benchmark = BankBenchmark(
        objective=ObjectiveConfig(
            name=options.objective,
            temperature=options.temperature,
            num_negatives=options.negatives,
            per_sample=options.per_sample,
            score_mib=options.score_mib,
        ),
        num_rows=options.rows,
        dim=options.dim,
        batch=options.batch,
        dtype=options.dtype,
        workers=options.workers,
        table=tuple(options.table),
        trials=options.trials,
        steps=options.steps,
        threads=options.threads,
    )
    return bench_bank(benchmark, lambda line: print(line, file=sys.stderr, flush=True))


def _add_checkpoint(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "checkpoint",
        help="saves and restores against plain writes and reads, and training beside saves",
        description="Saves and restores against plain writes and reads of the same objects in the same store; what a "
        "save makes training wait; training steps beside saves; bytes of increments; peak memory. In worker processes "
        "of this machine. Takes minutes. --SECTION.FIELD VALUE changes the recipe.",
    )
    parser.add_argument("--recipe", default="cifar10-nce", help="batch and objective (default: cifar10-nce)")
    parser.add_argument("--rows", type=int, default=1_281_167, metavar="N", help="rows (default: 1,281,167)")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="numbers of a row (default: 128)")
    parser.add_argument("--dtype", choices=BANK_DTYPES, default="float16", help="storage of rows (default: float16)")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="worker processes (default: 1)")
    parser.add_argument("--store", metavar="URI", help="folder or URI to write below (default: temporary files)")
    parser.add_argument("--upload-threads", type=int, default=4, help="threads of both sides per worker (default: 4)")
    parser.add_argument("--interval", type=float, default=60.0, metavar="S", help="from save to save (default: 60 s)")
    parser.add_argument("--trials", type=int, default=5, help="timed trials of each side (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads of a worker (default: its part of the usable cores)")
    parser.add_argument(
        "--parts", nargs="+", choices=CHECKPOINT_PARTS, default=CHECKPOINT_PARTS, help="what to measure (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(measure=_measure_checkpoint)


def _measure_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    from instdisc.benchmark.checkpoint import CheckpointBenchmark, bench_checkpoint
    from instdisc.recipes import recipe

    overrides: dict[str, Any] = {
        "model.architecture": "resnet-small",
        "model.feature_dim": options.dim,
        "bank.dtype": options.dtype,
        **parse_overrides(options.overrides),
    }
    benchmark = CheckpointBenchmark(
        config=recipe(options.recipe, **overrides),
        num_rows=options.rows,
        workers=options.workers,
        uri=options.store,
        num_threads=options.upload_threads,
        interval_s=options.interval,
        trials=options.trials,
        threads=options.threads,
        parts=tuple(options.parts),
    )
    return bench_checkpoint(benchmark, lambda line: print(line, file=sys.stderr, flush=True))
