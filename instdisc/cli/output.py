"""Where a command writes its result, looked at before the work and not after it."""

from __future__ import annotations

import os
from pathlib import Path


def output_file(name: str) -> Path:
    """Return the path of a file to write. Raises OSError where none can be written there."""
    path = Path(name)
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {path}: found no folder {folder}, expected one; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: found a folder, expected the name of a file to write")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"--out {path}: no permission to write there; choose another place")
    return path
