"""One run of Ray Train, watched from the driver. Imported late: Ray Train takes seconds to import."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.coordination import CoordinatorSpec
from cluster.failures import Failure, WorkerDied, root_cause
from cluster.interrupts import Interrupts, held
from cluster.ray_fork import forked_runtime_env
from cluster.ray_machines import prepare
from cluster.ray_restart_limit import RestartLimit, TooManyRestartsError
from cluster.ray_restarts import Restarts
from cluster.ray_scaling import GroupSizing
from cluster.ray_worker import RayTask, WorkerBackendConfig
from cluster.worker_range import WorkerRange

POLL_INTERVAL_S = 0.2
MAILBOX_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0


class RayRun:
    """A trainer at work in a thread (in the main thread it would take SIGINT over), watched from this one."""

    def __init__(
        self,
        trainer: DataParallelTrainer,
        mailbox: Any,
        interrupts: Interrupts,
        on_event: Callable[[str], None],
    ):
        self._trainer = trainer
        self._mailbox = mailbox
        self._interrupts = interrupts
        self._on_event = on_event
        self._result: Any = None
        self._error: Exception | None = None
        # Of a thread whose join() a signal interrupted, Python 3.11 and 3.12 say that it has ended.
        self._has_ended = threading.Event()

    def finish(self) -> Any:
        """Run to the end, hand out events on the way, return rank 0's result or raise what went wrong."""
        thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        thread.start()
        try:
            self._watch()
            if self._error is not None:
                raise self._cause(ray.get(self._mailbox.failures.remote(), timeout=MAILBOX_TIMEOUT_S))
            return self._result
        finally:
            with held():
                self._end()

    def _watch(self) -> None:
        """Pass events and the wish to stop on until the end."""
        stop_sent = False
        while not self._has_ended.wait(POLL_INTERVAL_S):
            self._take()
            if self._interrupts.requested and not stop_sent:
                stop_sent = True
                self._mailbox.request_stop.remote()
        self._take()

    def _end(self) -> None:
        """End what still runs, first of all the thread: Ray ends a process in which one uses it after its shutdown."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while not self._has_ended.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(RayError):
                controller: Any = ray.get(self._mailbox.controller.remote(), timeout=END_TIMEOUT_S)
                if controller is not None:
                    ray.kill(controller)  # and with it its workers
            self._has_ended.wait(POLL_INTERVAL_S)

    def _fit(self) -> None:
        try:
            self._result = self._trainer.fit().return_value
        except Exception as error:
            self._error = error
        finally:
            self._has_ended.set()

    def _take(self) -> None:
        for event in ray.get(self._mailbox.take.remote(), timeout=MAILBOX_TIMEOUT_S):
            self._on_event(event)

    def _cause(self, failures: list[Failure]) -> BaseException:
        """What to raise: a worker's own exception, else a worker's death, else what Ray Train says."""
        given_up = self._error.controller_failure if isinstance(self._error, ControllerError) else None
        if isinstance(given_up, TooManyRestartsError):
            return given_up
        if failures and not root_cause(failures).is_echo():
            return root_cause(failures).to_exception()
        raised = {failure.rank for failure in failures}
        deaths = self._error.worker_failures if isinstance(self._error, WorkerGroupError) else {}
        for rank, error in sorted(deaths.items()):
            if rank not in raised and isinstance(error, (RayError, WorkerHealthCheckFailedError)):
                death = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
                return WorkerDied(rank, None, str(death))
        if failures:
            return root_cause(failures).to_exception()
        assert self._error is not None
        return self._error


class _TellController(ControllerCallback):
    """Tells the mailbox the handle of Ray Train's controller."""

    def __init__(self, mailbox: Any):
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        self._mailbox.controller_started.remote(ray.get_runtime_context().current_actor)


class _EndWorkers(WorkerGroupCallback):
    """Ends workers before Ray Train asks them to end: for those on a dead machine it waits 1 to 5 s."""

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        for worker in worker_group.get_workers():
            ray.kill(worker.actor)


class _Trainer(DataParallelTrainer):
    """Ray Train with policies of our own, and on a private Ray without what only a shared cluster needs."""

    def __init__(self, *args: Any, sizing: GroupSizing, restarts: Restarts, is_private: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sizing, self._restarts, self._is_private = sizing, restarts, is_private

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs |= {"scaling_policy": self._sizing, "failure_policy": self._restarts}
        if self._is_private:  # an actor that costs seconds to start
            kwargs["callbacks"] = [c for c in kwargs["callbacks"] if not isinstance(c, PlacementGroupCleanerCallback)]
        return super()._initialize_and_run_controller(**kwargs)


def _prepare(runtime_env: dict[str, Any], machine_id: str) -> None:
    """As `prepare`, with what Ray Train adds to the environment of its workers: others have another fork server."""
    prepare(WorkerGroup._get_worker_runtime_env(runtime_env), machine_id)


def start_run(
    task: RayTask,
    workers: WorkerRange,
    is_private: bool,
    interrupts: Interrupts,
    on_event: Callable[[str], None],
    coordinator: CoordinatorSpec | None,
    preload: Sequence[str],
) -> Any:
    """Run `task` on Ray Train workers and return rank 0's result; see `run_on_ray`. on_event: takes JSON text."""
    scaling = ScalingConfig(num_workers=workers.most, use_gpu=task.use_gpu)
    failure = FailureConfig(max_failures=0)
    limit = RestartLimit(task.mailbox, coordinator) if coordinator else None
    runtime_env = forked_runtime_env(ray.get_runtime_context().runtime_env, preload)
    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = _Trainer(
            task.run,
            backend_config=WorkerBackendConfig(),
            scaling_config=scaling,
            run_config=RunConfig(
                storage_path=folder,
                failure_config=failure,
                worker_runtime_env=runtime_env,
                callbacks=[_TellController(task.mailbox), _EndWorkers()],  # pyright: ignore[reportArgumentType] - narrow
            ),
            sizing=GroupSizing(
                scaling,
                workers,
                task.mailbox,
                asks_for_machines=not is_private,
                prepare=partial(_prepare, runtime_env) if runtime_env else None,
                limit=limit,
            ),
            restarts=Restarts(failure, task.mailbox, limit),
            is_private=is_private,
        )
        return RayRun(trainer, task.mailbox, interrupts, on_event).finish()
