"""Doing something on every rank, and failing alike on all of them if any fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cluster.attempts import SupersededError
from cluster.failures import may_pass
from cluster.lease import RunHeldError
from cluster.stored_object import CheckpointError


class WorkerLike(Protocol):
    """What a checkpointer needs of a worker: its place in the group, and the control plane."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather_object(self, obj: Any) -> list[Any]: ...


def gather(worker: WorkerLike, action: str, reply: Callable[[], Any]) -> list[Any]:
    """Return every rank's reply, JSON-able, or raise the same CheckpointError on every rank if any of them failed.
    Collective.
    """
    cause = None
    try:
        document = {"reply": reply()}
    except Exception as error:
        cause = error
        text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        document = {"error": text, "kind": type(error).__name__, "may_pass": may_pass(error)}
    documents = worker.all_gather_object(document)
    failures = [f"rank {rank}: {d['error']}" for rank, d in enumerate(documents) if "error" in d]
    if failures:
        kinds = {d.get("kind") for d in documents}
        special = next((kind for kind in (SupersededError, RunHeldError) if kind.__name__ in kinds), None)
        if special is not None:
            raise special(next(d["error"] for d in documents if d.get("kind") == special.__name__)) from cause
        failed = CheckpointError(f"cannot {action}: {'; '.join(failures)}")
        failed.is_permanent = not all(d["may_pass"] for d in documents if "error" in d)
        raise failed from cause
    return [d["reply"] for d in documents]
