"""`fit` from a person's own script."""

from __future__ import annotations

import subprocess
import sys

from cluster.store import Store


def test_a_script_without_a_main_guard_is_told_so_and_trains_nothing_twice(tmp_path):
    """Worker processes import the script that starts them."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import sys, instdisc\n"
        "few = {'optim.epochs': 1, 'data.max_rows': 64, 'data.max_test_rows': 10, 'eval.every_epochs': 0}\n"
        "config = instdisc.recipe('quickstart', **few)\n"
        "instdisc.fit(config, run=sys.argv[1] + '/here', workers=0)\n"
        "instdisc.fit(config, run=sys.argv[1] + '/processes', workers=1, launcher='local')\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "put the script's own calls below `if __name__ == '__main__':`" in done.stderr
    assert len(Store(f"{tmp_path}/here/checkpoints").list("attempts/")) == 2, "one attempt: won, and started"
