"""Spare processes on the machines of a run, so that the next group of workers begins in a moment.

A worker's process takes many seconds to start: Python, Ray, torch and all that training imports. While a group trains,
each worker lets Ray start one more process on its machine, which imports the same and then has nothing to do. Ray keeps
it, as long as a machine has no more processes than cores, and gives it to the next worker that it starts there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SPARE_AFTER_S = 15.0
"""From the start of a worker until its spare is started: the first steps should not wait for it."""
HOLD_S = 5.0
"""For which a spare is held, so that the spares of several workers of a machine are different processes."""


def start_spare_later(modules: Sequence[str], environment: dict[str, str], import_path: Sequence[str]) -> None:
    """Start a spare for this worker's machine in a while. modules: what it imports. environment: set before."""

    def start() -> None:
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # The same environment as this worker's, which Ray hands on: only then is the process taken for another one.
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(become_spare)
        with contextlib.suppress(RayError):
            remote.remote(list(modules), environment, list(import_path))

    timer = threading.Timer(SPARE_AFTER_S, start)
    timer.daemon = True
    timer.start()


def become_spare(modules: list[str], environment: dict[str, str], import_path: list[str]) -> int:
    """Import what a worker needs; return the process's number."""
    started_s = time.monotonic()
    os.environ.update(environment)
    sys.path.extend(folder for folder in import_path if folder not in sys.path)
    for module in modules:
        importlib.import_module(module)
    time.sleep(max(0.0, HOLD_S - (time.monotonic() - started_s)))
    return os.getpid()
