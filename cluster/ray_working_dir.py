"""The folder that a job runs in, packed for its upload without what must not or need not leave this machine."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes, create_package

from cluster.job import JobRefusedError

EXCLUDES = (
    *(".git", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis"),
    *("/data", "/runs"),
    # Secrets: whoever may see the cluster could read them there.
    *(".env", ".env.*", ".netrc", ".aws", ".ssh", ".kube", ".docker", ".gnupg", ".pypirc", "auth_token"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "*credentials*", "*.tfstate*"),
)
"""As in .gitignore. What .gitignore and .rayignore name in the folder is left out, too."""
_NUM_NAMED = 5
_SILENT = logging.getLogger("cluster.ray_working_dir")


@dataclass(frozen=True)
class WorkingDir:
    """A folder as it was packed. package: a zip file; the same for every submission, whatever changes meanwhile."""

    package: Path
    num_files: int
    num_bytes: int


def pack_working_dir(folder: Path, target: Path, limit_bytes: int = DASHBOARD_CLIENT_MAX_SIZE) -> WorkingDir:
    """Pack `folder` into a new zip file in the folder `target`.

    JobRefusedError where it is no folder, or has more than `limit_bytes` (what Ray takes; it does not compress).
    """
    if not folder.is_dir():
        raise JobRefusedError(f"--working-dir {folder}: expected a folder, found {_kind(folder)}")
    sizes: Counter[str] = Counter()

    def weigh(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] += path.stat().st_size

    _SILENT.setLevel(logging.ERROR)
    _dir_travel(folder, [_get_excludes(folder, list(EXCLUDES))], weigh, include_gitignore=True, logger=_SILENT)
    if sizes.total() > limit_bytes:
        raise JobRefusedError(
            f"--working-dir {folder}: found {_mb(sizes.total())} in {len(sizes):,} files, expected at most "
            f"{_mb(limit_bytes)}, which is what Ray takes. The largest: {_largest(sizes)}. Name what the job does not "
            "need in a file .rayignore there (as in .gitignore), and keep data on S3"
        )
    package = target / "working_dir.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=list(EXCLUDES), logger=_SILENT)
    return WorkingDir(package, len(sizes), sizes.total())


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
