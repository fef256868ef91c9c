"""What a training needs to be a job on a cluster: a name, a command line, and nothing that must not be seen there."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.attempts import manifest_ids
from cluster.credentials import is_secret_argument, is_secret_variable, without_credentials
from cluster.manifest import ManifestId
from cluster.worker_range import parse_workers
from instdisc.config import TrainConfig
from instdisc.config_sections import ConfigError
from instdisc.launch import absolute
from instdisc.runs import Run, usable_workers

_LONGEST_SLUG = 40
_ADVICE = (
    "Give the cluster's machines a role that may read and write the bucket (on AWS an instance profile, on Kubernetes "
    "a service account with IRSA); then no key has to travel"
)


def job_name(uri: str) -> str:
    """Return the beginning of the ids of a run's jobs: readable, and another one for another run."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", uri.rstrip("/").rpartition("/")[2]).strip("-")[:_LONGEST_SLUG]
    return f"instdisc-{slug or 'run'}-{hashlib.sha256(uri.encode()).hexdigest()[:6]}"


def train_command(recipe: str, uri: str, workers: str, overrides: Sequence[str]) -> str:
    """Return the command line that trains on the cluster.

    workers: a number, or MIN..MAX. Raises ConfigError for what must not stand in it, ValueError for other workers.
    """
    if parse_workers(workers) == (0, 0):
        raise ConfigError("--workers: found 0, expected at least 1: the driver runs on the head, which trains nothing")
    # Not the script `instdisc`: this finds the package in the job's working directory, too.
    arguments = ["python", "-m", "instdisc.cli.main", "train", recipe, "--run", uri, "--workers", workers, *overrides]
    for argument in arguments:
        if is_secret_argument(argument):
            raise ConfigError(
                f"{without_credentials(argument)!r}: found a user name or password, or a signature, which everybody "
                f"who sees the cluster's jobs could read. {_ADVICE}"
            )
    return shlex.join(arguments)


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables of these names. Raises ConfigError for one that is not set or looks secret."""
    variables = {}
    for name in names:
        if "=" in name:
            raise ConfigError(f"--env: found {name.partition('=')[0]}=…, expected a name; its value is taken from here")
        if name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here; set it, or leave the option out")
        if is_secret_variable(name, os.environ[name]):
            raise ConfigError(
                f"--env {name}: this looks like a credential, and the variables of a job are shown in the dashboard to "
                f"everybody who may see it. {_ADVICE}"
            )
        variables[name] = os.environ[name]
    return variables


def run_on_cluster(uri: str | None, host_names: Callable[[], set[str]], *, is_shared: bool) -> str:
    """Return the run's URI as the cluster's machines find it. Raises ConfigError where they surely do not.

    host_names: of the machines of the cluster. is_shared: whether folders are the same on all of them.
    """
    advice = "give --run s3://… (or another URI that the cluster's machines and this one reach)"
    if uri is None:
        raise ConfigError(f"--run: expected where the run is to live; {advice}")
    if uri.startswith("memory://"):
        raise ConfigError(f"--run {uri}: found memory that ends with each process; {advice}")
    place = absolute(uri)
    if "://" in place.removeprefix("file://"):
        return place.rstrip("/")
    path = str(Path(place.removeprefix("file://")))
    if not is_shared:
        others = host_names() - {socket.gethostname()}
        if others:
            raise ConfigError(
                f"--run {uri}: found a folder of this machine ({socket.gethostname()}), and the cluster runs on "
                f"{', '.join(sorted(others))}; {advice}, or --shared-folder if {path} is the same folder on all of them"
            )
    return path


def require_groups(uri: str, config: TrainConfig, workers: str) -> None:
    """Raise ConfigError where the run has fewer normalisation groups than workers; nothing where it cannot be read."""
    try:
        stored = Run(uri).config()
    except (OSError, ValueError, ImportError):
        return  # the driver will look
    usable_workers(stored or config, *parse_workers(workers))


def newest_checkpoint(uri: str) -> ManifestId | None:
    """Return the newest checkpoint of a run, None where it has none."""
    return max(manifest_ids(Run(uri).checkpoints()), default=None)
