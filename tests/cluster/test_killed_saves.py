"""Death at any moment of a save: the newest committed checkpoint is there, whole, and what was left over is removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_content import assert_holds, save, start
from checkpoint_fakes import FaultyStore, InlineCoordination, Killed, ThreadWorker
from fsspec.implementations.memory import MemoryFileSystem

from cluster.attempts import read_history
from cluster.checkpoint import Checkpoint, Checkpointer, Retention, RowTable, read_latest
from cluster.checkpoint_reader import verify_share
from cluster.store import Store

HERE = Path(__file__).parent


def whole_tables_scenario(store: Store, done: list[int]) -> None:
    """Two attempts that save and remove; `done` gets the steps whose save returned."""
    for steps in ([1, 2], [3, 4]):
        checkpointer, _ = start(store, keep_last=1, num_threads=1, block_rows=20)
        for step in steps:
            save(checkpointer, ThreadWorker(), step)
            done.append(step)


def bank_after(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, last = torch.zeros(36, 2), torch.full((36,), -1, dtype=torch.int32)
    for written in range(step + 1):
        rows[3 * written : 3 * written + 3], last[3 * written : 3 * written + 3] = 1.0 + written, written
    return rows, last


def save_bank(checkpointer: Checkpointer, step: int) -> None:
    rows, last = bank_after(step)
    tables = {"bank": RowTable(36, 0, rows, last), "last": RowTable(36, 0, last, last)}
    checkpointer.save(step, tables, {"w": rows[:1]}, {"step": step, "z": 0.1})


def increments_scenario(store: Store, done: list[int]) -> None:
    """As above, with increments on a base, across the attempts, and a new base."""
    for steps in ([1, 2], [3, 4, 5]):
        checkpointer, _ = start(store, keep_last=2, num_threads=1, block_rows=20)
        for step in steps:
            save_bank(checkpointer, step)
            done.append(step)


def assert_bank(checkpoint: Checkpoint, step: int) -> None:
    rows, last = bank_after(step)
    assert checkpoint.state["step"] == step
    assert torch.equal(checkpoint.rows("bank"), rows)
    assert torch.equal(checkpoint.rows("last"), last)


@pytest.mark.parametrize(
    ("scenario", "save_next", "check", "least"),
    [
        (whole_tables_scenario, lambda c: save(c, ThreadWorker(), 9), assert_holds, 90),
        (increments_scenario, lambda c: save_bank(c, 9), assert_bank, 100),
    ],
    ids=["whole tables", "increments"],
)
def test_death_between_any_two_operations_leaves_the_newest_committed_checkpoint(
    uri, scenario, save_next, check, least
):
    complete = FaultyStore(uri)
    scenario(complete, [])
    assert len(complete.log) >= least
    for number in range(len(complete.log)):
        MemoryFileSystem.store.clear()
        done: list[int] = []
        with pytest.raises(Killed):
            scenario(FaultyStore(uri, kill_at=number), done)
        for id in read_history(Store(uri)).chain:
            assert verify_share(Store(uri), id, 0, 1, 1)[1] == [], "a visible checkpoint lacks something"

        checkpointer, checkpoint = start(Store(uri), keep_last=1)
        newest = checkpoint.step if checkpoint else 0
        assert newest in ((done[-1], done[-1] + 1) if done else (0, 1))
        assert checkpointer.warnings == []
        if checkpoint:
            check(checkpoint, newest)
        save_next(checkpointer)
        latest = read_latest(Store(uri))
        check(latest, 9)
        left = {latest.manifest.id.key, *(stored.key for stored in latest.manifest.objects())}
        assert {key for key in Store(uri).list() if not key.startswith("attempts/")} == left


def test_a_coordinator_that_is_killed_between_any_two_operations_and_started_again_loses_no_save(uri):
    """Only the coordinator dies: the worker says again what it said, and the save commits."""

    class Restarted(InlineCoordination):
        num_restarts = 0

        def call(self, method, **arguments):
            try:
                return super().call(method, **arguments)
            except Killed:
                self.num_restarts += 1
                self._store.kill_at = None
                self.restart()
                return super().call(method, **arguments)

    def scenario(store: FaultyStore) -> Restarted:
        coordinator = Restarted(store, Retention(last=2))
        checkpointer, _ = start(Store(uri), coordinator=coordinator)
        for step in (1, 2, 3, 4):
            save_bank(checkpointer, step)
        return coordinator

    complete = FaultyStore(uri)
    scenario(complete)
    assert len(complete.log) > 40
    for number in range(len(complete.log)):
        MemoryFileSystem.store.clear()
        coordinator = scenario(FaultyStore(uri, kill_at=number))
        assert coordinator.num_restarts == 1
        latest = read_latest(Store(uri))
        assert_bank(latest, 4)
        assert [key[-6:-5] for key in Store(uri).list("manifests/")] == ["3", "4"]


def run_script(name: str, *args: object) -> list:
    command = [sys.executable, "-W", "error", str(HERE / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_killed_at_any_moment_leaves_the_newest_committed_checkpoint(tmp_path):
    rounds = run_script("kill_while_saving.py", tmp_path, 12)
    assert len(rounds) == 12
    for before in rounds:
        assert before["warnings"] == []
        assert before["restored"] in (before["returned"], before["returned"] + 1)
        assert before["values"] == [before["restored"]]
    assert rounds[-1]["restored"] > 0
    assert not list(tmp_path.glob("objects/**/.tmp-*")), "the last save removed what the killed processes left"


def test_a_save_of_a_guarded_table_takes_bounded_memory_and_what_is_written_meanwhile(tmp_path):
    written_mib = 16
    (peak,) = run_script("measure_save_memory.py", tmp_path, 400, written_mib)
    assert peak["num_writes"] > 10, "rows were written while the save went on"
    assert peak["grown_mib"] < 160 + 2 * written_mib, "far less than the table's 400 MiB"
    assert written_mib <= peak["increment_mib"] < 1.1 * written_mib
