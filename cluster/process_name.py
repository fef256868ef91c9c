"""The name under which `top`, `ps` and the like show a process."""

from __future__ import annotations

import contextlib
from pathlib import Path


def set_process_name(name: str) -> None:
    """Name this process, up to 15 characters."""
    with contextlib.suppress(OSError):  # no Linux, or no /proc
        Path("/proc/self/comm").write_text(name)
