"""The machine and the software that a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("instdisc", "torch", "torchvision", "numpy", "pillow", "ray", "nvidia-dali-cuda130")
GIT_TIMEOUT_S = 10


def environment() -> dict[str, Any]:
    """Return hardware, threads, versions, commit, date and load of this process's machine, JSON-able.

    Raises nothing: what cannot be found out is None.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "num_gpus": torch.cuda.device_count() if has_gpu else 0,
        "load_average": list(os.getloadavg()),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},  # with its CUDA
        "commit": commit(Path(__file__).parent),
    }


def cpu_model() -> str | None:
    """Return the processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def commit(folder: Path) -> str | None:
    """Return the commit of the working tree that holds `folder`, with "-dirty" where files differ; None without one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
