"""`bench checkpoint` on a small bank: every comparison is there and of real work; bytes by hand; refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from instdisc.cli.main import main

HERE = Path(__file__).parent
NUM_ROWS, DIM, GLOBAL_BATCH = 20_000, 16, 8
SMALL = [
    *("--rows", str(NUM_ROWS), "--dim", str(DIM), "--trials", "2", "--interval", "0.05", "--threads", "1"),
    *("--model.width", "4", "--model.blocks", "1", "--augment.size", "16", "--eval.crop", "16"),
    *("--optim.global_batch", str(GLOBAL_BATCH), "--optim.norm_group", "4", "--objective.num_negatives", "16"),
]
ROW_BYTES = DIM * 2 + 4
"""A row in float16 and the step of its last write."""


def document_of(capsys, folder: Path, *options: str) -> dict:
    assert main(["bench", "checkpoint", "--json", "--store", str(folder), *SMALL, *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_workers_are_measured_against_the_plain_way_and_leave_nothing(capsys, tmp_path):
    document = document_of(capsys, tmp_path, "--workers", "2")
    results = {result["name"]: result for result in document["results"]}
    assert list(results) == [
        "save",
        "restore from disk",
        "restore from memory",
        "steps beside whole saves",
        "wait for a whole save",
        "steps beside incremental saves",
        "wait for an incremental save",
        "bytes of tables in an incremental save",
        "bytes of an incremental save",
        "peak memory of a save, rows included",
        "peak memory of a restore, rows included",
    ]
    for name, result in results.items():
        assert {"name", "value", "unit", "reference", "ratio", "trials", "reference_is"} <= set(result)
        num_trials = 1 if name.startswith("peak") else 2
        assert len(result["trials"]) == len(result["reference_trials"]) == num_trials
        assert min(result["trials"] + result["reference_trials"]) > 0
    assert {"cpu", "versions", "commit", "load_average_after"} <= set(document["environment"])
    assert (document["config"]["workers"], document["config"]["num_rows"]) == (2, NUM_ROWS)
    assert list(tmp_path.iterdir()) == []

    for save in document["saves"]["whole"]:
        assert save["table_bytes"] == NUM_ROWS * ROW_BYTES
    # Each row of an increment stands there with its number, of 4 bytes, in both tables.
    num_steps = results["steps beside incremental saves"]["steps_of_a_span"]
    num_rows = [save["touched_bytes"] / ROW_BYTES for save in document["saves"]["incremental"]]
    assert [save["table_bytes"] for save in document["saves"]["incremental"]] == [n * (ROW_BYTES + 8) for n in num_rows]
    assert num_rows == [num_steps * GLOBAL_BATCH, 2 * num_steps * GLOBAL_BATCH]
    assert document["bytes"] > NUM_ROWS * ROW_BYTES


def test_a_part_is_measured_alone(capsys, tmp_path):
    document = document_of(capsys, tmp_path, "--parts", "memory")
    assert [result["name"] for result in document["results"]] == [
        "peak memory of a save, rows included",
        "peak memory of a restore, rows included",
    ]
    for result in document["results"]:
        assert result["shard_mib"] == pytest.approx(NUM_ROWS * ROW_BYTES / 2**20)
        assert result["reference"] == pytest.approx(1.25 * result["shard_mib"] + 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "4"], "rows: found 4, expected at least 8"),
        (["--trials", "0"], "trials: found 0, expected at least 1"),
        (["--interval", "0"], "interval: found 0.0 s, expected more than 0"),
        (["--workers", "0"], "workers: found 0, expected at least 1"),
        (["--rows", "30"], "give more --rows or a shorter --interval"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, tmp_path, options, message):
    assert main(["bench", "checkpoint", "--parts", "steps", "--store", str(tmp_path), *SMALL, *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_large_checkpoint_comes_back_on_other_numbers_of_workers(tmp_path):
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, str(HERE / "measure_large_checkpoint.py"), "--rows", "30000", "--dim", "16"),
        *("--architecture", "resnet-small", "--workers", "2", "--restore-workers", "1", "3", "--trials", "1"),
        *("--store", str(tmp_path / "store"), "--out", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert [len(ranks) for runs in document["restore"].values() for ranks in runs] == [1, 3]
    for runs in document["restore"].values():
        assert all(rank["num_wrong_rows"] == 0 for ranks in runs for rank in ranks)
    assert [rank["increment"]["is_base"] for rank in document["save"]] == [False, False]
    assert list((tmp_path / "store").iterdir()) == []
