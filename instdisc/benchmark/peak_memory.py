"""How much memory a piece of work needs at its peak, measured from inside a process that does nothing else.

On a CPU it is the peak of the resident set (VmHWM, which Linux lets a process reset through /proc/self/clear_refs)
less the resident set before the work was set up; on a GPU it is what torch's allocator held at most.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch

HOW = "a child process per side, peak after warm-up (VmHWM reset, or torch.cuda.max_memory_allocated) less before"


def peak_bytes(set_up: Callable[[], Callable[[], None]], device: torch.device) -> int:
    """Return the bytes that the work which `set_up` returns holds at its peak, its own state included.

    The work runs twice: what the first run leaves behind (allocator pools, compiled code) counts, its peak does not.
    """
    before = resident_bytes("VmRSS")
    work = set_up()
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    work()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM") - before


def reset_peak() -> None:
    """Let VmHWM start anew; where the kernel forbids it, the peak is that of the whole process, set-up included."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_bytes(field: str) -> int:
    """Return a field of /proc/self/status; some kernels leave VmHWM out, and getrusage has the same figure."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
