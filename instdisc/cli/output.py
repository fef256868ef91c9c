"""Where and how a command writes its result."""

from __future__ import annotations

import os
from pathlib import Path


def output_file(name: str) -> Path:
    """Return the path of a file to write, looked at before the work. Raises OSError where none can be written."""
    path = Path(os.path.expanduser(name))
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {path}: found no folder {folder}, expected one; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: found a folder, expected the name of a file to write")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"--out {path}: no permission to write there; choose another place")
    return path


def printable(text: str) -> str:
    """Return text from outside, such as a file's name, with what a terminal would obey or refuse as \\x1b, \\udcff."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
