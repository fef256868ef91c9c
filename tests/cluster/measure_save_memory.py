"""Print by how much the memory of a process grows while it saves a guarded table in the background and writes on.

Usage: measure_save_memory.py FOLDER MIB WRITTEN_MIB: of the table, and of the rows that are written meanwhile.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from checkpoint_fakes import ThreadWorker

from cluster.checkpoint import Checkpointer, RowGuard, RowTable
from cluster.store import Store

ROW_BYTES = 256


def resident_mib(field: str) -> float:
    """Return VmRSS (now) or VmHWM (the most so far); getrusage's maximum would begin with the parent process's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main(folder: str, mib: int, written_mib: int) -> None:
    checkpointer = Checkpointer(Store(folder), worker=ThreadWorker())
    checkpointer.restore()
    checkpointer.begin_attempt()
    num_rows, num_written = mib * 2**20 // ROW_BYTES, written_mib * 2**20 // ROW_BYTES
    rows = torch.ones(num_rows, 128, dtype=torch.bfloat16)
    last = torch.zeros(num_rows, dtype=torch.int32)
    guard = RowGuard()
    checkpointer.save(1, {"bank": RowTable(1, 0, rows[:1])}, {}, {})
    Path("/proc/self/clear_refs").write_text("5")  # forgets the maximum
    before = resident_mib("VmRSS")
    checkpointer.start_save(2, {"bank": RowTable(num_rows, 0, rows, last, guard)}, {"w": torch.ones(3)}, {})
    num_writes, places = 0, np.arange(num_rows - num_written, num_rows)
    for places_U in np.array_split(places, 50):
        is_saving = checkpointer.is_saving
        with guard.writing(places_U):
            rows[torch.from_numpy(places_U)] = 2
            last[torch.from_numpy(places_U)] = 2
        num_writes += is_saving
    checkpointer.wait()
    grown_mib = resident_mib("VmHWM") - before
    checkpointer.start_save(3, {"bank": RowTable(num_rows, 0, rows, last, guard)}, {"w": torch.ones(3)}, {})
    increment_mib = checkpointer.wait().table_bytes / 2**20
    checkpointer.close()
    print(json.dumps({"grown_mib": grown_mib, "increment_mib": increment_mib, "num_writes": num_writes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
