"""How many workers a machine takes: numbers that make sense, and GPUs that are not left idle without a word."""

import pytest

from cluster.this_machine import visible_gpus, workers_here


def test_gpus_are_counted_as_cuda_counts_them(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == 2
    for chosen, expected in (("", 0), ("1", 1), ("0,1", 2), ("-1", 0), ("0,-1,1", 1), ("GPU-8932f937, 3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus(tmp_path) == expected, chosen


def test_more_workers_than_gpus_are_refused_with_the_number():
    with pytest.raises(
        ValueError, match=r"found 2, and this machine has 1 GPU\..*give --workers 1, or set CUDA_VISIBLE"
    ):
        workers_here(2, 2, num_cores=64, num_gpus=1)
    assert workers_here(1, 1, num_cores=64, num_gpus=1) == (1, "")
    assert workers_here(8, 8, num_cores=1, num_gpus=8) == (8, "")


def test_more_workers_than_make_sense_are_refused_with_the_number():
    with pytest.raises(
        ValueError, match=r"found 999, and this machine has 2 usable cores.*give --workers 2 \(at most 8"
    ):
        workers_here(999, 999, num_cores=2, num_gpus=0)
    assert [workers_here(n, n, num_cores=2, num_gpus=0) for n in (1, 3, 8)] == [(1, ""), (3, ""), (8, "")]


def test_of_a_range_as_many_start_as_the_machine_has_cores_or_gpus_for():
    assert workers_here(1, 999, num_cores=2, num_gpus=0) == (2, "2 of 1..999 workers: this machine has 2 usable cores")
    assert workers_here(3, 16, num_cores=2, num_gpus=0)[0] == 3
    assert workers_here(1, 16, num_cores=64, num_gpus=4) == (4, "4 of 1..16 workers: this machine has 4 GPUs")
    assert workers_here(1, 2, num_cores=2, num_gpus=0) == (2, "")
