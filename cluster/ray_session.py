"""A Ray to run on: a private one on this machine, or a connection to a running cluster; and silence."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import ray
import ray._private.utils
import ray._private.worker
import ray._raylet as raylet
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from cluster.environment import environment
from cluster.interrupts import held, kept_from_parts

_UV_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
CONNECT_TIMEOUT_S = 6.0
PROBE_TIMEOUT_S = 3.0
REMOVE_TIMEOUT_S = 5.0
# The one address for which Ray's processes listen on loopback only; for 127.0.0.2 they take every interface.
_LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20  # nothing large goes through Ray here; the least that Ray takes is 75 MiB

# Read by Ray in this process and inherited by the processes of a private Ray.
_PRIVATE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray replaces 127.0.0.1 by the address of the network card
}
_TRAIN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # we look ourselves (ray_scaling), more often
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # for machines that are there; we wait for others before
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end of a worker is seen; the default is 2 s
}
_ON_A_CLUSTER = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}  # the dashboard's page for trainings
_SYSTEM_CONFIG = {
    "worker_niceness": 0,  # the default of 15 makes workers wait for everything else on a desktop
    "enable_worker_prestart": False,  # idle processes; ours come with their own environment
    "prestart_worker_first_driver": False,
}


class RayClusterError(ConnectionError):
    """No Ray cluster answers at the given address."""

    def __init__(self, address: str, reason: str):
        self.address = address
        self.reason = reason
        super().__init__(
            f"no Ray cluster at {address!r}: {reason}. Expected the host:port of a cluster's head (its GCS port, 6379 "
            "unless chosen otherwise), or 'auto' on a machine of the cluster. Check that the head is up (`ray status "
            "--address HOST:PORT`), that this machine may reach it, and that both use the same Ray version and "
            "authentication token; leave the address out to run on this machine alone"
        )

    def __reduce__(self):
        return RayClusterError, (self.address, self.reason)


@contextlib.contextmanager
def ray_session(address: str | None, num_workers: int, quiet: bool) -> Iterator[bool]:
    """A connection to Ray for the time of the context; yields whether it is a private Ray on this machine.

    Args:
        address: of a running cluster. None: the one that RAY_ADDRESS names (`ray job submit` sets it), else a new
            private Ray, which listens on loopback only, asks for a token of its own, and is gone afterwards.

    Raises:
        RayClusterError: nothing answers at `address`.
    """
    if ray.is_initialized():  # the caller's own, for instance around several runs: use it and leave it open
        with environment(_TRAIN_ENVIRONMENT, overwrite=False), _silence(quiet):
            yield ray.get_runtime_context().gcs_address.startswith(f"{_LOOPBACK}:")
        return
    address = address or os.environ.get("RAY_ADDRESS")
    with environment(_TRAIN_ENVIRONMENT, overwrite=False), _silence(quiet), _without_handlers():
        if address is None:
            with _private_ray(num_workers, quiet):
                yield True
        else:
            with environment(_ON_A_CLUSTER, overwrite=False):
                _connect(address, quiet)
                try:
                    yield False
                finally:
                    ray.shutdown()


class _SmallNode(Node):
    """A head node without the dashboard's server, which takes 3 s of CPU time to start and serves nobody here."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None: ...


@contextlib.contextmanager
def _private_ray(num_workers: int, quiet: bool) -> Iterator[None]:
    """Start and stop a Ray with as few processes as `ray.init` cannot: no autoscaler, no log monitor if quiet."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Short: Ray's unix sockets lie below it (limit: 107 bytes). Ray opens its own folder to everybody, sockets and logs
    # included, so it gets one inside a folder that is this user's alone.
    parent = Path(tempfile.mkdtemp(prefix="ray-"))
    folder = parent / "r"
    node = None
    try:
        with environment({**_PRIVATE_ENVIRONMENT, **token}, overwrite=False), _no_network():
            _reread_token()
            parameters = RayParams(
                num_cpus=max(num_workers, len(os.sched_getaffinity(0))),
                object_store_memory=OBJECT_STORE_BYTES,
                node_ip_address=_LOOPBACK,
                temp_dir=str(folder),
                include_dashboard=False,
                include_log_monitor=not quiet,  # pyright: ignore[reportArgumentType] - Ray's annotation is wrong
                no_monitor=True,
                min_worker_port=0,
                max_worker_port=0,
                _system_config=_SYSTEM_CONFIG,
            )
            with held(), kept_from_parts(but=[signal.SIGTERM]), _in_sessions_of_their_own():
                node = _SmallNode(
                    parameters, head=True, shutdown_at_exit=True, spawn_reaper=True, ray_init_cluster=True
                )
            _connect(str(node.address), quiet, folder)
            yield
    finally:
        ray.shutdown()
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        _reread_token()
        _remove(parent)


@contextlib.contextmanager
def _in_sessions_of_their_own() -> Iterator[None]:
    """Processes that Ray starts inside leave the driver's process group.

    A signal to the group (`timeout`, a terminal, a supervisor) would end them before the driver has saved. They cannot
    block SIGTERM instead: it is how Ray ends them. The kernel still kills them with the driver (spawn_reaper).
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, start_new_session=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextlib.contextmanager
def _no_network() -> Iterator[None]:
    """The same as RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, which this process read when it imported Ray."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _remove(folder: Path) -> None:
    """Remove Ray's folder, in which its last processes may still be writing while they end."""
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.05)


def _connect(address: str, quiet: bool, folder: Path | None = None) -> None:
    # Under `uv run` Ray would send the whole working directory, data and secrets in it, to every node and start each
    # worker there in an environment of its own. Nodes have the project installed (or `ray job submit` brings it).
    if _UV_VARIABLE not in os.environ:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        if address != "auto":
            _probe(address)
        ray.init(
            address=address,
            log_to_driver=not quiet,
            logging_level=logging.ERROR if quiet else logging.INFO,
            configure_logging=not quiet,
            _temp_dir=None if folder is None else str(folder),
        )
    except RayClusterError:
        raise
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise RayClusterError(address, str(error).splitlines()[0]) from error


def _probe(address: str) -> None:
    """Fail soon where `ray.init` would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise RayClusterError(address, "this is not of the form host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise RayClusterError(address, f"cannot connect ({error})") from error
    channel: Any = init_grpc_channel(address)
    head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    request = gcs_service_pb2.CheckAliveRequest()  # pyright: ignore[reportAttributeAccessIssue] - generated
    try:
        head.CheckAlive(request, timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
    except grpc.RpcError as error:
        code: Any = error
        if code.code() == grpc.StatusCode.UNAUTHENTICATED:
            reason = "it refuses the authentication token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)"
        else:
            reason = f"something listens there, but does not answer as a Ray head within {CONNECT_TIMEOUT_S:g} s"
        raise RayClusterError(address, reason) from error
    finally:
        channel.close()


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Keep what Ray logs and prints in this process from the terminal."""
    if not quiet:
        yield
        return
    logger = logging.getLogger("ray")
    level, print_worker_logs = logger.level, ray._private.worker.print_worker_logs
    logger.setLevel(logging.CRITICAL)
    # The raylet's messages (a worker died) are printed even with log_to_driver=False; we raise WorkerDied instead.
    ray._private.worker.print_worker_logs = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")  # Ray warns of its own defaults
            yield
    finally:
        logger.setLevel(level)
        ray._private.worker.print_worker_logs = print_worker_logs


@contextlib.contextmanager
def _without_handlers() -> Iterator[None]:
    """Keep Ray from taking SIGTERM over, which it would do for good, and can do in the main thread alone."""
    before = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = before


def _reread_token() -> None:
    """Ray's C++ part keeps the authentication mode and token that it read first in this process."""
    raylet.Config.initialize("")  # pyright: ignore[reportAttributeAccessIssue] - compiled
    raylet.AuthenticationTokenLoader.instance().reset_cache()  # pyright: ignore[reportAttributeAccessIssue]
