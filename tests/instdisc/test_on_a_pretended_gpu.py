"""All that a run does with a GPU, on a pretended one: no device is mixed, and the host waits only where it is written.

Shapes: N rows, B samples, D feature numbers.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from itertools import islice

import numpy as np
import pretended_gpu as gpu
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pretended_gpu import DEVICE, OnGpu, host_waits, is_locked, pretended_gpu
from tiny_data import write_cifar10

from cluster.checkpoint import read_latest
from cluster.collectives import all_gather_rows, all_reduce_sum, gather_counts, reduce_scatter_rows
from cluster.worker import Worker, run_local
from dataloading.augment import AugmentConfig
from dataloading.crop import MemoryCrops, crop_resize
from dataloading.index import Dataset, DatasetIndex
from dataloading.loader import Batch, eval_batches, make_loader
from dataloading.order import Permutation
from instdisc.config import TrainConfig
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.models import build_encoder
from instdisc.objectives import owners
from instdisc.runs import Run
from instdisc.train import state as training_state
from instdisc.train.plan import BatchPlan
from instdisc.train.step import Stepper

N, SIDE, STEPS, BATCH = 37, 16, 2, 14
DAMAGED = (3, 8, 20)
SMALL = {
    "model.architecture": "convnet-small", "model.width": 4, "model.feature_dim": 8, "augment.size": SIDE,
    "eval.resize": SIDE, "eval.crop": SIDE, "optim.global_batch": BATCH, "optim.norm_group": 4, "optim.epochs": 5,
    "objective.temperature": 0.2, "objective.num_negatives": 30, "system.precision": "float32", "data.kind": "demo",
}  # fmt: skip
HOST_BANK_WAITS = {
    # A bank beside the GPU: rows are written by the host, so it waits for the features, and for which are accepted.
    ("copy to the host", "instdisc/bank_update.py:applied_to"),
}
HARD_WAITS = {
    # The owners of the nearest rows look them up on the host.
    ("copy to the host", "instdisc/hard_negatives.py:nearest_owned"),
}
INFONCE = {"objective.name": "infonce"}
CASES = {
    "softmax": {"objective.name": "softmax"},
    "softmax, linear-norm head": {"objective.name": "softmax", "model.head": "linear-norm"},
    "nce, z as running mean": {"objective.name": "nce", "objective.z": "ema", "objective.proximal_weight": 0.3},
    "nce, per sample": {"objective.name": "nce", "objective.per_sample": True},
    "nce in bfloat16": {"objective.name": "nce", "bank.dtype": "bfloat16", "system.precision": "bfloat16"},
    "infonce": INFONCE,
    "infonce, decoupled, per sample": {
        **INFONCE, "objective.denominator": "decoupled", "objective.per_sample": True
    },
    "infonce, debiased": {**INFONCE, "objective.denominator": "debiased"},
    "infonce, hard": {**INFONCE, "objective.hard_negatives": 5},
    "softmax, bank on the host": {"objective.name": "softmax", "bank.device": "cpu"},
    "softmax, bank on the host, float16": {
        "objective.name": "softmax", "bank.device": "cpu", "bank.dtype": "float16"
    },
    "nce, bank on the host": {"objective.name": "nce", "bank.device": "cpu", "bank.fetch_ahead": 2},
    "nce, per sample, bank on the host": {
        "objective.name": "nce", "bank.device": "cpu", "objective.per_sample": True
    },
    "infonce, hard, bank on the host, float16": {
        **INFONCE, "bank.device": "cpu", "objective.hard_negatives": 3, "bank.dtype": "float16"
    },
    "nce, mapped": {"objective.name": "nce", "bank.device": "mapped"},
    "softmax, mapped": {"objective.name": "softmax", "bank.device": "mapped"},
}  # fmt: skip


def allowed_waits(options) -> set:
    beside = HOST_BANK_WAITS if options.get("bank.device") else set()
    return beside | (HARD_WAITS if options.get("objective.hard_negatives") else set())


def trained(worker: Worker, options, device: torch.device) -> tuple[training_state.TrainState, float, dict]:
    """The state after some steps, the mean loss, and what the host waited for in the last step."""
    config = TrainConfig().with_overrides({**SMALL, **options})
    worker = dataclasses.replace(worker, device=device)
    plan = BatchPlan(BATCH, config.optim.norm_group or BATCH, worker.world_size)
    state = training_state.build_state(config, N, worker)
    order = Permutation(N, config.seed)
    stepper = Stepper(state, plan, worker, order)
    images_N = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    waits = {}
    for step in range(STEPS):
        positions = range(step * BATCH + plan.offsets(worker.rank)[0], step * BATCH + plan.offsets(worker.rank)[1])
        rows_B = np.array([(7 * position) % N for position in positions])
        images_B = images_N[rows_B].clone()
        batch = Batch(
            OnGpu(images_B) if device == DEVICE else images_B,
            torch.from_numpy(rows_B),
            torch.from_numpy(~np.isin(rows_B, DAMAGED)),
        )
        gpu.start_anew()
        stepper.step(batch)
        waits = dict(host_waits)
    stepper.settle()
    return state, stepper.sums.read()["loss"], waits


def host(tensor):
    return tensor.host if isinstance(tensor, OnGpu) else tensor


@pytest.mark.parametrize("name", CASES)
def test_a_step_mixes_no_devices_waits_only_where_it_is_written_and_computes_the_same(name):
    options = CASES[name]
    with pretended_gpu(pytest.MonkeyPatch.context()):
        state, loss, waits = trained(Worker(device=DEVICE), options, DEVICE)
        assert set(waits) == allowed_waits(options)
        on_host = options.get("bank.device")
        assert isinstance(state.bank.rows, OnGpu) != bool(on_host)
        assert is_locked(state.bank.rows) == (on_host == "cpu")
        tensors = {key: host(value) for key, value in state.tensors().items()}
        rows = host(state.bank.rows)
    expected, expected_loss, _ = trained(Worker(device=torch.device("cpu")), options, torch.device("cpu"))
    # channels_last is a GPU's layout: sums of convolutions have another order.
    assert loss == pytest.approx(expected_loss, rel=2e-2 if "bfloat16" in name else 2e-4)
    tolerance = 0.1 if "bfloat16" in name else 5e-3
    torch.testing.assert_close(rows.float(), expected.bank.rows.float(), rtol=0, atol=tolerance)
    assert tensors.keys() == expected.tensors().keys()


def image_set(kind: str) -> Dataset:
    """Twelve pictures in memory, or as JPEG files of which one is damaged."""
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)
    index = DatasetIndex(
        source="made",
        names=[str(row) for row in range(12)],
        heights_N=np.full(12, 32, dtype=np.int32),
        widths_N=np.full(12, 40, dtype=np.int32),
        labels_N=None,
        class_names=(),
        bad_N=np.zeros(12, dtype=bool),
        digest="made",
    )
    if kind == "memory":
        return Dataset(index, pixels_NHWC, None)
    files = []
    for pixels_HWC in pixels_NHWC:
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG")
        files.append(file.getvalue())
    files[5] = files[5][:300] + bytes(50)
    return Dataset(index, None, files.__getitem__)


REFERENCE_WAITS = {
    # torchvision's own functions send means, deviations and kernels for every image: the reference is for comparison.
    ("blocking copy to the device", "dataloading/torch_loader.py:_reference_color"),
    ("copy from pageable memory", "dataloading/torch_loader.py:_reference_color"),
}
PATHS = [("memory", "memory"), ("memory", "torch"), ("encoded", "torch"), ("encoded", "nvimgcodec")]
AUGMENT = AugmentConfig(
    size=16, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), grayscale_probability=0.3, flip_probability=0.5,
    blur_probability=0.5, solarize_probability=0.3, num_views=2,
)  # fmt: skip


def loaded(images, backend: str, device: torch.device) -> tuple[list[Batch], dict]:
    """Two training batches and one of evaluation, and what the host waited for once the loader was open."""
    loader = make_loader(
        images, AUGMENT, seed=1, global_batch=6, offsets=(0, 6), device=device, num_threads=1, backend=backend
    )
    gpu.start_anew()
    batches = list(islice(loader.batches(0), 2))
    waits = dict(host_waits)
    loader.close()
    settings = {"resize": 20, "crop": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 12, "num_threads": 1}
    return [*batches, *eval_batches(images, range(12), device=device, backend=backend, **settings)], waits


@pytest.mark.parametrize(("images", "backend"), PATHS)
def test_every_image_path_copies_from_page_locked_memory_alone_and_has_the_same_pixels(images, backend):
    dataset = image_set(images)
    with pretended_gpu(pytest.MonkeyPatch.context()):
        found, waits = loaded(dataset, backend, DEVICE)
    assert set(waits) == (REFERENCE_WAITS if backend == "torch" else set())
    expected, _ = loaded(dataset, backend, torch.device("cpu"))
    for batch, same in zip(found, expected, strict=True):
        assert batch.images_BCHW.device == DEVICE
        assert torch.equal(batch.indices_B, same.indices_B)
        assert torch.equal(batch.valid_B, same.valid_B)
        # Colours are compiled on a CPU, and torch's operations on a GPU.
        torch.testing.assert_close(host(batch.images_BCHW), same.images_BCHW, rtol=0, atol=3e-5)


def test_the_crops_of_a_batch_reach_the_device_in_one_copy():
    pixels = image_set("memory").pixels_NHWC
    with pretended_gpu(pytest.MonkeyPatch.context()):
        crops = MemoryCrops(pixels, 16, DEVICE)
        windows = np.arange(12), np.full((12, 2), 3), np.full((12, 2), 20)
        gpu.start_anew()
        found = crop_resize(crops._pixels_NHWC, *windows, size=16)
    assert gpu.copies_to_device == collections.Counter({"dataloading/crop.py:crop_resize": 1})
    torch.testing.assert_close(host(found), crop_resize(torch.from_numpy(pixels), *windows, size=16), rtol=0, atol=0)


def train_on_gpu(worker: Worker, config_json: str, uri: str):
    from instdisc.train import loop

    with pretended_gpu(pytest.MonkeyPatch.context()):
        return loop.train(dataclasses.replace(worker, device=DEVICE), config_json, uri)


@pytest.mark.parametrize("bank", ["auto", "cpu"])
def test_a_run_trains_evaluates_saves_and_goes_on_from_its_checkpoint(tmp_path, bank):
    root = str(write_cifar10(tmp_path / "data", N, 11))
    config = TrainConfig().with_overrides(
        {
            **SMALL, "data.kind": "cifar10", "data.root": root, "bank.device": bank, "eval.k": 5,
            "optim.epochs": 1, "checkpoint.every_steps": 1, "system.tensorboard": True,
            "system.precision": "bfloat16",
        }
    )  # fmt: skip
    run = Run(str(tmp_path / "run"))
    config = run.agree_on_config(config)
    (result,) = run_local(train_on_gpu, 0, config.to_json(), run.uri, coordinator=run.coordinator(config))
    assert result["finished"]
    assert result["step"] == result["num_steps"] == 3
    saved = read_latest(run.checkpoints())
    assert saved is not None
    assert saved.state["step"] == 3
    longer = config.with_overrides({"optim.epochs": 2})
    worker = Worker(device=DEVICE)
    with pretended_gpu(pytest.MonkeyPatch.context()):
        state = training_state.build_state(longer, N, worker)
        state.load(saved)
        assert state.step == 3
        assert torch.equal(host(state.bank.rows).float(), saved.rows("bank"))
        for name, value in state.tensors().items():
            torch.testing.assert_close(host(value), saved.tensors()[name], rtol=0, atol=0)


def collectives_of_nccl_alone(worker: Worker) -> dict:
    """The bank's collectives in a group that refuses tensors of the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
        for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"):
            patch.setattr(dist, name, _on_the_device_alone(getattr(dist, name)))
        with pretended_gpu(pytest.MonkeyPatch.context()):
            bank = ShardedMemoryBank(N, 8, seed=1, device=DEVICE)
            indices_B = torch.arange(3 + worker.rank) * 5 + worker.rank
            rows_BD = bank.lookup(indices_B)
            bank.update(indices_B, OnGpu(host(rows_BD).flip(0).contiguous()), step=0)
            negatives_KD, indices_K = bank.gather_negatives(0, 20)
            counts = gather_counts(len(indices_B))
            total = all_reduce_sum(torch.tensor([worker.rank + 1]))
            gathered = all_gather_rows(indices_B, counts)
            own = reduce_scatter_rows(torch.ones(sum(counts), 2), counts)
            return {
                "rows": host(rows_BD).tolist(), "negatives": host(negatives_KD).tolist(), "of": indices_K.tolist(),
                "counts": counts, "total": total.tolist(), "gathered": gathered.tolist(), "own": own.tolist(),
            }  # fmt: skip


def _on_the_device_alone(collective):
    def call(*tensors, **options):
        assert all(isinstance(tensor, OnGpu) for tensor in tensors if isinstance(tensor, torch.Tensor))
        assert all(tensor.is_contiguous() for tensor in tensors), "NCCL takes no others"
        return collective(*map(host, tensors), **options)

    return call


def test_a_bank_works_in_a_group_that_has_nccl_alone():
    first, second = run_local(collectives_of_nccl_alone, 2)
    rows_ND = ShardedMemoryBank(N, 8, seed=1).rows
    assert first["counts"] == second["counts"] == [3, 4]
    assert first["total"] == second["total"] == [3]
    assert first["gathered"] == second["gathered"] == [0, 5, 10, 1, 6, 11, 16]
    assert second["own"] == [[2.0, 2.0]] * 4
    torch.testing.assert_close(torch.tensor(first["rows"]), rows_ND[[0, 5, 10]])
    torch.testing.assert_close(torch.tensor(second["rows"]), rows_ND[[1, 6, 11, 16]])
    assert first["negatives"] == second["negatives"]


def test_building_an_encoder_leaves_the_random_numbers_of_gpus_as_they_were(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    build_encoder(TrainConfig().with_overrides(SMALL).model, seed=3)
    assert not seeded
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_owners_of_rows_work_in_blocks_of_a_gpus_size_on_a_gpu():
    num_samples, num_negatives = 64, 256
    rows_GK = np.random.default_rng(0).integers(0, N, (num_samples, num_negatives))
    with pretended_gpu(pytest.MonkeyPatch.context()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "BLOCK_BYTES", 4 * 8 * num_negatives)  # one sample
        bank = ShardedMemoryBank(N, 8, seed=1, device=DEVICE)
        products = []
        plain = torch.bmm
        patch.setattr(torch, "bmm", lambda *a, **k: products.append(a) or plain(*a, **k))
        features_BD = OnGpu(torch.nn.functional.normalize(torch.randn(num_samples, 8), dim=1))
        pairs = owners.owned_pairs(rows_GK, bank)
        owners.log_sum_exp_of_owned(features_BD, pairs, bank, temperature=0.1, counts_W=[num_samples])
    assert len(products) == 2
