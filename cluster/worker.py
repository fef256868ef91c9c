"""What a worker is, and `run_local`, which runs workers on this machine without Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.coordination import Coordination, CoordinatorSpec, wish_for_save
from cluster.failures import Preempted, WorkerDied, WorkerError
from cluster.interrupts import Interrupts, held
from cluster.local_processes import run_processes

if TYPE_CHECKING:
    # Drivers supervise without torch: its import takes seconds, and its threads do not survive a fork.
    import torch
    import torch.distributed as dist

__all__ = ["Cause", "Preempted", "Worker", "WorkerDied", "WorkerError", "run_local", "threads_for"]

BEGAN = "began"
"""Kind of the event by which the driver learns of `Worker.begin`; not handed on."""
OnEvent = Callable[[dict[str, Any]], None]


def _ignore(event: str) -> None: ...


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a group of workers was started."""

    kind: str = "start"
    """"start": by a command; "failure": workers or their machine died; "drain": a machine of theirs is about to be
    taken away; "resize": there is room for more or fewer of them."""
    text: str = "started"
    """For a person: who or what."""
    since: float | None = None
    """When the group before was seen to end, in seconds since 1970 by the driver's clock; None if there was none."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the `world_size` processes of a run, as the function that it runs sees it.

    If `world_size` is greater than 1, torch.distributed's default group is initialised: gloo for CPU tensors and,
    on GPUs, NCCL for CUDA tensors.
    """

    rank: int = 0
    """0 .. world_size - 1."""
    world_size: int = 1
    local_rank: int = 0
    """The rank among the workers of this machine."""
    device: torch.device
    """Where this worker computes; with a GPU it is the current CUDA device."""
    num_threads: int = 1
    """CPU threads that this worker may use, for torch and for data together; torch is already set to it."""
    send_event: Callable[[str], None] = field(default=_ignore, repr=False)
    """Takes an event, as JSON text, to the driver without waiting."""
    poll_stop: Callable[[], bool] = field(default=_never, repr=False)
    """Says without waiting whether the driver was asked to stop."""
    poll_leave: Callable[[], bool] = field(default=_never, repr=False)
    """Says without waiting whether this group of workers is to leave."""
    control_group: dist.ProcessGroup | None = field(default=None, repr=False)
    """A gloo group for `all_gather_object` alone; None if `world_size` is 1."""
    coordinator: Coordination | None = field(default=None, repr=False)
    """The way to the coordinator of the run's checkpoints, where the driver started one."""
    cause: Cause = field(default_factory=Cause)
    """Why the group that this worker belongs to was started."""

    def begin(self) -> None:
        """Say, on every rank, that from now on there is something to save: Ctrl-C then asks for an orderly end."""
        self.emit({"kind": BEGAN, "keep": True})

    def emit(self, event: dict[str, Any]) -> None:
        """Send a small JSON-able dict to the driver's `on_event` without waiting; ranks other than 0 send nothing.

        Old events are dropped when the driver does not keep up, except those with `"keep": True`.

        Raises:
            TypeError: the event is not JSON-able (a tensor, a numpy number).
        """
        if self.rank == 0:
            self.send_event(json.dumps(event))

    def stop_requested(self) -> bool:
        """Whether the driver got Ctrl-C. Does not wait; ranks can differ for a moment, so rank 0's answer counts."""
        return self.poll_stop()

    def leave_requested(self) -> bool:
        """Whether another group of workers is to go on: all ranks save together and raise `Preempted`.

        As with `stop_requested`, rank 0's answer counts.
        """
        return self.poll_leave()

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, by rank. Collective; small JSON-able objects (tuples come back as lists).

        JSON rather than pickle: what comes in from the network is never executed.

        Raises:
            TypeError: the object is not JSON-able.
        """
        text = json.dumps(obj).encode()
        if self.world_size == 1:
            return [json.loads(text)]
        import torch
        import torch.distributed as dist

        lengths_W = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths_W, torch.tensor([len(text)]), group=self.control_group)
        padded_L = torch.zeros(int(max(lengths_W)), dtype=torch.uint8)
        padded_L[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts_WL = [torch.empty_like(padded_L) for _ in range(self.world_size)]
        dist.all_gather(texts_WL, padded_L, group=self.control_group)
        return [json.loads(bytes(text_L[:n].tolist())) for text_L, n in zip(texts_WL, lengths_W, strict=True)]


def noticing(interrupts: Interrupts | None, on_event: OnEvent | None) -> Callable[[str], None]:
    """Return what takes the workers' events, as JSON text: to `on_event`, except those that concern signals."""

    def take(text: str) -> None:
        event = json.loads(text)
        if event.get("kind") == BEGAN:
            if interrupts is not None:
                interrupts.is_orderly = event.get("has_begun", True)
        elif on_event is not None:
            on_event(event)

    return take


def threads_for(num_workers: int, threads_per_worker: int | None = None) -> int:
    """CPU threads for each of the workers of this machine: as asked, else an equal part of its usable cores."""
    if threads_per_worker is None:
        return max(1, len(os.sched_getaffinity(0)) // max(1, num_workers))
    if threads_per_worker < 1:
        raise ValueError(f"threads_per_worker is {threads_per_worker}; give 1 or more, or None for an equal part")
    return threads_per_worker


def run_local(
    fn: Callable[..., Any],
    num_workers: int,
    *args: Any,
    on_event: OnEvent | None = None,
    threads_per_worker: int | None = None,
    preload: Sequence[str] = (),
    coordinator: CoordinatorSpec | None = None,
) -> list[Any]:
    """Run `fn(worker, *args)` on `num_workers` workers on this machine and return the results by rank.

    Args:
        fn: with processes, a function at the top level of a module, like its arguments and result picklable.
        num_workers: 0 runs `fn` in this process; 1 or more starts that many processes, joined by gloo on loopback
            (and by NCCL if each can have a GPU of its own).
        on_event: called here, during the run, with what rank 0 gives to `Worker.emit`.
        threads_per_worker: default: this process's usable cores, divided among the workers.
        preload: modules that the processes would import anyway; they are imported once for all of them (at the first
            call in this process). Importing them must start no threads.
        coordinator: of the checkpoints of a run: it is started for the time of the call, in a process of its own where
            there are worker processes, and again if it dies. Workers call it through `Worker.coordinator`.

    Ctrl-C, SIGTERM and SIGHUP (in the main thread): the first makes `Worker.stop_requested()` true, so that `fn` can
    save its work and return; the second ends the workers at once with KeyboardInterrupt. So does the first one, with a
    coordinator, before a worker calls `Worker.begin`: there is nothing to save. SIGUSR1 wishes for a checkpoint.

    Raises:
        ValueError: `num_workers` is negative, or `fn` or an argument cannot be pickled.
        WorkerDied: a worker process ended by a signal or by os._exit.
        Exception: whatever a worker raised, with the rank as a note; the other workers are ended at once.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; give 0 (this process) or a number of processes")
    num_threads = threads_for(num_workers, threads_per_worker)
    with Interrupts() as interrupts:
        if num_workers == 0:
            return [_run_here(fn, args, interrupts, on_event, num_threads, coordinator)]
        take = noticing(interrupts, on_event)
        return run_processes(fn, args, num_workers, num_threads, interrupts, take, preload, coordinator)


def _run_here(
    fn: Callable[..., Any],
    args: tuple,
    interrupts: Interrupts,
    on_event: OnEvent | None,
    num_threads: int,
    coordinator: CoordinatorSpec | None,
) -> Any:
    import torch

    from cluster.process_group import device_of

    send_event = noticing(interrupts, on_event)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    service = coordinator.start() if coordinator else None
    interrupts.is_orderly = service is None
    if service is not None:
        interrupts.save_with(partial(wish_for_save, service))
    try:
        worker = Worker(
            device=device_of(0, 1),
            num_threads=num_threads,
            send_event=send_event,
            poll_stop=lambda: interrupts.requested,
            coordinator=service,
        )
        return fn(worker, *args)
    finally:
        with held():
            if service is not None:
                service.close()
        torch.set_num_threads(threads_before)
