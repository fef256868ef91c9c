"""Page-locked memory, with a CUDA runtime that takes down what it is asked to lock."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from cluster import page_locked as module
from cluster.page_locked import SMALL_BYTES, page_locked


class Runtime:
    """What is locked, by address."""

    def __init__(self, failure: int = 0) -> None:
        self.failure, self.locked = failure, {}

    def cudaHostRegister(self, address, num_bytes, flags):
        if not self.failure:
            self.locked[address] = num_bytes
        return self.failure

    def cudaHostUnregister(self, address):
        del self.locked[address]


def use(monkeypatch, runtime):
    monkeypatch.setattr(module, "_cuda_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exactly_what_is_asked_for_is_locked_and_unlocked_with_the_last_view(monkeypatch, dtype):
    runtime = Runtime()
    use(monkeypatch, runtime)
    rows = page_locked(torch.Size((5000, 129)), dtype)
    assert (rows.shape, rows.dtype) == ((5000, 129), dtype)
    assert runtime.locked == {rows.data_ptr(): 5000 * 129 * dtype.itemsize}
    assert rows.data_ptr() % mmap.PAGESIZE == 0, "two tensors must not share a page: it can be locked once"
    rows.fill_(1)
    view = rows[3:7]
    del rows
    gc.collect()
    assert runtime.locked
    assert float(view.sum()) == 4 * 129
    del view
    gc.collect()
    assert not runtime.locked


def test_memory_that_cannot_be_locked_is_told_with_its_size_and_what_to_do(monkeypatch):
    use(monkeypatch, Runtime(failure=2))
    with pytest.raises(OSError, match=r"cannot page-lock 0\.00419 GB .*CUDA error 2.*bank\.dtype float16"):
        page_locked(torch.Size((SMALL_BYTES,)), torch.float32)
