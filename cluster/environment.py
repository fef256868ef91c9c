"""Environment variables for a while: what processes that are started meanwhile inherit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, overwrite: bool = True) -> Iterator[None]:
    """Set the variables, and put back afterwards what was there. overwrite: also those that the user has set."""
    chosen = {name: value for name, value in variables.items() if overwrite or name not in os.environ}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
