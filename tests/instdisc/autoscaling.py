"""A job on a cluster that has no machines for it yet: they come, it trains, they go. For `test_autoscaling.py`.

Runs in a network namespace of its own (`ray_hosts.run_in_a_network`), because Ray's provider of fake machines uses a
fixed port. Prints one JSON document: the numbers of worker machines over time, and what became of the job.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray_hosts

HEAD_ID = "f" * 51 + "00000"
WORKERS, IDLE_MINUTES = 2, 0.2
START_TIMEOUT_S, JOB_TIMEOUT_S, END_TIMEOUT_S = 60.0, 300.0, 120.0
CONFIG: dict[str, Any] = {
    "cluster_name": "autoscaling-test",
    "max_workers": WORKERS,
    "idle_timeout_minutes": IDLE_MINUTES,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}},
        "worker": {"resources": {"CPU": 1}, "min_workers": 0, "max_workers": WORKERS, "node_config": {}},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 10,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("initialization_commands", "setup_commands", "cluster_synced_files")},
    **{f"{kind}_{what}": [] for kind in ("head", "worker") for what in ("setup_commands", "start_ray_commands")},
}


def main(folder: Path) -> int:
    config = folder / "autoscaling.json"  # JSON is YAML
    config.write_text(json.dumps(CONFIG))
    sockets = tempfile.mkdtemp(prefix="ra-")
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": "",
    }
    ray = str(Path(sys.executable).parent / "ray")
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(
            [
                *(ray, "start", "--head", "--port=6379", "--num-cpus=0", f"--autoscaling-config={config}", "--block"),
                *(f"--temp-dir={sockets}", "--disable-usage-stats", "--dashboard-port=8265"),
                f"--object-store-memory={ray_hosts.OBJECT_STORE_BYTES}",
            ],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        print(json.dumps(watch(ray, folder, environment)))
        return 0
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(30)
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()


def watch(ray: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Submit the job and note how many machines there are until they are gone again."""
    seen: list[tuple[float, int]] = []
    environment = {**environment, "RAY_ADDRESS": "http://127.0.0.1:8265"}
    started_s = time.monotonic()
    probe = subprocess.Popen(
        [sys.executable, "-c", _PROBE], env={**environment, "RAY_ADDRESS": "127.0.0.1:6379"}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert probe.stdout is not None

    def look() -> int:
        assert probe.stdout is not None
        number = int(probe.stdout.readline())
        if not seen or seen[-1][1] != number:
            seen.append((round(time.monotonic() - started_s, 1), number))
        return number

    assert look() == 0
    train = [sys.executable, "-m", "instdisc.cli.main", "train", "quickstart", "--run", str(folder / "run")]
    train += ["--workers", f"1..{WORKERS}", "--optim.epochs", "2", "--eval.every_epochs", "0", "--eval.baselines", "no"]
    working = folder / "working"
    working.mkdir()
    job = subprocess.Popen(
        [ray, "job", "submit", "--working-dir", str(working), "--", *train],
        env=environment, stdout=open(folder / "job.log", "wb"), stderr=subprocess.STDOUT,  # noqa: SIM115
    )  # fmt: skip
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while job.poll() is None:
        assert time.monotonic() < deadline, (folder / "job.log").read_text()
        look()
    deadline = time.monotonic() + END_TIMEOUT_S
    while look() > 0:
        assert time.monotonic() < deadline, "the machines stay"
    probe.kill()
    return {"exit_code": job.returncode, "machines": seen, "log": (folder / "job.log").read_text()}


_PROBE = """
import ray, time
deadline = time.monotonic() + 60
while True:
    try:
        ray.init(address="127.0.0.1:6379", logging_level="ERROR", log_to_driver=False)
        break
    except ConnectionError:
        assert time.monotonic() < deadline
        time.sleep(0.5)
while True:
    print(sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()), flush=True)
    time.sleep(0.3)
"""

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
