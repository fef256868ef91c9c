"""Stores for the tests of checkpoints."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture
def uri() -> Iterator[str]:
    """A store of its own in memory."""
    yield f"memory://{uuid.uuid4().hex}"
    # The memory file system belongs to the process, and its listings look at everything in it.
    MemoryFileSystem.store.clear()
