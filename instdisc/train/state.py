"""Everything of a training run that must survive a crash, on one rank.

Shapes: N rows of the data set, D feature numbers.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.checkpoint import Checkpoint, RowTable
from cluster.collectives import Group
from cluster.worker import Worker
from instdisc.config import TrainConfig
from instdisc.memory_bank import DTYPES, ShardedMemoryBank
from instdisc.models import Encoder, build_encoder
from instdisc.objectives.normalizer import Normalizer
from instdisc.train.batch_norm import GroupedBatchNorm

# torch 2.15.0: the backward pass of channels_last convolutions of fewer than 16 channels writes beyond its memory (4 to
# 6 channels on an AMD EPYC, 8 to 15 on a Xeon with AVX-512, images of 64 pixels and more: signals 6 and 11, a hang).
MIN_CHANNELS_LAST_ON_CPU = 16


@dataclass
class TrainState:
    """Encoder, optimizer, bank, normaliser and the position in the stream."""

    config: TrainConfig
    encoder: Encoder
    parallel: nn.Module  # the encoder under DDP where there are several ranks, itself otherwise
    optimizer: torch.optim.SGD
    batch_norm: GroupedBatchNorm
    bank: ShardedMemoryBank
    normalizer: Normalizer
    step: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return what every rank has alike: weights, BatchNorm buffers and momenta, by name; no copies."""
        tensors = {f"model.{name}": value for name, value in self.encoder.state_dict().items()}
        for name, parameter in self.encoder.named_parameters():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"optimizer.momentum.{name}"] = momentum
        return {name: value.detach() for name, value in tensors.items()}

    def tables(self) -> dict[str, RowTable]:
        """Return the row tables of which this rank owns a part; no copies."""
        bank = self.bank
        return {
            "bank": RowTable(bank.num_rows, bank.start, bank.rows, bank.last_step, bank.guard),
            "bank_last_step": RowTable(bank.num_rows, bank.start, bank.last_step, bank.last_step, bank.guard),
        }

    def numbers(self) -> dict[str, Any]:
        """Return the rest as JSON-able values."""
        curves = {name: [list(point) for point in curve] for name, curve in self.curves.items()}
        return {"step": self.step, "normalizer": self.normalizer.state_dict(), "curves": curves}

    def metrics(self) -> dict[str, float]:
        """Return what was measured of the encoder as it is now: of each curve the value at this step, if it has one."""
        return {name: curve[-1][1] for name, curve in self.curves.items() if curve and curve[-1][0] == self.step}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of any number of workers: each rank reads the rows that it owns."""
        bank = self.bank
        checkpoint.read_rows("bank", bank.start, bank.rows)
        checkpoint.read_rows("bank_last_step", bank.start, bank.last_step)
        bank.recount_written()
        self._load_weights(checkpoint.tensors())
        self.step = checkpoint.state["step"]
        self.normalizer.load_state_dict(checkpoint.state["normalizer"])
        self.curves = {name: [(s, v) for s, v in curve] for name, curve in checkpoint.state["curves"].items()}

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        self.encoder.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        self.batch_norm.load_running()
        for name, parameter in self.encoder.named_parameters():
            momentum = tensors.get(f"optimizer.momentum.{name}")
            # A newer checkpoint that was found damaged may have left one where this one has none.
            self.optimizer.state.pop(parameter, None)
            if momentum is not None:
                # In the parameter's own layout (channels last): fused SGD goes over both memories side by side.
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def build_state(config: TrainConfig, num_rows: int, worker: Worker) -> TrainState:
    """Return the state before step 0, alike on every rank but for the bank's rows that each owns. Collective."""
    # Groups of their own: nothing of these waits for the gradients, nor for each other.
    bank_group: Group = dist.new_group() if worker.world_size > 1 else None
    statistics_group: Group = dist.new_group() if worker.world_size > 1 else None
    encoder = build_encoder(config.model, config.seed).to(worker.device)
    if use_channels_last(config, worker.device):
        encoder = encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    batch_norm = GroupedBatchNorm(encoder, statistics_group)
    optim = config.optim
    optimizer = torch.optim.SGD(
        encoder.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
        fused=True,
    )
    bank = ShardedMemoryBank(
        num_rows,
        config.model.feature_dim,
        momentum=config.bank.momentum,
        dtype=DTYPES[config.bank.dtype],
        device=worker.device if config.bank.device == "auto" else "cpu",
        work_device=worker.device,
        mapped_dir=(config.bank.mapped_dir or tempfile.gettempdir()) if config.bank.device == "mapped" else None,
        seed=config.seed,
        group=bank_group,
    )
    normalizer = Normalizer(
        kind=config.objective.z,
        decay=config.objective.z_decay,
        num_rows=num_rows,
        temperature=config.objective.temperature,
        device=worker.device,
        group=statistics_group,
    )
    parallel = wrap(encoder, worker, config)
    return TrainState(config, encoder, parallel, optimizer, batch_norm, bank, normalizer)


def wrap(encoder: Encoder, worker: Worker, config: TrainConfig) -> nn.Module:
    """Return the encoder under DDP, its buckets in their final order; itself with one rank.

    DDP rebuilds its buckets in the order in which gradients arrived once, after the first iteration, and with it
    changes the order of summation at three ranks and more. A resumed run would pass through that change again, so it
    is brought about before the first real step.
    """
    if worker.world_size == 1:
        return encoder
    device_ids = [worker.device.index] if worker.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.15 names its successor, which torch 2.11 lacks.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        parallel = DistributedDataParallel(encoder, device_ids=device_ids, broadcast_buffers=False)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    images_BCHW = torch.zeros((2, 3, config.augment.size, config.augment.size), device=worker.device)
    if use_channels_last(config, worker.device):
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        parallel(images_BCHW).sum().backward()
        encoder.zero_grad(set_to_none=True)
    for name, buffer in encoder.named_buffers():
        buffer.copy_(before[name])
    return parallel


def use_channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Return whether images and weights are kept with channels last."""
    wanted = config.system.channels_last
    if device.type == "cpu" and config.model.min_channels < MIN_CHANNELS_LAST_ON_CPU:
        return False
    return wanted == "on" or (wanted == "auto" and device.type == "cuda")


def decide_precision(worker: Worker, config: TrainConfig) -> TrainConfig:
    """Return the configuration with the precision that "auto" comes to on these workers. Collective.

    bfloat16 where all of them compute in it. The run keeps it: what it computes must not depend on where it goes on.
    """
    if config.system.precision != "auto":
        return config
    all_have_it = all(worker.all_gather_object(has_bfloat16(worker.device)))
    return config.with_overrides({"system.precision": "bfloat16" if all_have_it else "float32"})


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU with units for bfloat16. Older ones (before sm_80) emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the dtype that the encoder computes in under autocast, None for float32 throughout."""
    wanted = config.system.precision
    if wanted == "bfloat16" or (wanted == "auto" and has_bfloat16(device)):
        return torch.bfloat16
    return None
