"""`instdisc knn`: the weighted kNN accuracy of a run, on re-encoded images and on its bank."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser("knn", help="classify the test images by their nearest training images")
    parser.add_argument("uri", metavar="RUN", help="folder or URI of the run")
    parser.add_argument("--k", type=int, help="neighbours that vote (default: the run's)")
    parser.add_argument("--temperature", type=float, help="τ of the votes (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Embed training and test images and print both accuracies."""
    from dataclasses import replace

    from cluster.worker import Worker, threads_for
    from instdisc.cli.output import printable
    from instdisc.loading import load_bank, load_encoder
    from instdisc.progress import Progress
    from instdisc.runs import RunError, existing_run
    from instdisc.train.evaluation import KnnEvaluator
    from instdisc.train.image_sets import notes_of, open_images_of

    encoder = load_encoder(options.uri, device="auto")
    data, asked = encoder.config.data, {"k": options.k, "temperature": options.temperature}
    eval_config = replace(encoder.config.eval, **{name: v for name, v in asked.items() if v is not None})
    of_run = existing_run(options.uri)
    train = open_images_of(of_run, data, data.train_split, data.max_rows)
    test = open_images_of(of_run, data, data.test_split, data.max_test_rows)
    of_run.require_same_dataset(train.index)
    progress = Progress()
    worker = Worker(
        device=next(encoder.parameters()).device,
        num_threads=threads_for(1),
        send_event=lambda text: progress.update(json.loads(text)),
    )
    evaluator = KnnEvaluator(train, test, replace(encoder.config, eval=eval_config), worker)
    if evaluator.no_accuracy:
        raise RunError(f"no kNN accuracy: {evaluator.no_accuracy}")
    try:
        evaluation = evaluator.evaluate(_Run(encoder.encoder, load_bank(options.uri).on(worker.device)))
    finally:
        progress.close()
    scores = {name: evaluation.scores.get(name) for name in ("knn_top1", "knn_bank_top1")}
    told = [*evaluator.about(), *evaluation.left_out()]
    document = {
        **scores,
        "k": eval_config.k,
        "temperature": eval_config.temperature,
        **evaluation.summary(),
        "num_own_rows_left_out": evaluator.num_same,
        "bad_test_images": [asdict(bad) for bad in evaluation.bad_test],
        "bad_training_images": [asdict(bad) for bad in evaluation.bad_training],
        "told": told,
        "notes": notes_of(train, test),
    }
    shown = {name: "none" if score is None else f"{score:.1f} %" for name, score in scores.items()}
    of = f" of {evaluation.num_test_images:,}" if evaluation.bad_test else ""
    text = (
        f"kNN (k={eval_config.k}, τ={eval_config.temperature:g}) on {evaluation.num_queries:,}{of} test images: "
        f"{shown['knn_top1']} re-encoded, {shown['knn_bank_top1']} memory bank"
    )
    print(json.dumps(document) if options.json else "\n".join([text, *map(printable, told)]))
    return 0


@dataclass(frozen=True)
class _Run:
    """What a checkpoint holds of what is evaluated."""

    encoder: Any
    bank: Any
