"""Whether a store keeps the promise of `create`, tried out: of several writers of one key exactly one wins.

Some servers accept the condition and overwrite; others look first and write later, so that writers that come at once
all win. Two runs would then both believe that they own a folder. Objects of the trial are removed.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from cluster.store_errors import StoreError

if TYPE_CHECKING:
    from cluster.store import Store

_NUM_RACES, _NUM_RACERS = 16, 2
"""All at once. Of these 16 pairs some are close enough for a server that looks and then writes a millisecond later."""
_START_TIMEOUT_S = 30.0


def require_exclusive_create(store: Store) -> None:
    """Raise StoreError, with what was found, unless exactly one of several writers wins, in turn and at once."""
    folder = f"probes/{uuid4().hex}"
    keys = [f"{folder}/{number}" for number in range(_NUM_RACES + 1)]
    try:
        problem = _in_turn(store, keys[0]) or _at_once(store, keys[1:])
    finally:
        with suppress(StoreError):
            store.delete_many(keys)
    if problem:
        raise StoreError(
            f"cannot run on {store.shown}: of several writers of a new object exactly the first must win, found that "
            f"{problem}. This storage does not keep what conditional writes (If-None-Match) promise; use a folder, "
            "Amazon S3, Ceph RGW, SeaweedFS or another that does"
        )


def _in_turn(store: Store, key: str) -> str:
    """Return what is wrong with creates one after the other, "" for nothing."""
    first, second = b"first " + uuid4().bytes, b"second " + uuid4().bytes
    won = store.claim(key, first), store.create(key, second)
    found = store.get(key)
    if won == (True, False) and found == first:
        return ""
    whose = "the first" if found == first else "the second" if found == second else "neither"
    first_did, second_did = ("won" if has_won else "lost" for has_won in won)
    return f"the first {first_did}, the second {second_did} and {whose} one's bytes are there"


def _at_once(store: Store, keys: list[str]) -> str:
    """Return what is wrong with creates of several writers at the same time, "" for nothing."""
    racers = [(key, f"{key} of {number}".encode()) for key in keys for number in range(_NUM_RACERS)]
    start = threading.Barrier(len(racers), timeout=_START_TIMEOUT_S)

    def race(racer: tuple[str, bytes]) -> bool:
        start.wait()
        return store.create(*racer)

    with ThreadPoolExecutor(len(racers), thread_name_prefix="probe") as pool:
        won = dict(zip(racers, pool.map(race, racers), strict=True))
    for key in keys:
        winners = [data for (of, data), is_won in won.items() if of == key and is_won]
        if len(winners) > 1:
            return f"{len(winners)} of {_NUM_RACERS} that wrote {key!r} at the same time won"
        # None wins where the answer to the winner's first try was lost.
        if winners and store.get(key) != winners[0]:
            return f"one of {_NUM_RACERS} that wrote {key!r} at the same time won and the bytes of another are there"
    return ""
