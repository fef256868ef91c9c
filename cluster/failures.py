"""How an exception travels from a worker to the caller, and what is raised when a worker just dies.

An exception keeps its type and its text on the way, so that a caller can write `except ValueError` whatever the
number of workers; the rank and the worker's traceback come with it as a note (`BaseException.__notes__`).
"""

from __future__ import annotations

import pickle
import signal
import traceback
from dataclasses import dataclass

from cluster.patience import is_transient
from cluster.store_errors import StoreError


class WorkerDied(RuntimeError):
    """A worker process ended without a result and without an exception.

    Attributes: `rank`; `exit_code`, negative for minus the number of the signal that killed it, None if unknown;
    `signal`, or None; `detail`, what else is known.
    """

    def __init__(self, rank: int, exit_code: int | None, detail: str = ""):
        self.rank = rank
        self.exit_code = exit_code
        self.detail = detail
        self.signal = signal.Signals(-exit_code) if exit_code is not None and exit_code < 0 else None
        how = "ended" if exit_code is None else f"exited with code {exit_code}"
        how = f"was killed by {self.signal.name}" if self.signal else how
        hint = "; is the machine out of memory?" if self.signal == signal.SIGKILL else ""
        more = f":\n{detail}" if detail else ""
        super().__init__(f"the worker process of rank {rank} {how} before it returned a result{hint}{more}")

    def __reduce__(self):
        return WorkerDied, (self.rank, self.exit_code, self.detail)


class Preempted(RuntimeError):
    """This group of workers leaves, all ranks after the same step and with a checkpoint; another one goes on there.

    `step`: of the checkpoint.
    """

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"the workers leave after step {step}, which is saved; others go on")

    def __reduce__(self):
        return Preempted, (self.step,)


class WorkerError(RuntimeError):
    """A worker raised something that cannot be raised again here as itself (not picklable, or SystemExit)."""


@dataclass(frozen=True)
class Failure:
    """An exception of one rank, as it is sent to the caller."""

    rank: int
    world_size: int
    summary: str
    traceback: str
    pickled: bytes | None
    kind: str
    """The name of the exception's class."""
    may_pass: bool = False
    """Whether a connection, a device or a storage failed, so that other workers may succeed."""

    def to_exception(self) -> BaseException:
        """The exception to raise in the caller, with the rank and the worker's traceback as a note."""
        error = self._restored() or WorkerError(f"rank {self.rank}: {self.summary}")
        error.add_note(f"raised by rank {self.rank} of {self.world_size}, whose traceback was:\n{self.traceback}")
        return error

    def is_echo(self) -> bool:
        """Whether this looks like the consequence of another rank's end: a collective that lost its peer."""
        lost_peer = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")
        return any(sign in self.summary for sign in lost_peer)

    def _restored(self) -> BaseException | None:
        if self.pickled is None:
            return None
        try:
            return pickle.loads(self.pickled)
        except Exception:  # its class may not exist or may refuse to be built here
            return None


def describe(error: BaseException, rank: int, world_size: int) -> Failure:
    """Make `error`, which was just raised by `rank`, fit to be sent. Called in the worker."""
    return Failure(
        rank=rank,
        world_size=world_size,
        summary="".join(traceback.format_exception_only(error)).strip(),
        traceback="".join(traceback.format_exception(error)).rstrip(),
        pickled=_pickled(error),
        kind=type(error).__name__,
        may_pass=may_pass(error),
    )


_MAY_PASS = frozenset(
    {"ConnectionError", "TimeoutError", "DistError", "OutOfMemoryError", "AcceleratorError", "CoordinatorGoneError"}
)


def may_pass(error: BaseException) -> bool:
    """Whether a connection, a device or a storage failed, so that other workers, or the same later, may succeed."""
    # By name: whoever supervises must not import torch. is_transient knows the errors of a storage.
    names = {kind.__name__ for kind in type(error).__mro__}
    is_passing = getattr(error, "is_permanent", True) is False  # what storages and checkpoints raise
    return bool(names & _MAY_PASS) or is_passing or (isinstance(error, StoreError) and is_transient(error))


def root_cause(failures: list[Failure]) -> Failure:
    """The first failure (they come in order of arrival) that is not the echo of another one."""
    return next((failure for failure in failures if not failure.is_echo()), failures[0])


def _pickled(error: BaseException) -> bytes | None:
    if not isinstance(error, Exception):
        return None  # SystemExit or KeyboardInterrupt of a worker must not end the caller
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # an __init__ with required arguments fails only here
        return data
    except Exception:
        return None
