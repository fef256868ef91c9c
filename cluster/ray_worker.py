"""What runs in each worker of Ray Train: join the other workers, run the function, report what it raised."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray import cloudpickle
from ray.train.backend import Backend, BackendConfig

from cluster import patience
from cluster.failures import describe
from cluster.process_group import COLLECTIVE_TIMEOUT_S, close_groups, open_groups, thread_environment
from cluster.ray_coordinator import RayCoordination
from cluster.ray_mailbox import Orders, Post
from cluster.worker import Cause, Worker, threads_for

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

RENDEZVOUS_TIMEOUT_S = 300.0
SEND_TIMEOUT_S = 30.0
_SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


@dataclass(frozen=True)
class RayTask:
    """Everything that a worker is started with; `call` is the pickled (fn, args)."""

    call: bytes
    mailbox: Any
    threads_per_worker: int | None
    use_gpu: bool
    coordinator: Any = None
    """The handle of the coordinator's actor, where the driver started one."""
    import_path: tuple[str, ...] = ()
    """The driver's sys.path where it holds for the workers, too: on a private Ray."""

    def run(self) -> Any:
        """Run this worker's rank. Ray Train calls it in a thread of the worker's process, so no signals here."""
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        group, cause = ray.get(self.mailbox.group.remote(), timeout=SEND_TIMEOUT_S)
        known = ray.get(self.mailbox.reached.remote(), timeout=SEND_TIMEOUT_S)
        patience.expect(known, lambda kind: self.mailbox.reach.remote([kind]))
        try:
            return self._run(
                rank, world_size, context.get_local_rank(), context.get_local_world_size(), group, Cause(**cause)
            )
        except BaseException as error:
            failure = describe(error, rank, world_size)
            ray.get(self.mailbox.fail.remote(group, failure), timeout=SEND_TIMEOUT_S)
            # Ray Train has to see an error, too, but it need not carry this one, which may not be picklable.
            raise RuntimeError(f"rank {rank}: {failure.summary}") from None

    def _run(self, rank: int, world_size: int, local_rank: int, local_world_size: int, group: int, cause: Cause) -> Any:
        num_threads = threads_for(local_world_size, self.threads_per_worker)
        os.environ.update(thread_environment(num_threads))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(ray.util.get_node_ip_address()))
        import torch  # only now: OpenMP reads its environment once, when torch is loaded

        torch.set_num_threads(num_threads)
        device = _device(self.use_gpu)
        store = _open_store(rank, world_size, group, self.mailbox) if world_size > 1 else None
        control_group = open_groups(rank, world_size, device, store=store)
        orders, post = Orders(self.mailbox, group), Post(self.mailbox)
        worker = Worker(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            num_threads=num_threads,
            send_event=post.send,
            poll_stop=orders.must_stop,
            poll_leave=orders.must_leave,
            control_group=control_group,
            coordinator=RayCoordination(self.coordinator) if self.coordinator is not None else None,
            cause=cause,
        )
        sys.path.extend(folder for folder in self.import_path if folder not in sys.path)
        fn, args = cloudpickle.loads(self.call)
        result = fn(worker, *args)
        if control_group is not None:
            close_groups()
        post.flush(SEND_TIMEOUT_S)
        return result if rank == 0 else None


class WorkerBackend(Backend):
    """No set-up by Ray Train: `RayTask` does it, without a race for a port and without torch in the controller."""

    share_cuda_visible_devices = True  # NCCL reaches a neighbour's GPU directly only if it is visible


class WorkerBackendConfig(BackendConfig):
    """Selects `WorkerBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return WorkerBackend


def interface_of(address: str) -> str:
    """The name of the network interface that has this IPv4 address; the loopback interface if none has.

    gloo would otherwise take whatever the machine's name resolves to, often 127.0.0.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return "lo"


def _device(use_gpu: bool) -> torch.device:
    import torch

    if not use_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def _open_store(rank: int, world_size: int, group: int, mailbox: Any) -> Store:
    """The key-value store through which the ranks find each other; rank 0 listens on a port that the system picks."""
    from torch._C._distributed_c10d import TCPStore  # exported by torch.distributed, but not for type checkers

    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if rank == 0:
        host = ray.util.get_node_ip_address()
        # On this node's address in the cluster alone: by itself the store takes every interface, and asks for no token.
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        store = TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listening.detach(),
        )
        ray.get(mailbox.open_rendezvous.remote(group, host, store.port), timeout=SEND_TIMEOUT_S)
        return store
    host, port = ray.get(mailbox.rendezvous.remote(group), timeout=RENDEZVOUS_TIMEOUT_S)
    return TCPStore(host, port, world_size, is_master=False, wait_for_workers=False, timeout=timeout)
