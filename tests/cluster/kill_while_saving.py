"""Kill processes that save, each at a random moment, and print what the next one restores.

Usage: kill_while_saving.py FOLDER ROUNDS. A process of its own, because it forks: the children have torch imported.
"""

import json
import os
import random
import signal
import sys
import time

import torch
from checkpoint_fakes import ThreadWorker

from cluster.checkpoint import Checkpointer, Retention, RowTable
from cluster.store import Store

TIMEOUT_S = 60


def save_forever(folder: str, pipe: int) -> None:
    signal.alarm(TIMEOUT_S)  # in case that the parent is killed
    checkpointer = Checkpointer(Store(folder), worker=ThreadWorker(), block_rows=1000, retention=Retention(last=2))
    checkpoint = checkpointer.restore()
    step = checkpoint.step if checkpoint else 0
    checkpointer.begin_attempt()
    os.write(pipe, step.to_bytes(8, "little"))
    while True:
        step += 1
        rows = torch.full((5000, 32), step, dtype=torch.int32)
        checkpointer.save(step, {"bank": RowTable(5000, 0, rows)}, {"w": rows[0]}, {"step": step})
        os.write(pipe, step.to_bytes(8, "little"))


def kill_one(folder: str, num_saves: int, delay_s: float) -> int:
    """Kill a process `delay_s` after it restored and saved `num_saves` times; return the last step it announced."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(folder, writing)
    os.close(writing)
    for _ in range(1 + num_saves):
        steps = os.read(reading, 8)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 8):
        steps = more
    os.close(reading)
    return int.from_bytes(steps, "little")


def main(folder: str, num_rounds: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    moments = random.Random(0)
    for round_number in range(num_rounds):
        returned = kill_one(folder, moments.randrange(4), moments.uniform(0, 0.05))
        checkpointer = Checkpointer(Store(folder), worker=ThreadWorker(), retention=Retention(last=2))
        checkpoint = checkpointer.restore()
        restored, values = 0, torch.tensor([0])
        if checkpoint:
            restored = checkpoint.state["step"]
            values = torch.cat([checkpoint.rows("bank").flatten(), checkpoint.tensors()["w"]])
        document = {"returned": returned, "restored": restored, "values": values.unique().tolist()}
        print(json.dumps({**document, "warnings": checkpointer.warnings}), flush=True)
        checkpointer.begin_attempt()
        if round_number == num_rounds - 1:
            checkpointer.save(restored + 1, {}, {}, {})
        checkpointer.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
