"""Memory for one rank's shard of the bank, and the rows that it starts with.

A shard lies in the memory of the device that computes, in host memory (pinned where a GPU reads it), or in a file on a
local disk that is mapped into memory: the file has no name, so nothing of it outlives the process, however that ends.

Shapes: N rows of the data set, R rows owned by this rank, D feature numbers.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.page_locked import page_locked
from dataloading.philox import Purpose

START_BLOCK_ROWS = 4096
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Shard:
    """The rows of a shard, (R, D), and the mapping of the file that they lie in, None where they lie in memory."""

    rows: Tensor
    mapping: mmap.mmap | None = None

    def read_ahead(self, places_M: np.ndarray) -> None:
        """Ask the kernel to bring rows into memory without waiting for them. places_M: int64, 0 to R - 1."""
        if self.mapping is None:
            return
        row_bytes = self.rows.shape[1] * self.rows.element_size()
        first_M, last_M = places_M * row_bytes // _PAGE, ((places_M + 1) * row_bytes - 1) // _PAGE
        pages = np.unique(np.concatenate([first_M, last_M]))
        for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1):
            if len(run):
                self.mapping.madvise(mmap.MADV_WILLNEED, int(run[0]) * _PAGE, len(run) * _PAGE)


def allocate(
    num_rows: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    pinned: bool = False,
    folder: str | None = None,
) -> Shard:
    """Return memory for (R, D) numbers, its content undefined.

    pinned: page-locked host memory, from which a GPU copies without waiting. folder: of the file to map, on a local
    disk; its room is taken at once, so that a full disk is told here and not by a signal in the middle of training.
    Raises OSError where the file cannot be made, or the memory not be page-locked.
    """
    if num_rows == 0:
        return Shard(torch.empty((0, dim), dtype=dtype, device=device))
    if folder is not None:
        return _map_file(num_rows, dim, dtype, folder)
    if device.type != "cpu":
        return Shard(torch.empty((num_rows, dim), dtype=dtype, device=device))
    if pinned:
        return Shard(page_locked(torch.Size((num_rows, dim)), dtype))
    # numpy asks for huge pages: with small ones, each row of a large bank costs a walk through the page tables.
    memory = np.empty(num_rows * dim * dtype.itemsize, dtype=np.uint8)
    return Shard(torch.from_numpy(memory).view(dtype).view(num_rows, dim))


def _map_file(num_rows: int, dim: int, dtype: torch.dtype, folder: str) -> Shard:
    num_bytes = num_rows * dim * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="memory-bank-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapping = mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"memory bank in a mapped file: {num_bytes / 1e9:.3g} GB in {folder}: {error.strerror}; give a folder on a "
            "local disk with as much room for every worker of the machine (bank.mapped_dir)",
        ) from error
    # Rows are read one by one: what the kernel would read around each of them is never used.
    mapping.madvise(mmap.MADV_RANDOM)
    return Shard(torch.frombuffer(mapping, dtype=torch.uint8).view(dtype).view(num_rows, dim), mapping)


def start_rows(num_rows: int, dim: int, seed: int, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of the bank before training: random directions of unit length, float32 (R, D).

    Drawn in blocks of 4,096 rows keyed by (seed, block), so they do not depend on who owns them.
    """
    rows_RD = torch.empty((stop - start, dim))
    fill_with_start_rows(rows_RD, seed, start)
    return rows_RD


def fill_with_start_rows(rows_RD: Tensor, seed: int, start: int) -> None:
    """Write the starting rows [start, start + R) into a shard of any dtype on any device, a few blocks at a time."""
    if rows_RD.device.type != "cpu":
        for block in _blocks(rows_RD, start):
            _fill_block(rows_RD, seed, start, block)
        return
    threads = max(1, torch.get_num_threads())
    with ThreadPoolExecutor(threads, thread_name_prefix="bank-start") as pool:
        for _ in pool.map(lambda block: _fill_block(rows_RD, seed, start, block), _blocks(rows_RD, start)):
            pass


def _blocks(rows_RD: Tensor, start: int) -> Iterator[int]:
    yield from range(start // START_BLOCK_ROWS, -(-(start + len(rows_RD)) // START_BLOCK_ROWS) if len(rows_RD) else 0)


def _fill_block(rows_RD: Tensor, seed: int, start: int, block: int) -> None:
    first = block * START_BLOCK_ROWS
    bits = np.random.Philox(key=[seed, int(Purpose.BANK_START) << 48 | block])
    block_rows = np.random.Generator(bits).standard_normal((START_BLOCK_ROWS, rows_RD.shape[1]), dtype=np.float32)
    block_rows /= np.linalg.norm(block_rows, axis=1, keepdims=True)
    low, high = max(start, first), min(start + len(rows_RD), first + START_BLOCK_ROWS)
    rows_RD[low - start : high - start] = torch.from_numpy(block_rows[low - first : high - first])
