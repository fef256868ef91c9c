"""`instdisc checkpoints`: what a person sees, what a program reads, and what is never deleted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_checkpoints import bank_of, begin, damage, held_by_another_process, leave_orphan, run_attempt, save

import instdisc
from cluster.checkpoint import read_latest
from cluster.lease import KEY as HEARTBEAT
from cluster.manifest import ManifestId, read_manifest
from cluster.store import Store
from instdisc.cli.checkpoint_tables import age
from instdisc.cli.main import main
from instdisc.progress import in_bytes
from instdisc.runs import CONFIG, Run


def make_run(uri: str) -> tuple[str, Store]:
    """Return a run that keeps two checkpoints by its configuration, and the store of its checkpoints."""
    run = Run(uri)
    config = instdisc.recipe("quickstart", **{"checkpoint.keep_last": 2})
    run.store.put(CONFIG, config.to_json().encode())
    return uri, run.checkpoints()


@pytest.fixture
def made(tmp_path) -> tuple[str, Store]:
    """A run of two attempts, five checkpoints that are valid, an orphan and a torn save."""
    uri, store = make_run(str(tmp_path / "run"))
    run_attempt(store, [2, 4, 6])
    run_attempt(store, [8, 1_000_010])
    leave_orphan(store, 1, 7)
    store.put("objects/000002/000001000012-0003/bank/x.bin", b"x" * 1500)
    return uri, store


def document_of(capsys, *arguments: str, code: int = 0):
    assert main(["checkpoints", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def steps(documents) -> list[int]:
    return [document["step"] for document in documents]


def files_of(store: Store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list() if key != HEARTBEAT}


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_fits_the_terminal_and_says_what_goes(made, capsys, monkeypatch, width):
    uri, _ = made
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["checkpoints", "ls", uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "6 checkpoints" in lines[0]
    assert lines[1] == "nobody trains the run"
    first = next(place for place, line in enumerate(lines) if line.split()[:2] == ["step", "attempt"])
    table = [line.split() for line in lines[first + 1 : first + 7]]
    assert max(len(line) for line in lines[first : first + 7]) <= width
    assert [(row[0], row[1], row[-2], row[-1]) for row in table] == [
        ("2", "1", "valid", "goes"),
        ("4", "1", "valid", "goes"),
        ("6", "1", "valid", "goes"),
        ("7", "1", "orphan", "goes"),
        ("8", "2", "valid", "stays"),
        ("1,000,010", "2", "newest", "stays"),
    ]
    assert ("saved (UTC)" in lines[first]) == (width == 120)
    assert "3 on 2 (attempt 1)" in lines[first + 5] if width == 120 else "3 on 2 (1)" in lines[first + 5]
    assert "without a manifest: 1.50 kB in 1 object of step 1,000,012 (attempt 2), left by a torn save" in lines
    assert "would delete 4 checkpoints (1 orphan among them)" in lines[-1]


def test_a_list_as_json_has_the_numbers(made, capsys):
    uri, store = made
    document = document_of(capsys, "ls", uri)
    assert document["num_bytes"] == sum(map(len, files_of(store).values())) + len(store.get(HEARTBEAT))
    newest = document["checkpoints"][-1]
    manifest = read_manifest(store, ManifestId(2, 1_000_010))
    assert (newest["step"], newest["state"], newest["num_bytes"]) == (1_000_010, "newest", manifest.num_bytes)
    assert newest["metrics"] == manifest.metrics
    assert newest["base"] is None
    assert document["checkpoints"][-2]["base"] == {"step": 2, "attempt": 1}
    assert 0 <= newest["age_s"] < 60
    assert document["remains"][0]["num_bytes"] == 1500
    assert steps(document["next_removal"]["deleted"]) == [2, 4, 6, 7]


def test_a_list_changes_nothing_and_needs_no_torch(made):
    uri, store = made
    before = files_of(store)
    commands = [["ls", uri], ["verify", uri], ["cat", uri, "state"], ["prune", uri, "--dry-run"]]
    code = (
        "import sys; from instdisc.cli.main import main\n"
        f"for command in {commands!r}:\n"
        "    assert main(['checkpoints', *command]) == 0\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(store) == before


def test_a_run_that_another_process_trains_is_listed_with_it_and_not_pruned(made, capsys):
    uri, store = made
    with held_by_another_process(store.uri) as process:
        assert main(["checkpoints", "ls", uri]) == 0
        printed = capsys.readouterr().out
        assert f"held by process {process.pid} on " in printed
        assert "being written, or left by a torn save" in printed
        assert "the next save would delete 5 checkpoints" in printed
        before = files_of(store)
        assert main(["checkpoints", "prune", uri, "--yes"]) == 2
        printed = capsys.readouterr().err
        assert f"is trained by process {process.pid} on " in printed
        assert " since 20" in printed
        assert files_of(store) == before
        assert document_of(capsys, "ls", uri)["held"]["process"] == process.pid
        dry = document_of(capsys, "prune", uri, "--dry-run")
        assert steps(dry["plan"]["deleted"]) == [2, 4, 6, 7]
        assert files_of(store) == before
    assert document_of(capsys, "ls", uri)["held"] is None


def test_verify_says_intact_damaged_or_a_mistake_by_its_exit_code(made, capsys):
    uri, store = made
    assert document_of(capsys, "verify", uri)["checkpoints"] == [
        {
            "step": 1_000_010,
            "attempt": 2,
            "num_objects": len(read_manifest(store, ManifestId(2, 1_000_010)).objects()),
            "num_bytes": read_manifest(store, ManifestId(2, 1_000_010)).num_bytes,
            "problems": [],
        }
    ]
    key = read_manifest(store, ManifestId(1, 4)).tensors.key
    damage(store, key)
    assert main(["checkpoints", "verify", uri]) == 0, "the newest one is intact"
    assert main(["checkpoints", "verify", uri, "--step", "4"]) == 1
    out, err = capsys.readouterr()
    assert f"object {key} in {store.uri} differs from its checksum" in out
    assert f"step 4 (attempt 1): {len(read_manifest(store, ManifestId(1, 4)).objects())} objects, " in out
    assert "DAMAGED, 1 problem" in out
    assert "verifying step 4 (attempt 1): " in err
    found = document_of(capsys, "verify", uri, "--all", code=1)["checkpoints"]
    assert {f["step"]: len(f["problems"]) for f in found} == {2: 0, 4: 1, 6: 0, 8: 0, 1_000_010: 0}
    for wrong, message in ((["--step", "5"], "no checkpoint of step 5"), (["--all", "--step", "4"], "--all: found")):
        assert main(["checkpoints", "verify", uri, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_newest_checkpoint_without_a_readable_manifest_is_damaged_and_not_passed_over(made, capsys):
    uri, store = made
    store.put(ManifestId(2, 1_000_010).key, b"{}")
    assert main(["checkpoints", "verify", uri]) == 1
    assert "is damaged: 2 bytes that are not one of our documents" in capsys.readouterr().out
    assert main(["checkpoints", "prune", uri, "--dry-run"]) == 2
    assert "--damaged" in capsys.readouterr().err


def test_a_prune_shows_the_same_as_it_then_deletes_and_the_run_goes_on(made, capsys):
    uri, store = made
    before = files_of(store)
    dry = document_of(capsys, "prune", uri, "--dry-run")
    assert files_of(store) == before
    assert (dry["done"], steps(dry["plan"]["deleted"]), steps(dry["plan"]["kept"])) == (
        False,
        [2, 4, 6, 7],
        [8, 1_000_010],
    )
    done = document_of(capsys, "prune", uri, "--yes")
    assert done["done"]
    assert done["plan"] == dry["plan"]
    gone = set(before) - set(files_of(store))
    assert sum(len(before[key]) for key in gone if key.startswith("objects/")) == dry["plan"]["num_bytes"]
    assert document_of(capsys, "verify", uri, "--all")["seconds"] >= 0

    checkpointer = begin(store)
    save(checkpointer, 1_000_012)
    checkpointer.close()
    assert document_of(capsys, "prune", uri, "--yes", "--keep-last", "1")["done"]
    latest = read_latest(store)
    assert latest is not None
    assert torch.equal(latest.rows("bank"), bank_of(1_000_012)[0])
    assert main(["checkpoints", "prune", uri, "--yes", "--keep-last", "1"]) == 0
    assert "would delete nothing" in capsys.readouterr().out


def test_rules_that_are_asked_for_go_before_those_of_the_run(made, capsys):
    uri, _ = made
    plans = {
        ("--keep-last", "4"): [2, 7],
        ("--keep-last", "1", "--keep-every", "4"): [6, 7],
        ("--keep-last", "1", "--keep-best", "knn_top1"): [2, 4, 7, 8],
    }
    for rules, deleted in plans.items():
        assert steps(document_of(capsys, "prune", uri, "--dry-run", *rules)["plan"]["deleted"]) == deleted, rules
    for wrong, message in (
        (["--keep-last", "0"], "--keep-last: found 0, expected at least 1"),
        (["--keep-every", "-3"], "--keep-every: found -3, expected at least 1"),
        (["--keep-best", "loss"], "found 'loss'"),
    ):
        assert main(["checkpoints", "prune", uri, "--dry-run", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_rules_of_the_run_hold_where_none_is_asked_for(made, capsys):
    uri, _ = made
    rules = {"checkpoint.keep_last": 1, "checkpoint.keep_every_steps": 4, "checkpoint.keep_best": "knn_bank_top1"}
    Run(uri).store.put(CONFIG, instdisc.recipe("quickstart", **rules).to_json().encode())
    assert steps(document_of(capsys, "prune", uri, "--dry-run")["plan"]["deleted"]) == [6, 7]
    assert steps(document_of(capsys, "ls", uri)["next_removal"]["deleted"]) == [6, 7]
    best = document_of(capsys, "prune", uri, "--dry-run", "--keep-best", "knn_top1", "--keep-every", "100")
    assert steps(best["plan"]["deleted"]) == [4, 7, 8]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "is_deleted"), [("y\n", True), ("yes\n", True), ("n\n", False), ("", False)])
def test_without_yes_a_terminal_is_asked(made, capsys, monkeypatch, answer, is_deleted):
    uri, store = made
    before = files_of(store)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert document_of(capsys, "prune", uri)["done"] == is_deleted
    assert (files_of(store) == before) != is_deleted
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    run_attempt(store, [1_000_020])
    assert main(["checkpoints", "prune", uri]) == 0
    out, err = capsys.readouterr()
    assert "will delete " in err
    assert "Delete? [y/N]" in err
    assert ("deleted nothing" in out) != is_deleted


def test_without_yes_and_without_a_terminal_nothing_is_deleted(made, capsys, monkeypatch):
    uri, store = made
    before = files_of(store)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["checkpoints", "prune", uri]) == 2
    assert "give --yes" in capsys.readouterr().err
    assert files_of(store) == before


def test_what_is_damaged_on_record_stays_unless_it_is_asked_for(tmp_path, capsys):
    uri, store = make_run(str(tmp_path / "run"))
    run_attempt(store, [2, 4, 6])
    damage(store, read_manifest(store, ManifestId(1, 6)).tensors.key)
    run_attempt(store, [8, 10, 12])
    assert document_of(capsys, "prune", uri, "--yes")["done"]
    listed = document_of(capsys, "ls", uri)["checkpoints"]
    assert [(c["step"], c["state"]) for c in listed] == [(6, "damaged"), (10, "valid"), (12, "newest")]
    assert main(["checkpoints", "ls", uri]) == 0
    assert "problem: step 6 (attempt 1): a restore found it damaged" in capsys.readouterr().out
    assert document_of(capsys, "prune", uri, "--yes", "--damaged")["done"]
    assert steps(document_of(capsys, "ls", uri)["checkpoints"]) == [10, 12]
    assert document_of(capsys, "verify", uri, "--all")["checkpoints"][0]["problems"] == []


def test_cat_prints_a_manifest_a_value_or_rows(made, capsys):
    uri, store = made
    manifest = read_manifest(store, ManifestId(1, 4))
    assert document_of(capsys, "cat", uri)["step"] == 1_000_010
    chosen = ["cat", "--step", "4", uri]
    assert document_of(capsys, *chosen, "state.normalizer") == {"z": 1.5}
    assert document_of(capsys, *chosen, "tables.bank.segments.1.key") == manifest.tables["bank"].segments[1].key
    assert document_of(capsys, *chosen, "metrics.knn_top1") == manifest.metrics["knn_top1"]
    document = document_of(capsys, *chosen, "--rows", "bank", "8", "11")
    assert document["rows"] == bank_of(4)[0][8:11].tolist()
    assert main(["checkpoints", *chosen, "--rows", "bank_last_step", "8", "10"]) == 0
    assert capsys.readouterr().out == "8  1\n9  1\n"
    for wrong, message in (
        (["state.normalizer.w"], "found no 'w' in state.normalizer; there: z"),
        (["stat"], "found no 'stat' in the manifest; there: attempt, step,"),
        (["state.step.x"], "no more names, it is a value"),
        (["--rows", "bnk", "0", "1"], "found 'bnk', expected one of bank"),
        (["--rows", "bank", "0", "1000"], "expected them in [0, 60)"),
        (["--rows", "bank", "a", "b"], "expected a table and two row numbers"),
        (["state", "--rows", "bank", "0", "1"], "beside it"),
    ):
        assert main(["checkpoints", *chosen, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_rows_that_are_not_finite_are_still_json(tmp_path, capsys):
    uri, store = make_run(str(tmp_path / "run"))
    checkpointer = begin(store)
    from cluster.checkpoint import RowTable

    rows_ND = torch.tensor([[1.0, float("nan")], [float("-inf"), 2.0]])
    checkpointer.save(1, {"bank": RowTable(2, 0, rows_ND)}, {}, {})
    checkpointer.close()
    assert document_of(capsys, "cat", uri, "--rows", "bank", "0", "2")["rows"] == [[1.0, "nan"], ["-inf", 2.0]]


def test_names_that_a_terminal_would_obey_are_printed_as_text(made, capsys):
    uri, store = made
    evil = "evil\x1b[2J\x07\nname"
    Path(store.root, "objects", evil).write_text("x")
    manifest = read_manifest(store, ManifestId(2, 1_000_010))
    store.put(manifest.id.key, replace(manifest, versions={"torch\x1b[31m": evil}, metrics={evil: 1.0}).to_bytes())
    for command in (["ls", uri], ["prune", uri, "--dry-run"], ["verify", uri], ["cat", uri], ["cat", uri, evil]):
        main(["checkpoints", *command])
        printed = "".join(capsys.readouterr())
        assert "\x1b" not in printed, command
        assert "\x07" not in printed, command
    assert main(["checkpoints", "ls", uri]) == 0
    printed = capsys.readouterr().out
    assert "not ours: objects/evil\\x1b[2J\\x07\\nname\n" in printed
    assert "torch\\x1b[31m evil\\x1b[2J\\x07\\nname" in printed
    assert evil in document_of(capsys, "ls", uri)["checkpoints"][-1]["metrics"]


def test_a_run_without_checkpoints_is_listed_and_has_nothing_to_verify(tmp_path, capsys):
    uri, store = make_run(str(tmp_path / "run"))
    assert main(["checkpoints", "ls", uri]) == 0
    assert "0 checkpoints" in capsys.readouterr().out
    assert not document_of(capsys, "prune", uri, "--yes")["done"]
    for command in ("verify", "cat"):
        assert main(["checkpoints", command, uri]) == 2
        assert f"{store.uri} has no checkpoint yet" in capsys.readouterr().err
    assert main(["checkpoints", "ls", str(tmp_path / "nowhere")]) == 2
    assert "no run at" in capsys.readouterr().err


def test_a_run_on_s3_is_listed_verified_pruned_and_goes_on(server, capsys):
    uri, store = make_run("s3://images/runs/first")
    run_attempt(store, [2, 4])
    run_attempt(store, [6])
    leave_orphan(store, 1, 5)
    listed = document_of(capsys, "ls", uri)["checkpoints"]
    assert [(c["step"], c["state"]) for c in listed] == [(2, "valid"), (4, "valid"), (5, "orphan"), (6, "newest")]
    assert document_of(capsys, "prune", uri, "--yes")["done"]
    assert steps(document_of(capsys, "verify", uri, "--all")["checkpoints"]) == [4, 6]
    run_attempt(store, [7])
    latest = read_latest(store)
    assert latest is not None
    assert torch.equal(latest.rows("bank_last_step"), bank_of(7)[1])
    damage(store, read_manifest(store, ManifestId(2, 6)).tables["bank"].increments[-1].key)
    assert main(["checkpoints", "verify", uri]) == 1, "the increments of step 6 are the newest's too"
    assert "differs from its checksum" in capsys.readouterr().out


def test_ages_and_sizes_have_one_unit():
    assert [age(s) for s in (None, -5, 0, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        *("?", "0 s", "0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 d"),
    ]
    assert [in_bytes(n) for n in (0, 999, 1000, 999_499, 999_500, 12_345_678, 10**15)] == [
        *("0 B", "999 B", "1.00 kB", "999 kB", "1.00 MB", "12.3 MB", "1,000 TB"),
    ]
