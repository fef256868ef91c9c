"""What the loop makes of saves: which are due, which wait, which failures end a run."""

from __future__ import annotations

import errno
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cluster.checkpoint import RowTable, SaveFailedError, SupersededError, read_latest
from cluster.manifest import Manifest
from cluster.store import Store, StoreError
from cluster.worker import Worker
from instdisc.config import TrainConfig
from instdisc.config_sections import ConfigError
from instdisc.runs import Run
from instdisc.train.saves import Saves
from instdisc.train.state import TrainState


class GatedStore(Store):
    """Objects are written when the gate is open; `fail` raises instead."""

    gate = threading.Event()
    fail: Exception | None = None

    def put(self, key, *parts):
        if key.startswith("objects/"):
            assert type(self).gate.wait(20)
            if type(self).fail is not None:
                raise type(self).fail
        super().put(key, *parts)


class GatedRun(Run):
    def checkpoints(self) -> Store:
        return GatedStore(self.uri + "/checkpoints")


@dataclass
class State:
    """A state that can be saved."""

    step: int = 0
    loaded: list[int] = field(default_factory=list)

    def tables(self) -> dict[str, RowTable]:
        return {"bank": RowTable(5, 0, torch.full((5, 2), float(self.step)))}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w": torch.full((3,), float(self.step))}

    def numbers(self) -> dict[str, Any]:
        return {"step": self.step}

    def metrics(self) -> dict[str, float]:
        return {"knn_top1": float(self.step)}

    def load(self, checkpoint) -> None:
        self.step = checkpoint.state["step"]


@pytest.fixture
def gate():
    GatedStore.gate, GatedStore.fail = threading.Event(), None
    yield GatedStore.gate
    GatedStore.gate.set()


def started(uri: str | None = None, **fields) -> tuple[Saves, State, list[dict], str]:
    uri = uri or f"memory://{uuid.uuid4().hex}"
    told: list[dict] = []
    config = TrainConfig().with_overrides({f"checkpoint.{name}": value for name, value in fields.items()})
    worker = Worker(device=torch.device("cpu"), send_event=lambda text: told.append(text))
    saves, state = Saves(worker, config, GatedRun(uri), "digest"), State()
    saves.restore(state)  # pyright: ignore[reportArgumentType]
    saves.start(state.step)
    return saves, state, told, uri


def look(saves: Saves, state: State):
    """One look of the loop; return the reports of saves that ended."""
    seen = [saves.look(state.step)]
    return [saves.ended(seen), saves.save_if_due(state, seen)]  # pyright: ignore[reportArgumentType]


def wait_until_written(saves: Saves) -> None:
    deadline = threading.Event()
    for _ in range(1000):
        if not saves._checkpointer.is_saving:
            return
        deadline.wait(0.01)
    raise TimeoutError


def test_training_goes_on_while_a_save_is_written_and_the_next_is_skipped(gate):
    saves, state, _, uri = started(every_steps=2, every_minutes=None)
    for state.step in range(1, 8):
        assert look(saves, state) == [None, None]
    gate.set()
    wait_until_written(saves)
    state.step = 9
    report, _ = look(saves, state)
    assert report is not None
    assert report.step == 2
    newest = read_latest(Store(uri + "/checkpoints"))
    assert newest is not None
    assert newest.step == 2
    assert newest.rows("bank").unique().tolist() == [2.0], "the state of step 2, though training went on to step 9"
    saves.close()


def test_with_overlap_wait_no_save_is_left_out(gate):
    gate.set()
    saves, state, _, uri = started(every_steps=2, every_minutes=None, overlap="wait", keep_last=10)
    reports = []
    for state.step in range(1, 8):
        reports += [report.step for report in look(saves, state) if report]
    saves.save_now(state)  # pyright: ignore[reportArgumentType]
    assert reports == [2, 4]
    manifests = Store(uri + "/checkpoints").list("manifests/")
    assert [int(key[-17:-5]) for key in manifests] == [2, 4, 6, 7]
    saves.close()


def test_a_failure_that_may_pass_is_told_and_the_next_save_works(gate):
    gate.set()
    saves, state, told, _uri = started(every_steps=1, every_minutes=None)
    GatedStore.fail = ConnectionResetError(errno.ECONNRESET, "the server hung up")
    state.step = 1
    look(saves, state)
    wait_until_written(saves)
    GatedStore.fail = None
    state.step = 2
    assert look(saves, state) == [None, None]
    assert any("the server hung up" in str(text) and "training goes on" in str(text) for text in told)
    wait_until_written(saves)
    state.step = 3
    report, _ = look(saves, state)
    assert report is not None
    assert report.step == 2
    saves.close()


def test_a_failure_that_does_not_pass_ends_the_run(gate):
    gate.set()
    saves, state, _, _ = started(every_steps=1, every_minutes=None)
    GatedStore.fail = OSError(errno.ENOSPC, "no space left")
    state.step = 1
    look(saves, state)
    wait_until_written(saves)
    state.step = 2
    with pytest.raises(SaveFailedError, match="no space left"):
        look(saves, state)
    saves.close()


def test_at_the_end_every_failure_counts(gate):
    gate.set()
    saves, state, _, _ = started(every_steps=1, every_minutes=None)
    GatedStore.fail = ConnectionResetError(errno.ECONNRESET, "the server hung up")
    state.step = 1
    with pytest.raises(SaveFailedError, match="the server hung up"):
        saves.save_now(state)  # pyright: ignore[reportArgumentType]
    saves.close()


def test_a_checkpoint_that_is_wished_for_is_saved_at_the_next_look_and_the_wish_is_answered(gate):
    gate.set()
    saves, state, _, _ = started(every_minutes=None)
    coordinator = saves._checkpointer._coordinator
    number = coordinator.call("want_save")
    assert coordinator.call("wishes")["served"] < number
    for _ in range(300):
        if saves.look(state.step)["wishes"] == number:
            break
        threading.Event().wait(0.01)
    state.step = 5
    look(saves, state)
    wait_until_written(saves)
    assert coordinator.call("wishes") == {"saves": number, "served": number, "superseded": False}
    state.step = 6
    assert look(saves, state)[0].step == 5
    assert look(saves, state) == [None, None], "a wish is fulfilled once"
    saves.close()


def test_a_wish_whose_save_fails_in_passing_is_fulfilled_at_the_next_look(gate):
    gate.set()
    saves, state, _, _ = started(every_minutes=None)
    coordinator = saves._checkpointer._coordinator
    number = coordinator.call("want_save")
    for _ in range(300):
        if saves.look(state.step)["wishes"] == number:
            break
        threading.Event().wait(0.01)
    GatedStore.fail = ConnectionResetError(errno.ECONNRESET, "the server hung up")
    for state.step in (5, 6):
        look(saves, state)
        wait_until_written(saves)
        GatedStore.fail = None
    assert coordinator.call("wishes")["served"] == number
    saves.close()


def test_what_cannot_be_removed_after_any_save_is_told_once(gate, monkeypatch):
    gate.set()

    def refuse(store, keys):
        raise StoreError(f"cannot delete {keys[0]!r}: no permission")

    monkeypatch.setattr(Store, "delete_many", refuse)
    saves, state, told, _ = started(every_steps=1, every_minutes=None, keep_last=1)
    for state.step in range(1, 6):
        saves.save_now(state)  # pyright: ignore[reportArgumentType]
    assert sum("were not removed" in str(text) for text in told) == 1, told
    saves.close()


def test_a_run_that_another_process_took_over_ends_and_says_so(gate):
    gate.set()
    saves, state, _, uri = started(every_steps=1, every_minutes=None)
    other, other_state, _, _ = started(uri, every_steps=1, every_minutes=None)
    state.step = 1
    look(saves, state)
    wait_until_written(saves)
    state.step = 2
    with pytest.raises(SupersededError, match="left behind by attempt 2"):
        look(saves, state)
    other_state.step = 1
    other.save_now(other_state)  # pyright: ignore[reportArgumentType]
    saves.close()
    other.close()


@dataclass
class MeasuredState(State):
    """A state with curves, whose metrics are those of a training run."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    metrics = TrainState.metrics  # pyright: ignore[reportAssignmentType]

    def measure(self, value: float) -> None:
        self.curves.setdefault("knn_top1", []).append((self.step, value))


def kept_metrics(uri: str) -> dict[int, dict[str, float]]:
    store = Store(uri + "/checkpoints")
    found = [Manifest.from_bytes(store.get(key), key) for key in store.list("manifests/")]
    return {manifest.step: dict(manifest.metrics) for manifest in found}


def test_the_best_checkpoint_is_one_of_a_step_at_which_the_best_value_was_measured(gate):
    gate.set()
    saves, _, _, uri = started(every_steps=1, every_minutes=None, keep_last=1, keep_best="knn_top1")
    state, values = MeasuredState(), {2: 9.0, 5: 7.0, 8: 8.0}
    for state.step in range(1, 10):
        if state.step in values:
            state.measure(values[state.step])
        saves.save_now(state)  # pyright: ignore[reportArgumentType]
    assert kept_metrics(uri) == {2: {"knn_top1": 9.0}, 9: {}}
    saves.close()


@pytest.mark.parametrize("overlap", ["skip", "wait"])
def test_a_state_that_is_measured_as_the_best_so_far_is_saved_at_once(gate, overlap):
    gate.set()
    saves, _, _, uri = started(every_steps=2, every_minutes=None, overlap=overlap, keep_best="knn_top1", keep_last=9)
    state, values = MeasuredState(), {3: 50.0, 5: 40.0, 7: 50.0, 9: 60.0}
    for state.step in range(1, 10):
        if state.step in values:
            state.measure(values[state.step])
        look(saves, state)
    state.step = 10
    saves.save_now(state)  # pyright: ignore[reportArgumentType]
    kept = kept_metrics(uri)
    assert {step: metrics["knn_top1"] for step, metrics in kept.items() if metrics} == {3: 50.0, 7: 50.0, 9: 60.0}
    assert 5 not in kept
    saves.close()


def test_a_metric_that_nobody_measures_is_refused():
    with pytest.raises(ConfigError, match="found 'knn_top5', expected one of knn_top1, knn_bank_top1"):
        TrainConfig().with_overrides({"checkpoint.keep_best": "knn_top5"})
