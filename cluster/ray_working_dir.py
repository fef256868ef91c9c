"""The folder that a job runs in, packed for its upload without what must not or need not leave this machine."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes, create_package

from cluster.credentials import is_secret_file
from cluster.job import JobRefusedError

EXCLUDES = (
    *(".git", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis"),
    *("/data", "/runs", "wandb", "mlruns", "lightning_logs"),
)
"""As in .gitignore. What .gitignore and .rayignore name in the folder is left out, too, and what holds credentials:
whoever may see the cluster could read them there."""
_LOOKED_AT_BYTES = 2**20
_NUM_NAMED = 5
_SILENT = logging.getLogger("cluster.ray_working_dir")


@dataclass(frozen=True)
class WorkingDir:
    """A folder as it was packed. package: a zip file; the same for every submission, whatever changes meanwhile."""

    package: Path
    num_files: int
    num_bytes: int
    secrets: tuple[str, ...]
    """Files that were left out because they look as if they held credentials."""


def pack_working_dir(folder: Path, target: Path, limit_bytes: int = DASHBOARD_CLIENT_MAX_SIZE) -> WorkingDir:
    """Pack `folder` into a new zip file in the folder `target`.

    JobRefusedError where it is no folder, holds a link that leads out of it, or has more than `limit_bytes` (what Ray
    takes; it does not compress).
    """
    if not folder.is_dir():
        raise JobRefusedError(f"--working-dir {folder}: expected a folder, found {_kind(folder)}")
    sizes, secrets = _look(folder)
    if sizes.total() > limit_bytes:
        raise JobRefusedError(
            f"--working-dir {folder}: found {_mb(sizes.total())} in {len(sizes):,} files, expected at most "
            f"{_mb(limit_bytes)}, which is what Ray takes. The largest: {_largest(sizes)}. Name what the job does not "
            "need in a file .rayignore there (as in .gitignore), and keep data on S3"
        )
    package = target / "working_dir.zip"
    excludes = [*EXCLUDES, *map(_pattern_of, secrets)]
    create_package(str(folder), package, include_gitignore=True, excludes=excludes, logger=_SILENT)
    with zipfile.ZipFile(package) as packed:
        kept = sorted(set(secrets) & set(packed.namelist()))
    if kept:
        package.unlink()
        raise JobRefusedError(
            f"--working-dir {folder}: found {kept[0]!r}, which looks as if it held credentials, with a name that Ray's "
            "packing cannot leave out; move it out of the folder, or rename it"
        )
    return WorkingDir(package, len(sizes), sizes.total(), tuple(secrets))


def _look(folder: Path) -> tuple[Counter[str], list[str]]:
    """Return the bytes of each file to pack, by its name below `folder`, and the names of those with credentials."""
    sizes: Counter[str] = Counter()
    secrets: list[str] = []
    root = folder.resolve()

    def look(path: Path) -> None:
        name = path.relative_to(folder)
        try:
            str(name).encode()
        except UnicodeEncodeError:
            raise JobRefusedError(
                f"--working-dir {folder}: found the name {str(name)!r}, which is not UTF-8, expected one that a zip "
                "file can hold; rename it"
            ) from None
        if path.is_symlink() and not _leads_inside(path, root):
            raise JobRefusedError(
                f"--working-dir {folder}: found {name}, a link to {os.readlink(path)}, which is outside this folder or "
                "contains the link itself; expected links to other places inside. Name it in a file .rayignore there, "
                "or put what it links to in its place"
            )
        if path.is_file():
            with path.open("rb") as file:
                beginning = file.read(_LOOKED_AT_BYTES)
            names = {name, path.resolve().relative_to(root)}  # a link may have a harmless one
            if any(is_secret_file(PurePosixPath(each), beginning) for each in names):
                secrets.append(str(name))
            else:
                sizes[str(name)] += path.stat().st_size

    _SILENT.setLevel(logging.ERROR)
    _SILENT.addFilter(lambda record: not record.msg.startswith("Issue with path"))  # our error names it
    _dir_travel(folder, [_get_excludes(folder, list(EXCLUDES))], look, include_gitignore=True, logger=_SILENT)
    return sizes, sorted(secrets)


def _leads_inside(link: Path, root: Path) -> bool:
    """Whether a link leads to a place below `root` that does not contain the link: such a folder would have no end."""
    try:
        end = link.resolve(strict=True)
    except (OSError, RuntimeError):  # a broken link, or one that leads to itself
        return False
    return end.is_relative_to(root) and not link.parent.resolve().is_relative_to(end)


def _pattern_of(name: str) -> str:
    """Return a line of a .gitignore that names this one file."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)


def _largest(sizes: Counter[str]) -> str:
    """Name the largest entries of the folder itself, subfolders as a whole."""
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        first, inside, _ = name.partition("/")
        entries[first + inside] += size
    return ", ".join(f"{name} ({_mb(size)})" for name, size in entries.most_common(_NUM_NAMED))


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing"
