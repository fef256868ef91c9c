"""`run_on_ray`: run workers in Ray Train, on a private Ray on this machine or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.cloudpickle import cloudpickle

from cluster.coordination import CoordinatorSpec
from cluster.interrupts import Interrupts
from cluster.ray_coordinator import close_coordinator, start_coordinator
from cluster.ray_mailbox import start_mailbox
from cluster.ray_session import RayClusterError, ray_session

__all__ = ["RayClusterError", "run_on_ray"]


def run_on_ray(
    fn: Callable[..., Any],
    num_workers: int,
    *args: Any,
    address: str | None = None,
    use_gpu: bool | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    threads_per_worker: int | None = None,
    quiet: bool = True,
    coordinator: CoordinatorSpec | None = None,
) -> Any:
    """Run `fn(worker, *args)` on `num_workers` Ray Train workers and return rank 0's result.

    Args:
        fn: a function that the workers can import, or one of the main script; its result is plain data.
        address: host:port of a running cluster, or "auto". None: the cluster that RAY_ADDRESS names (so inside
            `ray job submit`), else a private Ray on this machine that ends with the call.
        use_gpu: a GPU for each worker; None: if Ray has enough of them now.
        on_event: called here, a fraction of a second late, with what rank 0 gives to `Worker.emit`.
        threads_per_worker: default: the worker machine's usable cores, divided among its workers.
        quiet: print nothing of Ray's.
        coordinator: of the checkpoints of a run: an actor beside the driver for the time of the call, which Ray starts
            again if it dies. Workers call it through `Worker.coordinator`.

    Ctrl-C as in `cluster.worker.run_local`: the first asks the workers to return, the second ends them.

    Raises:
        ValueError: `num_workers` is not positive.
        RayClusterError: no cluster answers at `address`.
        WorkerDied: a worker process or its machine is gone.
        Exception: whatever a worker raised, with the rank as a note.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; give 1 or more, or use run_local to run without Ray")
    with Interrupts() as interrupts, ray_session(address, num_workers, quiet) as is_private:
        mailbox = start_mailbox()
        # Only now: Ray Train takes seconds to import, and Ray's processes start meanwhile.
        from cluster.ray_run import start_run
        from cluster.ray_worker import RayTask

        if use_gpu is None:
            use_gpu = ray.cluster_resources().get("GPU", 0) >= num_workers
        import_path = tuple(sys.path) if is_private else ()
        actor = start_coordinator(coordinator) if coordinator else None
        task = RayTask(cloudpickle.dumps((fn, args)), mailbox, threads_per_worker, use_gpu, actor, import_path)
        try:
            return start_run(task, num_workers, is_private, interrupts, on_event)
        finally:
            if actor is not None:
                close_coordinator(actor)
