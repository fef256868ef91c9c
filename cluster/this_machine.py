"""How many workers make sense on this machine. Imports neither torch nor Ray."""

from __future__ import annotations

import os
from pathlib import Path

MOST_PER_CORE, MOST_ON_FEW_CORES = 4, 4
_DEVICES = Path("/dev")


def usable_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_gpus(devices: Path = _DEVICES) -> int:
    """Return the NVIDIA GPUs that this process may use: those of the machine, or what CUDA_VISIBLE_DEVICES leaves."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return sum(device.name.removeprefix("nvidia").isdigit() for device in devices.glob("nvidia*"))


def workers_here(least: int, most: int, *, num_cores: int, num_gpus: int) -> tuple[int, str]:
    """Return how many of `least` to `most` workers to start on one machine, and what to say of it ("": nothing).

    ValueError for more than make sense, and for more than there are GPUs where there are any: they would train on CPUs.
    """
    if 0 < num_gpus < least:
        raise ValueError(
            f"workers: found {least}, and this machine has {_counted(num_gpus, 'GPU')}. Every worker has a GPU of its "
            f"own, or all train on the CPU: give --workers {num_gpus}, or set CUDA_VISIBLE_DEVICES= (empty) for the CPU"
        )
    limit = max(MOST_ON_FEW_CORES, MOST_PER_CORE * num_cores)
    sensible = num_gpus or num_cores
    if least > max(limit, num_gpus):
        raise ValueError(
            f"workers: found {least}, and this machine has {_counted(num_cores, 'usable core')}. Each worker is a "
            f"process that wants a core and some 0.3 GB: give --workers {sensible} (at most {max(limit, num_gpus)}), "
            "or the --address of a cluster"
        )
    chosen = max(least, min(most, sensible))
    if chosen == most:
        return most, ""
    there = _counted(num_gpus, "GPU") if num_gpus else _counted(num_cores, "usable core")
    return chosen, f"{chosen} of {least}..{most} workers: this machine has {there}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
