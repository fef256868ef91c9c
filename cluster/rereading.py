"""Reading again what seems to be missing or damaged, before it is called so.

Bytes change on the way, gateways answer 404 for a moment, replicas lag: what is stored may be intact. Who finds it
damaged discards a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cluster.store import Store

Result = TypeVar("Result")

PAUSES_S = (0.3, 2.0)
"""Before each further try on a remote storage. A folder is read once more, at once."""


def read_again(store: Store, read: Callable[[], Result], errors: tuple[type[Exception], ...]) -> Result:
    """Return read(), tried again where it raises one of `errors`; the last one is raised."""
    for pause_s in PAUSES_S if store.protocol not in ("file", "memory") else (0.0,):
        try:
            return read()
        except errors:
            time.sleep(pause_s)
    return read()
