"""Joining the workers of a run into torch.distributed's default group, and the group of the control plane."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

COLLECTIVE_TIMEOUT_S = 1800.0


def open_groups(
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    init_method: str | None = None,
    store: Store | None = None,
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> dist.ProcessGroup | None:
    """Initialise the default group (gloo; with a GPU also NCCL) and return a gloo group for control messages.

    The control plane has a group of its own, so that its messages never interleave with the training's
    collectives. One worker needs neither: None is returned and torch.distributed stays uninitialised.

    Args:
        init_method: a URL, or else `store`: where the ranks find each other.
        timeout_s: for each collective, and for the other ranks to come.

    Raises:
        torch.distributed.DistError: the other ranks did not come within `timeout_s`.
    """
    if world_size == 1:
        return None
    import torch.distributed as dist

    dist.init_process_group(
        backend=backend_for(device),
        init_method=init_method,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    control_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(control_group, dist.ProcessGroup)  # every rank is a member of it
    return control_group


def close_groups() -> None:
    """Leave all groups. Only after an orderly end: with a dead peer, leaving a group can wait for ever."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """The torch.distributed backend of workers on `device`: CPU tensors always travel by gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def device_of(local_rank: int, num_local_workers: int) -> torch.device:
    """The GPU of a worker if every worker of this machine can have its own (NCCL needs that), else the CPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() >= num_local_workers:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def thread_environment(num_threads: int) -> dict[str, str]:
    """The environment that a worker needs before torch is loaded.

    OpenMP's threads spin while they wait by default, which slows everything else on a machine with few cores down.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(num_threads)}
