"""Print by how much the memory of a process grows while it saves a table and a tensor.

Usage: measure_save_memory.py FOLDER MIB (of each).
"""

import json
import sys
from pathlib import Path

import torch
from checkpoint_fakes import ThreadWorker

from cluster.checkpoint import Checkpointer, RowTable
from cluster.store import Store


def resident_mib(field: str) -> float:
    """Return VmRSS (now) or VmHWM (the most so far); getrusage's maximum would begin with the parent process's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main(folder: str, mib: int) -> None:
    checkpointer = Checkpointer(Store(folder), worker=ThreadWorker())
    checkpointer.restore()
    checkpointer.begin_attempt()
    num_rows = mib * 2**20 // 256
    bank = RowTable(num_rows, 0, torch.ones(num_rows, 128, dtype=torch.bfloat16))
    tensors = {"w": torch.ones(mib * 2**20 // 4)}
    checkpointer.save(1, {"bank": RowTable(1, 0, bank.rows[:1])}, {}, {})
    Path("/proc/self/clear_refs").write_text("5")  # forgets the maximum
    before = resident_mib("VmRSS")
    checkpointer.save(2, {"bank": bank}, tensors, {})
    print(json.dumps({"grown_mib": resident_mib("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
