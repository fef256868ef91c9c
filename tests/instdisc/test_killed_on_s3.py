"""A run that trains from a real S3 server while workers, driver and the server itself are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from killing import assert_same_to_the_bit, finish, kill_at_a_random_moment
from PIL import Image
from seaweed import Seaweed

from cluster.parallel import ProcessMap
from cluster.store import Store
from dataloading.pack import pack
from dataloading.sources import list_images

NUM_ROWS, GLOBAL_BATCH, STEPS = 103, 12, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, num in (("train", NUM_ROWS), ("val", 20)):
        for number in range(num):
            place = root / split / ("cat" if number % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            small = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(small).resize((160 + number, 150)).save(place / f"{number:03d}.jpg", quality=95)
    return root


def command(root: str, kind: str, run: Path, cache: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "instdisc.cli.main", "train", "cifar10-cpu", "--run", str(run)),
        *("--launcher", "local", "--workers", "3", "--data.kind", kind, "--data.root", root),
        *(("--data.cache_dir", str(cache), "--data.cache_gb", "0.0005") if kind == "packed" else ()),
        *("--data.max_rows", "none"),
        *("--model.architecture", "resnet-small", "--model.width", "8", "--model.blocks", "1,1"),
        *("--model.head", "linear", "--model.feature_dim", "16", "--eval.k", "5"),
        *("--optim.global_batch", str(GLOBAL_BATCH), "--optim.norm_group", "4", "--eval.baselines", "no"),
        *("--optim.epochs", str(STEPS * GLOBAL_BATCH / NUM_ROWS), "--checkpoint.every_steps", "9"),
        *("--system.tensorboard", "no", "--checkpoint.every_minutes", "none"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_s3_ends_bit_for_bit_like_one_from_a_folder_whatever_is_killed(server, folder, tmp_path):
    for split in ("train", "test"):
        pack(
            list_images("auto", str(folder), split), Store("s3://images/killed/packed"), split, parallel=ProcessMap(0),
            shard_mb=0.05,
        )  # fmt: skip
    expected, run, cache = tmp_path / "expected", tmp_path / "run", tmp_path / "cache"
    finish(command(str(folder), "folder", expected, cache))
    # The cache holds a part of the shards, so that images are on their way at every moment.
    from_s3, chance = command("s3://images/killed/packed", "packed", run, cache), random.Random()
    for whom in ("a worker", "driver"):
        kill_at_a_random_moment(from_s3, run, whom, chance)
    last = subprocess.Popen(from_s3, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = threading.Thread(target=_kill_and_start_again, args=(server, last, chance))
    killed.start()
    _, errors = last.communicate(timeout=400)
    killed.join()
    assert last.returncode == 0, errors.decode()
    assert_same_to_the_bit(run, expected, STEPS)


def _kill_and_start_again(server: Seaweed, process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Take the server away for seconds, again and again, until the run has ended."""
    while process.poll() is None:
        time.sleep(chance.uniform(1.0, 6.0))
        server.kill()
        time.sleep(chance.uniform(0.5, 2.0))
        server.start()
