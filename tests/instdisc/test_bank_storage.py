"""Where a shard lies: in memory or in a mapped file, the same rows; room that is missing is told at the start.

Shapes: N rows, R rows of a shard, B samples, D feature numbers, M rows wanted.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster.worker import Worker, run_local
from instdisc.bank_storage import START_BLOCK_ROWS, allocate, fill_with_start_rows, start_rows
from instdisc.benchmark.peak_memory import reset_peak, resident_bytes
from instdisc.memory_bank import DTYPES, NEVER, ShardedMemoryBank

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_mapped_bank_has_the_bits_of_one_in_memory_after_updates_and_lookups(tmp_path, dtype):
    num_rows, dim = 301, 24
    banks = [
        ShardedMemoryBank(num_rows, dim, dtype=dtype, seed=1, mapped_dir=folder) for folder in (None, str(tmp_path))
    ]
    assert [bank.is_mapped for bank in banks] == [False, True]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        indices_B = torch.randperm(num_rows, generator=generator)[:40]
        features_BD = F.normalize(torch.randn(40, dim, generator=generator), dim=1)
        for bank in banks:
            bank.update(indices_B, features_BD, step)
        found = [bank.gather_negatives(step, 500)[0] for bank in banks]
        assert torch.equal(*found)
        banks[1].read_ahead(indices_B.numpy())
    assert torch.equal(banks[0].rows, banks[1].rows)
    assert torch.equal(banks[0].last_step, banks[1].last_step)
    assert not torch.equal(banks[0].rows, start_rows(num_rows, dim, 1, 0, num_rows).to(dtype))


def test_the_file_of_a_mapped_bank_has_no_name_and_its_room_is_given_back(tmp_path):
    bank = ShardedMemoryBank(1000, 16, mapped_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    of_file = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(of_file) == 1
    assert of_file[0].endswith("(deleted)")
    del bank
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    gc.collect()
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_at_the_start_with_folder_and_size(small_disk):
    message = rf"0\.00205 GB in {small_disk}: No space left on device.*bank\.mapped_dir"
    with pytest.raises(OSError, match=message) as told:
        ShardedMemoryBank(16_000, 32, mapped_dir=str(small_disk))
    assert told.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
    status = os.statvfs(small_disk)
    assert status.f_bfree * status.f_frsize > 0.9 * MIB, "what was taken of the room is given back"
    bank = ShardedMemoryBank(4_000, 32, mapped_dir=str(small_disk))
    assert torch.equal(bank.rows, start_rows(4_000, 32, 0, 0, 4_000))


def test_a_folder_that_is_not_there_is_told_at_the_start(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"memory bank in a mapped file: .* in {tmp_path}/none: No such file"):
        ShardedMemoryBank(10, 4, mapped_dir=str(tmp_path / "none"))


@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float16), (24, torch.float32), (1500, torch.float32)])
def test_any_rows_can_be_read_ahead(tmp_path, dim, dtype):
    """Rows of 2 bytes, rows that straddle pages, rows of more than a page; the file's last page is not full."""
    num_rows = 1003
    shard = allocate(num_rows, dim, dtype, CPU, folder=str(tmp_path))
    fill_with_start_rows(shard.rows, 0, 0)
    before = shard.rows.clone()
    asked = ([], [0], [num_rows - 1], [num_rows - 1, 0, 0], np.arange(num_rows), np.arange(num_rows)[::-3])
    for places in asked:
        shard.read_ahead(np.array(places, dtype=np.int64))
    assert torch.equal(shard.rows, before)


def test_rows_of_other_ranks_are_not_read_ahead(tmp_path):
    bank = ShardedMemoryBank(10, 4, mapped_dir=str(tmp_path))
    bank.start, bank.stop = 3, 7  # as the second of three ranks has it: places beyond 3 are not in its shard
    asked = []
    object.__setattr__(bank._shard, "read_ahead", lambda places_M: asked.extend(places_M.tolist()))
    bank.read_ahead(np.arange(10))
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mapped", [False, True])
def test_starting_rows_of_16_bits_are_the_rounded_ones_of_32(tmp_path, dtype, mapped):
    start, num_rows = START_BLOCK_ROWS - 7, START_BLOCK_ROWS + 20
    shard = allocate(num_rows, 8, dtype, CPU, folder=str(tmp_path) if mapped else None)
    fill_with_start_rows(shard.rows, 5, start)
    assert torch.equal(shard.rows, start_rows(start + num_rows, 8, 5, start, start + num_rows).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("mapped", [False, True])
def test_a_rank_that_owns_no_row_has_an_empty_shard(tmp_path, dtype, mapped):
    """One of more ranks than there are rows."""
    shard = allocate(0, 8, dtype, CPU, folder=str(tmp_path) if mapped else None)
    assert shard.rows.shape == (0, 8)
    assert shard.rows.dtype == dtype
    fill_with_start_rows(shard.rows, 0, 3)
    shard.read_ahead(np.empty(0, dtype=np.int64))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_bank_takes_over_the_rows_and_steps_of_a_checkpoint(tmp_path, mapped):
    bank = ShardedMemoryBank(5, 4, dtype=torch.float16, mapped_dir=str(tmp_path) if mapped else None)
    memory = bank.rows.data_ptr()
    rows_RD = start_rows(5, 4, 77, 0, 5)
    bank.rows.copy_(rows_RD)
    bank.last_step.copy_(torch.tensor([3, NEVER, 8, 8, NEVER]))
    bank.recount_written()
    assert torch.equal(bank.lookup(torch.arange(5)), rows_RD.half().float())
    assert bank.last_step.tolist() == [3, NEVER, 8, 8, NEVER]
    assert int(bank.num_written) == 3
    assert bank.rows.data_ptr() == memory
    bank.update(torch.tensor([1, 2]), torch.eye(4)[:2], 9)
    assert bank.last_step.tolist() == [3, 9, 9, 8, NEVER]
    assert int(bank.num_written) == 4


def measured_construction(worker: Worker, folder: str | None) -> tuple[int, int]:
    """The shard's bytes, and the greatest growth of this process while a bank is made."""
    ShardedMemoryBank(START_BLOCK_ROWS, 128, dtype=torch.float16)  # imports, pools
    gc.collect()
    before = resident_bytes("VmRSS")
    reset_peak()
    bank = ShardedMemoryBank(800_000, 128, dtype=torch.float16, mapped_dir=folder)
    return bank.rows.numel() * bank.rows.element_size(), resident_bytes("VmHWM") - before


@pytest.mark.parametrize("mapped", [False, True])
def test_making_a_bank_needs_little_more_memory_than_its_shard(tmp_path, mapped):
    ((shard_bytes, grown_bytes),) = run_local(measured_construction, 1, str(tmp_path) if mapped else None)
    assert shard_bytes == 204_800_000
    assert 0.9 * shard_bytes < grown_bytes < shard_bytes + 40 * MIB
