"""Runs the parts of `gpu.sh`, each in a process of its own with a time limit, and keeps a JSON result of each."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from gpu_parts import PARTS, Part

ALL_S = 480.0
LEAST_S = 10.0
"""Seconds below which a part is not started any more."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", help="one part alone")
    parser.add_argument("--folder", type=Path, default=Path("gpu-checks"))
    parser.add_argument("--here", action="store_true", help="run the part in this process, and print its result")
    parser.add_argument("--pretended", action="store_true", help="on the pretended GPU of the tests")
    asked = parser.parse_args(arguments)
    if asked.here:
        print(json.dumps(checked(asked.part, asked.pretended)))
        return 0
    end_s = time.monotonic() + ALL_S
    for name, part in PARTS.items():
        if asked.part in (None, name):
            run(name, part, asked, end_s - time.monotonic())
    return summarise(asked.folder)


def run(name: str, part: Part, arguments: argparse.Namespace, left_s: float) -> None:
    """Run a part unless it passed before; write and tell its result."""
    if left_s < LEAST_S:
        print(f"{name}: not started, the {ALL_S / 60:.0f} minutes are over; give the command again")
        return
    path = arguments.folder / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if (before.get("outcome"), before.get("pretended")) == ("passed", arguments.pretended):
        print(f"{name}: passed before")
        return
    reason = why_not(part, arguments.pretended)
    started_s = time.monotonic()
    result = (
        {"outcome": "skipped", "reason": reason} if reason else in_a_process(name, arguments, min(part.limit_s, left_s))
    )
    result = {"part": name, **result, "seconds": round(time.monotonic() - started_s, 1)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {result['outcome']}{': ' + result['reason'] if result.get('reason') else ''}", flush=True)


def why_not(part: Part, pretended: bool) -> str:
    """Return why a part cannot run here, an empty string where it can."""
    found = len(glob.glob("/dev/nvidia[0-9]*"))
    if pretended and not part.pretended:
        return "needs a real GPU"
    if not pretended and found < part.gpus:
        return "no GPU" if found == 0 else f"needs {part.gpus} GPUs, {found} here"
    for package in part.needs:
        try:
            missing = importlib.util.find_spec(package) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            return f"package {package} is not installed"
    return ""


def in_a_process(name: str, arguments: argparse.Namespace, limit_s: float) -> dict:
    """Return the result of a part's own process, which is ended at the limit."""
    command = [sys.executable, __file__, name, "--here", *["--pretended"] * arguments.pretended]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "reason": f"no result within {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip()[-2000:]
        return {"outcome": "failed", "reason": f"exit status {done.returncode}", "output": last}
    return json.loads(lines[-1])


def checked(name: str, pretended: bool) -> dict:
    """Return the result of a part that runs in this process."""
    import torch

    from instdisc.benchmark.environment import environment

    part, device = PARTS[name], torch.device("cuda", 0)
    try:
        if pretended:
            import pytest
            from pretended_gpu import pretended_gpu

            with pretended_gpu(pytest.MonkeyPatch.context()):
                facts = part.run(device)
        else:
            torch.cuda.set_device(0)
            facts = part.run(device)
    except Exception as error:  # whatever it is, it is what the part found
        text = "".join(traceback.format_exception(error))[-3000:]
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:300], "output": text}
    return {"outcome": "passed", "facts": facts, "pretended": pretended, "environment": environment()}


def summarise(folder: Path) -> int:
    """Print how many parts passed, failed and were skipped; return 1 where one failed."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for outcome in ("passed", "failed", "skipped"):
        parts = [result for result in results if result["outcome"] == outcome]
        named = ", ".join(r["part"] + (f" ({r['reason']})" if r.get("reason") else "") for r in parts)
        print(f"{len(parts)} {outcome}{': ' + named if named else ''}")
    print(f"results: {os.path.abspath(folder)}")
    return int(any(result["outcome"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
