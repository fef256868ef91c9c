"""What an index of many images costs a node: `uv run python tests/benchmarks/measure_large_index.py [ROWS] [FOLDER]`.

Writes the manifest of made-up packed images (no shards: nothing is read of them), opens it in two processes at once,
and lets each compute the rows of steps in both orders. ROWS: 100,000,000 unless given, some 90 bytes of disk each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataloading.index import CHECKSUM_BYTES, DatasetIndex, Names
from dataloading.shards import Shard, ShardManifest

ROWS_PER_SHARD, NAME_BYTES = 640, 19
GLOBAL_BATCH, STEPS = 4096, 200

OPEN = """
import json, sys, time
from pathlib import Path
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))
started = time.perf_counter()
from dataloading.order import OrderConfig, StepRows, make_order
from dataloading.sources import open_dataset
imported, before = time.perf_counter(), status("RssAnon")
dataset = open_dataset("packed", sys.argv[1], "train")
opened = time.perf_counter()
found = {"import_s": imported - started, "open_s": opened - imported}
for kind in ("permutation", "block"):
    begun = time.perf_counter()
    order = make_order(dataset, OrderConfig(kind), seed=0, global_batch=int(sys.argv[2]))
    rows = StepRows(order, int(sys.argv[2]), (0, int(sys.argv[2])))
    rows.rows(1_000_000)
    found[f"{kind}_start_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    for step in range(int(sys.argv[3])):
        rows.rows(step)
    found[f"{kind}_ms_per_step"] = 1e3 * (time.perf_counter() - begun) / int(sys.argv[3])
found |= {"own_mb": (status("RssAnon") - before) / 1e6, "shared_mb": status("RssFile") / 1e6}
assert dataset.index.num_rows == int(sys.argv[4])
print(json.dumps(found))
"""


def write_manifest(path: Path, num_rows: int) -> None:
    """Write the manifest of `num_rows` made-up images of two shapes."""
    numbers = np.arange(num_rows)
    text = np.full((num_rows, NAME_BYTES), ord("/"), dtype=np.uint8)
    text[:, :5] = np.frombuffer(b"train", np.uint8)
    text[:, -4:] = np.frombuffer(b".jpg", np.uint8)
    left = numbers.copy()
    for place in range(NAME_BYTES - 5, 5, -1):
        text[:, place] = ord("0") + left % 10
        left //= 10
    offsets = pa.py_buffer(np.arange(num_rows + 1, dtype=np.int64) * NAME_BYTES)
    names = pa.LargeBinaryArray.from_buffers(pa.large_binary(), num_rows, [None, offsets, pa.py_buffer(text)])
    num_shards = -(-num_rows // ROWS_PER_SHARD)
    lengths_N = np.full(num_rows, 100_000, dtype=np.int64)
    index = DatasetIndex(
        source="made up",
        names=Names(names),
        heights_N=(375 + numbers % 2).astype(np.int32),
        widths_N=np.full(num_rows, 500, dtype=np.int32),
        labels_N=numbers % 1000,
        class_names=tuple(map(str, range(1000))),
        bad_N=np.zeros(num_rows, dtype=np.bool_),
        digest="made up",
        num_bytes_N=lengths_N,
    )
    sizes = np.full(num_shards, ROWS_PER_SHARD)
    sizes[-1] = num_rows - ROWS_PER_SHARD * (num_shards - 1)
    # As `pack` does it: shards hold the images in a random order.
    row_of_place_N = np.random.default_rng(0).permutation(num_rows)
    place_N = np.empty_like(row_of_place_N)
    place_N[row_of_place_N] = numbers
    pieces = tuple(f"{piece:032x}" for piece in range(8))
    ShardManifest(
        index=index,
        shards=tuple(Shard(f"{i:06d}.tar", 64_000_000, int(size), pieces) for i, size in enumerate(sizes)),
        shard_N=(place_N // ROWS_PER_SHARD).astype(np.int32),
        offset_N=place_N % ROWS_PER_SHARD * 100_000,
        length_N=lengths_N,
        checksum_N=np.zeros(num_rows, dtype=f"V{CHECKSUM_BYTES}"),
        row_of_place_N=row_of_place_N,
        digest_of="list",
        fingerprint="0" * 32,
    ).save(path)


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        path = Path(folder, "train", "manifest.arrow")
        path.parent.mkdir()
        started = time.perf_counter()
        write_manifest(path, num_rows)
        print(f"{num_rows:,} rows: {path.stat().st_size / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s to write")
        command = [sys.executable, "-c", OPEN, folder, str(GLOBAL_BATCH), str(STEPS), str(num_rows)]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for worker in workers:
            for name, value in json.loads(worker.communicate()[0]).items():
                print(f"  {name:<26}{value:,.2f}")
            print()


if __name__ == "__main__":
    main()
