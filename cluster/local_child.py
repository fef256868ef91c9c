"""What runs in a process of `run_local`: set up the worker, run the function, send back what came of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cluster import patience
from cluster.failures import describe
from cluster.interrupts import ignore_as_part
from cluster.outbox import Outbox
from cluster.process_name import set_process_name

# Kinds of messages from a worker process to its supervisor.
EVENT, RESULT, FAILURE = "event", "result", "failure"


@dataclass(frozen=True)
class LocalTask:
    """What a worker process is started with: `call`, the pickled (fn, args), and a `folder` that all ranks share."""

    call: bytes
    rank: int
    world_size: int
    num_threads: int
    folder: str
    environment: dict[str, str]
    has_coordinator: bool = False
    reached: tuple[str, ...] = ()
    """What `patience.reached` returned in the supervisor."""


def run_worker(task: LocalTask, connection: Connection) -> None:
    """Run one rank and send ("event", str)*, then ("result", bytes) or ("failure", Failure), to the supervisor.

    The supervisor sends one message at most, and it means: please stop.
    """
    ignore_as_part()
    threading.Thread(target=_die_with_parent, args=(task.folder,), name="die-with-parent", daemon=True).start()
    set_process_name(f"rank-{task.rank}")
    os.environ.clear()
    os.environ.update(task.environment)
    patience.expect(task.reached)
    outbox = Outbox()
    sender = threading.Thread(target=_send_events, args=(outbox, connection), name="events", daemon=True)
    sender.start()
    try:
        message = RESULT, _pickled_result(_run(task, outbox, connection), task.rank)
    except BaseException as error:
        message = FAILURE, describe(error, task.rank, task.world_size)
    outbox.close()
    sender.join()
    connection.send(message)
    connection.close()


def _run(task: LocalTask, outbox: Outbox, connection: Connection) -> Any:
    import torch  # only now: OpenMP reads its environment once, when torch is loaded

    from cluster.local_coordinator import LocalCoordination
    from cluster.process_group import close_groups, device_of, open_groups
    from cluster.worker import Worker

    torch.set_num_threads(task.num_threads)
    device = device_of(task.rank, task.world_size)
    fn, args = _unpickled_call(task.call)
    rendezvous = f"file://{task.folder}/rendezvous"  # a file, as a port can be taken by another process
    control_group = open_groups(task.rank, task.world_size, device, init_method=rendezvous)
    worker = Worker(
        rank=task.rank,
        world_size=task.world_size,
        local_rank=task.rank,
        device=device,
        num_threads=task.num_threads,
        send_event=outbox.put,
        poll_stop=connection.poll,
        control_group=control_group,
        coordinator=LocalCoordination(task.folder) if task.has_coordinator else None,
    )
    result = fn(worker, *args)
    if control_group is not None:
        close_groups()
    return result


def _unpickled_call(call: bytes) -> Any:
    try:
        return pickle.loads(call)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"a worker process does not find the function that it should run ({error}); define it in a module or a "
            "script (what is typed into a notebook or a shell exists there only), or use num_workers=0"
        ) from error


def _pickled_result(result: Any, rank: int) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise TypeError(
            f"rank {rank} returned a {type(result).__name__} that cannot be sent to the caller ({error}); "
            "return plain numbers, strings, lists, dicts or CPU tensors"
        ) from error


def _send_events(outbox: Outbox, connection: Connection) -> None:
    for event in outbox.drain():
        connection.send((EVENT, event))


def _die_with_parent(folder: str) -> None:
    """End this process, and remove what the supervisor would have removed, as soon as its process is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
