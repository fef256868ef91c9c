"""Whether a loader slows down or grows over many batches: `uv run python tests/benchmarks/measure_soak.py ROOT`.

Draws batches of full colour augmentation from the images at ROOT, whatever they are, and prints a line with speed and
resident memory ten times on the way, as JSON. `--batches`, `--batch`, `--size`, `--threads`, `--backend` say how much.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

from dataloading.augment import AugmentConfig
from dataloading.loader import make_loader
from dataloading.sources import open_dataset


def resident_mb() -> float:
    """Return the memory of this process that is in use and its own, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    chosen = parser.parse_args()
    dataset = open_dataset("auto", chosen.root, "train")
    loader = make_loader(
        dataset,
        AugmentConfig(size=chosen.size),
        seed=0,
        global_batch=chosen.batch,
        offsets=(0, chosen.batch),
        device="cpu",
        num_threads=chosen.threads,
        backend=chosen.backend,
    )
    batches = loader.batches(0)
    for number in range(11):
        # The first part is short: libraries load, buffers are made.
        num_batches = chosen.batches // 100 if number == 0 else chosen.batches // 10
        started = time.perf_counter()
        num_valid = sum(int(batch.valid_B.sum()) for batch in islice(batches, num_batches))
        seconds = time.perf_counter() - started
        found = {
            "batches": num_batches,
            "images_per_s": round(num_batches * chosen.batch / seconds, 1),
            "valid_share": round(num_valid / (num_batches * chosen.batch), 4),
            "resident_mb": round(resident_mb(), 1),
        }
        print(json.dumps(found), flush=True)
    loader.close()


if __name__ == "__main__":
    main()
