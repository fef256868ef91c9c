"""`instdisc knn`: the weighted kNN accuracy of a run, on re-encoded images and on its bank."""

from __future__ import annotations

import argparse
import json
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

    import torch

    from dataloading.notes import LABELS
    from instdisc.embedding import embed_here
    from instdisc.evaluate.knn import knn_classify, top1
    from instdisc.images import open_images
    from instdisc.loading import load_bank, load_encoder
    from instdisc.progress import Progress
    from instdisc.runs import RunError, existing_run

    encoder = load_encoder(options.uri, device="auto")
    data, asked = encoder.config.data, {"k": options.k, "temperature": options.temperature}
    eval_config = replace(encoder.config.eval, **{name: v for name, v in asked.items() if v is not None})
    train = open_images(data, data.train_split, max_rows=data.max_rows)
    test = open_images(data, data.test_split, max_rows=data.max_test_rows)
    existing_run(options.uri).require_same_dataset(train.index)
    if train.index.labels_N is None or test.index.labels_N is None:
        why = [f"{d.index.source}: {note.text}" for d in (train, test) for note in d.index.notes if note.kind == LABELS]
        raise RunError(f"kNN accuracy needs labels of training and test images; found {'; '.join(why) or 'none'}")
    progress = Progress()
    try:
        gallery_ND, queries_QD = (embed_here(encoder, d, progress.update) for d in (train, test))
    finally:
        progress.close()
    bank_ND = load_bank(options.uri).rows_ND.to(gallery_ND.device)
    labels_N, labels_Q = (torch.tensor(d.index.labels_N) for d in (train, test))
    scores: dict[str, float] = {}
    for name, rows_ND in (("knn_top1", gallery_ND), ("knn_bank_top1", bank_ND)):
        votes_QC = knn_classify(
            queries_QD,
            rows_ND,
            labels_N,
            k=eval_config.k,
            temperature=eval_config.temperature,
            num_classes=len(train.index.class_names),
        )
        scores[name] = top1(votes_QC, labels_Q)
    document = {**scores, "k": eval_config.k, "temperature": eval_config.temperature, "num_queries": len(labels_Q)}
    text = (
        f"kNN (k={eval_config.k}, τ={eval_config.temperature:g}) on {len(labels_Q):,} test images: "
        f"{scores['knn_top1']:.1f} % re-encoded, {scores['knn_bank_top1']:.1f} % memory bank"
    )
    print(json.dumps(document) if options.json else text)
    return 0
