"""The command that checks a real GPU runs without one: skipped parts are named, passed parts are not run again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gpu_checks
from gpu_parts import PARTS, Part

from instdisc.doctor import UNTESTED_ON_GPU


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_without_a_gpu_every_part_is_skipped_by_name_and_nothing_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [])
    assert gpu_checks.main(["--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert results(tmp_path).keys() == PARTS.keys()
    for name in PARTS:
        assert f"{name}: skipped: no GPU" in said
    assert "0 failed" in said


def test_a_part_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    part = Part(lambda device: {}, 9, needs=("no_such_package",))
    assert gpu_checks.why_not(part, pretended=False) == "package no_such_package is not installed"
    assert gpu_checks.why_not(PARTS["nccl_all"], pretended=False) == "needs 2 GPUs, 1 here"


def test_what_passed_is_not_run_again_and_what_failed_is(tmp_path, monkeypatch, capsys):
    outcomes, asked = {"objectives": "passed", "precision": "failed"}, []

    def in_a_process(name, arguments, limit_s):
        asked.append(name)
        return {"outcome": outcomes[name], "pretended": True, "reason": "" if name == "objectives" else "why"}

    monkeypatch.setattr(gpu_checks, "in_a_process", in_a_process)
    monkeypatch.setattr(gpu_checks, "PARTS", {name: PARTS[name] for name in outcomes})
    for _ in range(2):
        assert gpu_checks.main(["--folder", str(tmp_path), "--pretended"]) == 1
    assert asked == ["objectives", "precision", "precision"]
    assert "1 failed: precision (why)" in capsys.readouterr().out


def test_a_part_finds_the_gpus_numbers_on_the_pretended_one():
    found = gpu_checks.checked("finishing", pretended=True)
    assert found["outcome"] == "passed", found
    assert found["facts"]["greatest_errors"]["crops"] == 0


def test_all_parts_together_fit_into_their_time_and_cover_what_doctor_lists():
    assert sum(part.limit_s for part in PARTS.values() if part.gpus == 1) <= 2 * gpu_checks.ALL_S
    words = {
        "mixed": "dali", "colour": "finishing", "bfloat16": "precision", "NCCL collectives": "nccl_all",
        "page-locked host memory": "bank_on_the_host", "checkpoints": "run", "forked": "forked",
    }  # fmt: skip
    for line in UNTESTED_ON_GPU:
        assert any(word in line and part in PARTS for word, part in words.items()), line


def test_the_shell_command_is_sound():
    subprocess.run(["bash", "-n", str(Path(__file__).parent / "gpu.sh")], check=True)
