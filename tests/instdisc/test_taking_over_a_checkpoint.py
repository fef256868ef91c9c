"""What a state takes over from a checkpoint, after another one that was found damaged on the way."""

from __future__ import annotations

import uuid

import torch

from cluster.checkpoint import Checkpointer, read_latest
from cluster.store import Store
from cluster.worker import Worker
from instdisc.config import TrainConfig
from instdisc.train.state import TrainState, build_state

NUM_ROWS = 12


def made(seed: int) -> TrainState:
    config = TrainConfig().with_overrides({"seed": seed, "model.architecture": "convnet-small", "model.width": 4})
    return build_state(config, NUM_ROWS, Worker(device=torch.device("cpu")))


def test_a_checkpoint_without_momenta_leaves_none_of_another_behind():
    store, worker = Store(f"memory://{uuid.uuid4().hex}"), Worker(device=torch.device("cpu"))
    before, state = made(0), made(1)
    checkpointer = Checkpointer(store, worker=worker)
    checkpointer.restore()
    checkpointer.begin_attempt()
    checkpointer.save(0, before.tables(), before.tensors(), before.numbers())
    checkpointer.close()
    for parameter in state.encoder.parameters():
        state.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    state.curves["knn_top1"] = [(1, 50.0)]

    checkpoint = read_latest(store)
    assert checkpoint is not None
    state.load(checkpoint)

    assert not [name for name in state.tensors() if name.startswith("optimizer.")]
    assert state.curves == {}
    assert all(torch.equal(state.tensors()[name], tensor) for name, tensor in before.tensors().items())
    assert torch.equal(state.bank.rows, before.bank.rows)
