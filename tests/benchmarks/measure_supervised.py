"""What the quickstart's encoder reaches when it is trained with labels: the upper end of the quickstart's scale.

Command: `uv run python tests/benchmarks/measure_supervised.py [--seeds 0 1 2] [--epochs 30]`. The network, the images,
the batches, their augmentation and the number of epochs are the quickstart's; the features get a linear classifier
and cross-entropy. Printed for each seed: kNN of the untrained encoder, and of the trained one kNN and classifier.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from dataloading.index import Dataset
from dataloading.loader import make_loader
from instdisc.config import TrainConfig
from instdisc.embedding import embed_rows
from instdisc.evaluate import knn_classify
from instdisc.images import open_images
from instdisc.models import Encoder, build_encoder
from instdisc.recipes import recipe
from instdisc.schedule import learning_rate, num_steps
from instdisc.train.image_sets import open_test_set

HERE = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    for seed in args.seeds:
        config = recipe("quickstart", **{"seed": seed, "optim.epochs": args.epochs, "optim.lr": args.lr})
        train, test = open_images(config.data, config.data.train_split), open_test_set(config)
        assert test is not None
        encoder = build_encoder(config.model, seed).to(memory_format=torch.channels_last)
        untrained = knn_percent(encoder, config, train, test)
        classifier = train_with_labels(encoder, config, train)
        right_Q = classifier(features(encoder, config, test)).argmax(dim=1) == labels(test)
        trained = knn_percent(encoder, config, train, test)
        accuracy = 100 * right_Q.float().mean().item()
        print(f"seed {seed}: kNN {untrained:.1f} % untrained, {trained:.1f} % supervised; classifier {accuracy:.1f} %")


def train_with_labels(encoder: Encoder, config: TrainConfig, train: Dataset) -> torch.nn.Linear:
    """Train the encoder and a linear classifier on its unit features, which it returns."""
    torch.manual_seed(config.seed)
    classifier = torch.nn.Linear(config.model.feature_dim, len(train.index.class_names))
    optimizer = torch.optim.SGD(
        [*encoder.parameters(), *classifier.parameters()],
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
    )
    num_rows, batch_size = train.index.num_rows, config.optim.global_batch
    loader = make_loader(
        train,
        config.augment,
        seed=config.seed,
        global_batch=batch_size,
        offsets=(0, batch_size),
        device=HERE,
        num_threads=torch.get_num_threads(),
    )
    encoder.train()
    labels_N = labels(train)
    batches = loader.batches(0)
    for step in range(num_steps(config.optim, num_rows)):
        batch = next(batches)
        images_BCHW = batch.images_BCHW.contiguous(memory_format=torch.channels_last)
        # Logits of unit features are small: the scale of the classifier's weights is learned from 10 on.
        loss = F.cross_entropy(10 * classifier(encoder(images_BCHW)), labels_N[batch.indices_B])
        optimizer.param_groups[0]["lr"] = learning_rate(config.optim, step, num_rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    loader.close()
    return classifier


@torch.no_grad()
def features(encoder: Encoder, config: TrainConfig, dataset: Dataset) -> torch.Tensor:
    """Return the unit features of all images, float32 (N, D)."""
    rows = range(dataset.index.num_rows)
    return embed_rows(encoder, dataset, rows, config, device=HERE, num_threads=torch.get_num_threads())


def knn_percent(encoder: Encoder, config: TrainConfig, train: Dataset, test: Dataset) -> float:
    """Return kNN accuracy in percent, as the quickstart evaluates."""
    queries_QD, gallery_ND = features(encoder, config, test), features(encoder, config, train)
    scores_QC = knn_classify(
        queries_QD,
        gallery_ND,
        labels(train),
        k=config.eval.k,
        temperature=config.eval.temperature,
        num_classes=len(train.index.class_names),
    )
    return 100 * (scores_QC.argmax(dim=1) == labels(test)).float().mean().item()


def labels(dataset: Dataset) -> torch.Tensor:
    """Return the labels, int64 (N,)."""
    assert dataset.index.labels_N is not None
    return torch.from_numpy(dataset.index.labels_N)


if __name__ == "__main__":
    main()
