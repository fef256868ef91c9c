"""`run_on_ray`: run workers in Ray Train, on a private Ray on this machine or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray._private.state import state
from ray.cloudpickle import cloudpickle

from cluster import patience
from cluster.coordination import CoordinatorSpec, wish_for_save
from cluster.interrupts import Interrupts, held
from cluster.ray_coordinator import RayCoordination, close_coordinator, start_coordinator
from cluster.ray_mailbox import start_mailbox
from cluster.ray_session import RayClusterError, ray_session
from cluster.worker import noticing
from cluster.worker_range import WorkerRange

__all__ = ["RayClusterError", "run_on_ray"]


def run_on_ray(
    fn: Callable[..., Any],
    num_workers: int | WorkerRange,
    *args: Any,
    address: str | None = None,
    use_gpu: bool | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    threads_per_worker: int | None = None,
    quiet: bool = True,
    preload: Sequence[str] = (),
    coordinator: CoordinatorSpec | None = None,
) -> Any:
    """Run `fn(worker, *args)` on Ray Train workers and return rank 0's result.

    With a coordinator, workers that die or lose each other are followed by others, which call `fn` again; so are those
    that leave (`Worker.leave_requested`), because a machine is about to be taken away or there is room for more. What
    `fn` itself raises ends the run.

    Args:
        fn: a function that the workers can import, or one of the main script; its result is plain data.
        num_workers: a number, or from how many to how many there may be (with a coordinator).
        address: host:port of a running cluster, or "auto". None: the cluster that RAY_ADDRESS names (so inside
            `ray job submit`), else a private Ray on this machine that ends with the call.
        use_gpu: a GPU for each worker; None: if Ray has enough of them, or its autoscaler may start enough.
        on_event: called here, a fraction of a second late, with what rank 0 gives to `Worker.emit`.
        threads_per_worker: default: the worker machine's usable cores, divided among its workers.
        quiet: print nothing of Ray's.
        preload: modules that the workers would import anyway: each machine imports them once, see `ray_fork_server`.
            Importing them must start no threads.
        coordinator: of the checkpoints of a run: an actor beside the driver for the time of the call, which Ray starts
            again if it dies. Workers call it through `Worker.coordinator`.

    Ctrl-C and SIGTERM as in `cluster.worker.run_local`: the first asks the workers to return, the second ends them.

    Raises:
        ValueError: `num_workers` is not positive.
        RayClusterError: no cluster answers at `address`.
        WorkerDied: a worker process or its machine is gone.
        Exception: whatever a worker raised, with the rank as a note.
    """
    if isinstance(num_workers, int) and num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; give 1 or more, or use run_local to run without Ray")
    workers = WorkerRange(least=num_workers, most=num_workers) if isinstance(num_workers, int) else num_workers
    if coordinator is None and workers.least != workers.most:
        raise ValueError("workers: found a range, but no coordinator of checkpoints from which other workers go on")
    with Interrupts() as interrupts, ray_session(address, workers.most, quiet) as is_private:
        mailbox = start_mailbox()
        mailbox.reach.remote(patience.reached())
        # Only now: Ray Train takes seconds to import, and Ray's processes start meanwhile.
        from cluster.ray_run import start_run
        from cluster.ray_worker import RayTask

        if use_gpu is None:
            num_gpus = _most_gpus()
            use_gpu = num_gpus >= workers.least
            if not use_gpu and num_gpus and on_event is not None:
                text = (
                    f"warning: training on CPUs, as {workers.least} workers were asked for and the cluster has "
                    f"{num_gpus:g} GPUs: give --workers {num_gpus:g} to use them"
                )
                on_event({"kind": "message", "text": text, "keep": True})
        import_path = tuple(sys.path) if is_private else ()
        actor = start_coordinator(coordinator) if coordinator else None
        task = RayTask(
            call=cloudpickle.dumps((fn, args)),
            mailbox=mailbox,
            threads_per_worker=threads_per_worker,
            use_gpu=use_gpu,
            coordinator=actor,
            import_path=import_path,
        )
        if actor is not None:
            interrupts.save_with(partial(wish_for_save, RayCoordination(actor)))
        # Without checkpoints the workers alone know what is to be done at their end.
        take = noticing(interrupts if actor is not None else None, on_event)
        interrupts.is_orderly = actor is None
        try:
            return start_run(task, workers, is_private, interrupts, take, coordinator, preload)
        finally:
            with held():
                if actor is not None:
                    close_coordinator(actor)


def _most_gpus() -> float:
    """Return the GPUs that the cluster has, or that its autoscaler may give it."""
    allowed = state.get_max_resources_from_cluster_config() or {}
    return max(ray.cluster_resources().get("GPU", 0), allowed.get("GPU", 0) or 0)
