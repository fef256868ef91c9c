"""What `gpu.sh` checks on a real GPU: each part is a function that raises where the GPU does something else.

Shapes: N rows, B samples, D feature numbers.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

N, B, D, STEPS = 5000, 64, 128, 3
OBJECTIVES = {
    "softmax": {"name": "softmax"},
    "nce": {"name": "nce", "z": "ema"},
    "nce, per sample": {"name": "nce", "per_sample": True},
    "infonce": {"name": "infonce"},
    "infonce, debiased, hard": {"name": "infonce", "denominator": "debiased", "hard_negatives": 8},
    "infonce, decoupled, per sample": {"name": "infonce", "denominator": "decoupled", "per_sample": True},
}
TOLERANCE = 2e-4
SMALL = {
    "model.architecture": "convnet-small", "model.width": 16, "augment.size": 32, "eval.resize": 32, "eval.crop": 32,
    "optim.global_batch": 64, "optim.norm_group": 32, "objective.temperature": 0.2, "data.kind": "demo",
    "data.max_rows": 512, "data.max_test_rows": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A check. needs: packages it cannot do without. gpus: how many."""

    run: Callable[[torch.device], dict[str, Any]]
    limit_s: int
    needs: tuple[str, ...] = ()
    gpus: int = 1
    pretended: bool = False
    """Whether it runs on the pretended GPU of the tests as well."""


def bank_steps(objective: dict, device: torch.device, *, bank_device: str, dtype: str) -> dict[str, torch.Tensor]:
    """Steps of the bank and an objective over given features: losses, gradients and rows, in memory of the host."""
    from cluster.collectives import PendingRows
    from instdisc.config_method import ObjectiveConfig
    from instdisc.memory_bank import DTYPES, ShardedMemoryBank
    from instdisc.objectives.normalizer import Normalizer
    from instdisc.rows_ahead import RowsAhead
    from instdisc.train.scoring import Group, Scorer

    config = ObjectiveConfig(temperature=0.1, num_negatives=256, **objective)
    where = device if bank_device == "auto" else "cpu"
    mapped = tempfile.gettempdir() if bank_device == "mapped" else None
    bank = ShardedMemoryBank(N, D, seed=1, dtype=DTYPES[dtype], device=where, work_device=device, mapped_dir=mapped)
    normalizer = Normalizer(kind=config.z, decay=0.9, num_rows=N, temperature=0.1, device=device)
    scorer = Scorer(config, bank, normalizer, seed=2)
    order = np.random.default_rng(3).permutation(N)
    rows_ahead = RowsAhead(
        bank, lambda step: order[step * B : (step + 1) * B], global_batch=B, ahead=1,
        num_negatives=config.num_shared_negatives, negatives_seed=4,
    )  # fmt: skip
    features_N = torch.nn.functional.normalize(torch.randn(STEPS * B, D, generator=torch.Generator().manual_seed(5)))
    valid_B = torch.arange(B) % 9 != 0
    found = {}
    for step in range(STEPS):
        rows_ahead.start(step)
        features_BD = features_N[step * B : (step + 1) * B].to(device).requires_grad_()
        rows, group = rows_ahead.take(step), Group(features_BD, slice(0, B), [(0, B)])
        if config.name == "nce" and not normalizer.started:
            normalizer.observe([scorer.log_sums(group, rows, step).detach()], B * config.num_negatives)
        losses_B, _ = scorer.losses(group, rows, step)
        (gradient_BD,) = torch.autograd.grad(losses_B.sum(), features_BD)
        validity = PendingRows(valid_B[None], [B], None)
        rows_ahead.will_write(bank.start_update(rows.indices_G, [B], validity, features_BD.detach(), step))
        found[f"losses {step}"], found[f"gradient {step}"] = losses_B.detach().cpu(), gradient_BD.cpu()
    rows_ahead.settle()
    return {**found, "rows": bank.rows.cpu().float()}


def objectives_equal_those_of_a_cpu(device: torch.device, bank_device: str = "auto") -> dict[str, Any]:
    errors = {}
    for name, objective in OBJECTIVES.items():
        for dtype in ("float32", "float16"):
            found = bank_steps(objective, device, bank_device=bank_device, dtype=dtype)
            expected = bank_steps(objective, torch.device("cpu"), bank_device="auto", dtype=dtype)
            error = max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)
            # A row of 16 bits may round the other way.
            assert error < (TOLERANCE if dtype == "float32" else 2e-3), f"{name}, {dtype}: relative error {error:.2e}"
            errors[f"{name}, {dtype}"] = error
    return {"relative_errors": errors}


def trained(device: torch.device, options: dict, steps: int = 4, *, watched: bool = False) -> tuple[Any, float]:
    """The state and mean loss after steps of a small net. watched: the host must not wait for the GPU in the last."""
    from cluster.worker import Worker
    from dataloading.loader import Batch
    from dataloading.order import Permutation
    from instdisc.config import TrainConfig
    from instdisc.train.plan import BatchPlan
    from instdisc.train.state import build_state
    from instdisc.train.step import Stepper

    config = TrainConfig().with_overrides({**SMALL, **options})
    worker, batch = Worker(device=device), config.optim.global_batch
    state = build_state(config, 512, worker)
    order = Permutation(512, config.seed)
    stepper = Stepper(state, BatchPlan(batch, config.optim.norm_group or batch, 1), worker, order)
    images_N = torch.randn(512, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        rows_B = torch.from_numpy(np.arange(step * batch, (step + 1) * batch) % 512)
        images_B = images_N[rows_B].to(device)
        if watched and step == steps - 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            stepper.step(Batch(images_B, rows_B, torch.ones(batch, dtype=torch.bool)))
        finally:
            if watched and step == steps - 1:
                torch.cuda.set_sync_debug_mode("default")
    stepper.settle()
    return state, stepper.sums.read()["loss"]


def steps_in_float32_and_bfloat16(device: torch.device) -> dict[str, Any]:
    torch.backends.cudnn.allow_tf32 = False
    _, on_cpu = trained(torch.device("cpu"), {"system.precision": "float32"})
    losses = {precision: trained(device, {"system.precision": precision})[1] for precision in ("float32", "bfloat16")}
    assert abs(losses["float32"] / on_cpu - 1) < 2e-3, (losses, on_cpu)
    assert abs(losses["bfloat16"] / on_cpu - 1) < 3e-2, (losses, on_cpu)
    return {"losses": losses, "loss_on_cpu": on_cpu}


def a_step_does_not_wait_for_the_gpu(device: torch.device) -> dict[str, Any]:
    checked = []
    for name in ("softmax", "nce", "infonce"):
        for per_sample in (False, True) if name != "softmax" else (False,):
            trained(device, {"objective.name": name, "objective.per_sample": per_sample}, watched=True)
            checked.append(f"{name}{', per sample' * per_sample}")
    return {"checked": checked}


def colours_and_crops_equal_those_of_a_cpu(device: torch.device) -> dict[str, Any]:
    from dataloading.augment import AugmentConfig, color_factors
    from dataloading.color import augment_colors
    from dataloading.crop import crop_resize

    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (32, 64, 80, 3), dtype=np.uint8))
    windows = np.arange(32), generator.integers(0, 9, (32, 2)), generator.integers(12, 50, (32, 2))
    crops = [crop_resize(pixels.to(where), *windows, size=32).cpu() for where in ("cpu", device)]
    config = AugmentConfig(size=32, jitter=(0.4,) * 4, grayscale_probability=0.3, blur_probability=0.5)
    factors = color_factors(1, np.zeros(32, dtype=np.int64), np.arange(32), view=0, config=config)
    images = [
        augment_colors(crops[0].clone().to(where).contiguous(), factors, config).cpu() for where in ("cpu", device)
    ]
    errors = {name: float((a - b).abs().max()) for name, (a, b) in {"crops": crops, "colours": images}.items()}
    assert errors["crops"] < 1e-6, errors
    assert errors["colours"] < 1e-4, errors
    return {"greatest_errors": errors}


def jpegs(num: int) -> list[bytes]:
    from PIL import Image

    files = []
    for number in range(num):
        coarse = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        file = io.BytesIO()
        image = Image.fromarray(coarse).resize((60 + 7 * number % 90, 50 + 11 * number % 120), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def dali_decodes_on_the_gpu(device: torch.device) -> dict[str, Any]:
    from dataloading.dali_pipeline import DaliDecoder
    from dataloading.dali_self_test import may_decode_regions
    from dataloading.encoded import Window
    from dataloading.image_decoder import ImageDecoder

    windows = [Window(file, (3, 5), (30, 40), is_plain=True) for file in jpegs(24)]

    def decoded(decoder, parts):
        for part in parts:
            decoder.submit(part)
        found = [decoder.collect() for _ in parts]
        return torch.cat([part.crops.cpu() for part in found]).float(), [part.reasons for part in found]

    decoder = DaliDecoder(size=32, max_windows=24, device=device, num_threads=2)
    together, _ = decoded(decoder, [windows])
    apart, _ = decoded(decoder, [windows[start : start + 5] for start in range(0, 24, 5)])
    assert torch.equal(together, apart), "pixels depend on the batch"
    expected, _ = decoded(ImageDecoder(None, size=32, device=torch.device("cpu"), num_threads=1), [windows])
    mean = float((together - expected).abs().mean())
    assert mean < 1.5, f"{mean:.2f} levels from Pillow's pixels on average"
    broken = dataclasses.replace(windows[3], encoded=windows[3].encoded[:200] + bytes(99))
    damaged = [*windows[:3], broken, *windows[4:8]]
    crops, (reasons,) = decoded(decoder, [damaged])
    assert list(reasons) == [3], reasons
    good = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(crops[good], together[good]), "a damaged image changed its neighbours"
    decoder.close()
    return {"mean_levels_from_pillow": mean, "decodes_windows": may_decode_regions(device.index or 0)}


def page_locked_memory_is_exact_and_copied_without_waiting(device: torch.device) -> dict[str, Any]:
    from cluster.page_locked import page_locked

    memory = page_locked(torch.Size((3_000_000, 33)), torch.float32)
    assert memory.is_pinned()
    memory.normal_()
    assert torch.equal(memory.to(device, non_blocking=True).cpu(), memory)
    del memory
    return {"bytes": 3_000_000 * 33 * 4}


def a_run_saves_is_evaluated_and_goes_on(device: torch.device) -> dict[str, Any]:
    import instdisc
    from cluster.checkpoint import read_latest
    from instdisc.runs import Run

    found = {}
    for bank in ("auto", "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            options = {**SMALL, "bank.device": bank, "checkpoint.every_steps": 3, "optim.epochs": 1.0}
            config = instdisc.recipe("quickstart", **options)
            result = instdisc.fit(config, run=f"{folder}/run", workers=0)
            saved = read_latest(Run(result.uri).checkpoints())
            assert saved is not None
            assert saved.state["step"] == result.num_steps
            lengths = saved.rows("bank").float().norm(dim=1)
            assert float((lengths - 1).abs().max()) < 1e-5
            again = instdisc.fit(config, run=f"{folder}/run", workers=0)
            assert again.step == result.step
            found[bank] = {"steps": result.num_steps, "knn_top1": result.metrics["knn_top1"][-1][1]}
    return found


def nccl_collectives(worker) -> dict[str, Any]:
    import torch.distributed as dist

    from cluster.collectives import all_gather_rows, reduce_scatter_rows
    from instdisc.bank_storage import start_rows
    from instdisc.memory_bank import ShardedMemoryBank

    groups = {"gloo and nccl": None, "nccl alone": dist.new_group(backend="nccl")}
    for group in groups.values():
        bank = ShardedMemoryBank(N, D, seed=1, device=worker.device, group=group)
        indices_B = torch.arange(5 + worker.rank) * 11 + worker.rank
        assert torch.equal(bank.lookup(indices_B).cpu(), start_rows(N, D, 1, 0, N)[indices_B])
        counts = [5 + rank for rank in range(worker.world_size)]
        ones = torch.ones(sum(counts), 3, device=worker.device)
        own = reduce_scatter_rows(ones, counts, group)
        assert bool((own == worker.world_size).all())
        assert len(all_gather_rows(ones[: counts[worker.rank]] > 0, counts, group)) == sum(counts)
    return {"groups": list(groups), "ranks": worker.world_size}


def nccl_between_gpus(device: torch.device) -> dict[str, Any]:
    from cluster.worker import run_local

    return run_local(nccl_collectives, torch.cuda.device_count(), preload=["instdisc.train.loop"])[0]


def nccl_on_one_gpu(device: torch.device) -> dict[str, Any]:
    """One rank talks to itself: NCCL starts, and takes every type that the bank sends."""
    import torch.distributed as dist

    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("nccl", init_method=f"file://{file.name}", rank=0, world_size=1)
        types = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64)
        for dtype in types:
            sent = torch.ones(4, 3, device=device).to(dtype)
            gathered = torch.zeros_like(sent)
            dist.all_gather_into_tensor(gathered, sent, async_op=True).wait()
            assert torch.equal(gathered, sent), dtype
        dist.destroy_process_group()
    return {"types": [str(dtype) for dtype in types]}


def cuda_in_a_worker(worker) -> float:
    return float(torch.ones(1000, device=worker.device).sum()) * (worker.device.type == "cuda")


def forked_workers_compute_on_the_gpu(device: torch.device) -> dict[str, Any]:
    from cluster.worker import run_local

    assert run_local(cuda_in_a_worker, 1, preload=["instdisc.train.loop"]) == [1000.0]
    return {}


def ray_worker_trains_on_the_gpu(device: torch.device) -> dict[str, Any]:
    import instdisc

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        config = instdisc.recipe("quickstart", **{**SMALL, "optim.epochs": 1.0, "eval.baselines": False})
        result = instdisc.fit(config, run=f"{folder}/run", workers=1)
        return {"steps": result.step}


PARTS = {
    "objectives": Part(objectives_equal_those_of_a_cpu, 60, pretended=True),
    "bank_on_the_host": Part(lambda device: objectives_equal_those_of_a_cpu(device, "cpu"), 60, pretended=True),
    "bank_mapped": Part(lambda device: objectives_equal_those_of_a_cpu(device, "mapped"), 60, pretended=True),
    "precision": Part(steps_in_float32_and_bfloat16, 60, pretended=True),
    "no_waits": Part(a_step_does_not_wait_for_the_gpu, 60),
    "finishing": Part(colours_and_crops_equal_those_of_a_cpu, 40, ("numba",), pretended=True),
    "page_locked": Part(page_locked_memory_is_exact_and_copied_without_waiting, 30),
    "run": Part(a_run_saves_is_evaluated_and_goes_on, 90),
    "dali": Part(dali_decodes_on_the_gpu, 90, ("nvidia.dali",)),
    "nccl_one": Part(nccl_on_one_gpu, 40),
    "nccl_all": Part(nccl_between_gpus, 60, gpus=2),
    "forked": Part(forked_workers_compute_on_the_gpu, 60),
    "ray": Part(ray_worker_trains_on_the_gpu, 120, ("ray",)),
}
