"""Removing old checkpoints and remains of a run that nobody trains.

The run is held meanwhile, so that a training that starts waits or is told. And because a process that has lost the run
may not know it yet, an attempt of its own is begun first: whatever others commit later is not valid. Needs no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

from cluster.attempts import record_start, win_number
from cluster.inventory import Entry, Inventory, State, take_stock
from cluster.lease import BEAT_S, LEASE_S, Holder, Lease, RunHeldError
from cluster.manifest import ManifestId, describe
from cluster.retention import Needs, Removal, Retention, plan_removal, remove
from cluster.starts import about_pruning
from cluster.store import Store
from cluster.stored_object import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a removal deletes. deleted, kept: checkpoints, oldest first. num_bytes: of the objects. problems: why more
    stays than the rules say, in sentences.
    """

    removal: Removal
    deleted: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    num_bytes: int
    problems: tuple[str, ...] = ()

    @property
    def num_objects(self) -> int:
        return len(self.removal.objects)

    @property
    def is_empty(self) -> bool:
        return not (self.removal.manifests or self.removal.objects)


def plan_prune(
    store: Store, inventory: Inventory, retention: Retention, *, damaged: bool = False, attempt: int | None = None
) -> Plan:
    """Find what nobody needs if the run goes on from what retention keeps. Reads only.

    Checkpoints that are known to be damaged or incomplete stay, and do not count as kept; `damaged`: they go.
    attempt: one without saves, newer than all; by default the next. Of a run that is held, what may be being written
    stays. CheckpointError where nothing would be left to go on from, or where it is not known what a checkpoint needs.
    """
    _require_known(inventory, damaged)
    usable = [entry.id for entry in inventory.usable]
    if inventory.chain and not usable:
        raise CheckpointError(
            f"no checkpoint of {inventory.uri} is complete, so none would be left to go on from: nothing is removed. "
            "Put the missing objects back from a copy"
        )
    broken = [entry.id for entry in inventory.chain if entry.id not in usable]
    until = (inventory.attempt + 1 if attempt is None else attempt), 0
    if inventory.is_held and attempt is None:
        until = _newest_save(inventory)
    return _plan(store, inventory, retention, usable, () if damaged else (*inventory.damaged, *broken), until)


def plan_after_next_save(store: Store, inventory: Inventory, retention: Retention) -> Plan:
    """Find what the next save of a training run removes when it is committed. Reads only.

    CheckpointError where it is not known which checkpoints are valid.
    """
    if inventory.problem:
        raise CheckpointError(inventory.problem)
    usable = [entry.id for entry in inventory.chain]
    until = _newest_save(inventory)
    last_step = usable[-1].step if usable else 0
    coming = ManifestId(inventory.attempt, last_step + 1)
    return _plan(store, inventory, retention, [*usable, coming], inventory.damaged, until)


def prune(
    store: Store,
    retention: Retention,
    *,
    damaged: bool = False,
    agree: Callable[[Plan], bool] = lambda plan: True,
    on_progress: Callable[[int, int], None] | None = None,
    lease_s: float = LEASE_S,
) -> tuple[Plan, bool]:
    """Remove what `plan_prune` finds, if `agree` says yes to it; return the plan, and whether it was carried out.

    RunHeldError if somebody trains the run: then nothing is changed. A crash leaves objects that the next removal
    finds. on_progress: takes how many deletions are done, and of how many.
    """
    held = _Held(store, lease_s)
    held.take()
    with closing(held):
        inventory = take_stock(store)
        plan = plan_prune(store, inventory, retention, damaged=damaged, attempt=inventory.attempt + 1)
        if plan.is_empty or not agree(plan):
            return plan, False
        held.require(look=True)
        number = win_number(store)
        # Only now does nobody commit any more: what was committed since the first look counts.
        inventory = take_stock(store)
        plan = plan_prune(store, inventory, retention, damaged=damaged, attempt=number)
        on_chain = inventory.usable if damaged else inventory.chain
        record_start(
            store,
            number,
            on_chain[-1].id if on_chain else None,
            () if damaged else inventory.damaged,
            about_pruning(),
        )

        def tell(done: int, total: int) -> None:
            held.require()
            if on_progress:
                on_progress(done, total)

        remove(store, plan.removal, tell)
        return plan, True


def _require_known(inventory: Inventory, damaged: bool) -> None:
    """Raise CheckpointError unless it is known what each checkpoint that stays needs."""
    if inventory.problem:
        raise CheckpointError(inventory.problem)
    newer = [entry for entry in inventory.entries if entry.state is State.NEWER]
    if newer:
        raise CheckpointError(f"{newer[0].problem}, and to know what it needs; nothing is removed")
    unread = [entry for entry in inventory.chain if entry.state is State.UNREADABLE]
    if unread and not damaged:
        raise CheckpointError(
            f"{unread[0].problem}; so it is not known what the checkpoint of {describe([unread[0].id])} needs, and "
            "nothing is removed. Put its manifest back from a copy, or remove it too with --damaged"
        )


def require_metric(inventory: Inventory, metric: str) -> None:
    """Raise ValueError, with those that there are, for a metric that no checkpoint has."""
    known = sorted({name for entry in inventory.usable if entry.manifest for name in entry.manifest.metrics})
    if inventory.usable and metric not in known:
        raise ValueError(
            f"metric: found {metric!r}, which no checkpoint of {inventory.uri} has; expected "
            + (f"one of {', '.join(known)}" if known else "none, since they have no metrics")
        )


def _newest_save(inventory: Inventory) -> tuple[int, int]:
    """Return attempt and number of the newest save that has ended, in a run that is held."""
    saves = [(entry.id.attempt, entry.manifest.save) for entry in inventory.entries if entry.manifest]
    return max([*saves, (inventory.attempt, -1)])


def _plan(
    store: Store,
    inventory: Inventory,
    retention: Retention,
    chain: list[ManifestId],
    damaged: tuple[ManifestId, ...],
    until: tuple[int, int],
) -> Plan:
    attempt, save = until
    needs = Needs()
    for entry in inventory.entries:
        if entry.manifest:
            needs.learn(entry.manifest)
    removal = plan_removal(
        store,
        attempt=attempt,
        save=save,
        chain=chain,
        manifests=[entry.id for entry in inventory.entries],
        damaged=damaged,
        retention=retention,
        needs=needs,
    )
    goes = set(removal.manifests)
    return Plan(
        removal=removal,
        deleted=tuple(entry for entry in inventory.entries if entry.id in goes),
        kept=tuple(entry for entry in inventory.entries if entry.id not in goes),
        num_bytes=sum(inventory.sizes.get(key, 0) for key in removal.objects),
        problems=tuple(removal.problems),
    )


class _Held:
    """The run's lease, taken and renewed in a thread. Close it."""

    def __init__(self, store: Store, lease_s: float) -> None:
        self._store = store
        self._lease = Lease(store, Holder.of_this_process(), lease_s=lease_s)
        self._closing, self._is_lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="prune-beat", daemon=True)

    def take(self) -> None:
        self._lease.take()
        self._thread.start()

    def require(self, *, look: bool = False) -> None:
        """Raise RunHeldError if somebody else has the run by now, as far as is known; `look`: ask the store."""
        if look and not self._lease.beat():
            self._is_lost = True
        if self._is_lost:
            raise RunHeldError(f"{self._store.uri} was taken over by another process: nothing more is removed")

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with suppress(OSError):  # others find that the heartbeat has stopped
            self._lease.release()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            with suppress(OSError):  # the store does not answer: deletions will say so
                self._is_lost = self._is_lost or not self._lease.beat()
