"""Drivers, coordinators, worker groups and the messages between them, as a model that moves one small step at a time.

The coordinator, the parts that ranks write, the snapshots and the store are the real ones. Modelled are the processes:
what a rank has in memory, what it has uploaded, what it has said, and what is on its way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from gated_store import KILLS, Call, Fate, GatedStore
from reference_bank import NUM_ROWS, World, rows_written

from cluster.attempts import attempt_numbers
from cluster.checkpoint_reader import Checkpoint, verify_share
from cluster.checkpoint_writer import write_part
from cluster.commits import SaveId
from cluster.coordinator import COLLECTING, COMMITTED, SUPERSEDED, Coordinator
from cluster.manifest import ManifestId, read_manifest
from cluster.retention import Retention
from cluster.row_table import RowTable
from cluster.snapshot import SnapshotTaker
from cluster.uploads import Pace

BLOCK_ROWS = 3
MAX_MESSAGES = 12


class Recorder:
    """A store that takes down what is put, so that the model can upload it object by object."""

    def __init__(self) -> None:
        self.puts: list[tuple[str, bytes]] = []

    def put(self, key, *parts):
        self.puts.append((key, b"".join(parts)))


@dataclass
class RankSave:
    """A rank's part of a save. puts: objects not uploaded yet. message: what to say then. outcome: the answer."""

    id: SaveId
    puts: list[tuple[str, bytes]]
    message: dict[str, Any]
    outcome: dict[str, Any] | None = None


@dataclass
class Message:
    """What a rank said to the coordinator, on its way."""

    group: Group
    rank: int
    id: SaveId
    text: str


@dataclass
class Group:
    """The workers of an attempt. phase: begin, verify, start, train, or dead."""

    world: World
    driver: Driver
    world_size: int
    phase: str = "begin"
    attempt: int = 0
    chain: list[ManifestId] = field(default_factory=list)
    damaged: list[ManifestId] = field(default_factory=list)
    parent: ManifestId | None = None
    step: int = 0
    num_saves: int = 0
    saving: dict[int, RankSave] = field(default_factory=dict)
    last: list[ManifestId | None] = field(default_factory=list)
    may_add: list[bool] = field(default_factory=list)

    def take_number(self, begun: dict[str, Any]) -> None:
        self.attempt = begun["attempt"]
        self.chain = [ManifestId(*id) for id in begun["chain"]]
        self.damaged = [ManifestId(*id) for id in begun["damaged"]]
        self.phase = "verify"
        self.world.given[self.attempt] = self.chain

    def restore(self) -> None:
        """As `Checkpointer.restore`: the newest checkpoint that is intact, or death where there should be one."""
        reader = self.world.reader
        self.phase = "start"
        for id in reversed(self.chain):
            _, problems = verify_share(reader, id, 0, 1, 1)
            if not problems:
                self.parent = id
                self._load(Checkpoint(reader, read_manifest(reader, id), num_threads=1))
                return
            if not reader.exists(id.key):
                self.phase = "dead"  # another process still writes, or somebody removed it: the message says so
                return
            assert id in self.world.harmed, f"{id} was offered to attempt {self.attempt} and is damaged: {problems}"
            self.damaged.append(id)
        if self.chain:
            self.phase = "dead"
        else:
            self._load(None)

    def _load(self, checkpoint: Checkpoint | None) -> None:
        self.step = checkpoint.step if checkpoint else 0
        self.bank = checkpoint.rows("bank") if checkpoint else torch.tensor([[0, -1]] * NUM_ROWS, dtype=torch.int32)
        self.last_step = checkpoint.rows("last_step") if checkpoint else torch.full((NUM_ROWS,), -1, dtype=torch.int32)
        assert [tuple(row) for row in self.bank.tolist()] == self.world.bank(self.parent)

    def start(self) -> Call:
        """Call `start_attempt`; once it may have reached the coordinator it counts as what the attempt starts from."""
        if self.attempt not in self.world.lineage:
            self.world.lineage[self.attempt] = self.parent
            if self.parent and self.chain.index(self.parent) < len(self.chain) - self.world.last:
                self.world.bold.add(self.attempt)
        arguments = json.loads(json.dumps({"parent": self.parent, "damaged": self.damaged}))
        coordinator = self.driver.coordinator
        assert coordinator is not None
        return Call(lambda: coordinator.start_attempt(self.attempt, **arguments))

    def is_started(self, started: dict[str, Any]) -> None:
        if self.phase == "start":
            self.phase = "train"
            self.last = [self.parent] * self.world_size
            self.may_add = [started["growth"] is not None] * self.world_size

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step += 1
            for row in rows_written(self.attempt, self.step):
                self.bank[row] = torch.tensor([self.attempt, self.step], dtype=torch.int32)
                self.last_step[row] = self.step

    @property
    def is_saving(self) -> bool:
        return any(save.outcome is None for save in self.saving.values())

    def start_save(self, incremental: bool) -> None:
        """Freeze all ranks and let the real writer say what each has to upload."""
        self.num_saves += 1
        id = SaveId(self.attempt, self.step, self.num_saves)
        for rank in range(self.world_size):
            start, stop = (NUM_ROWS * r // self.world_size for r in (rank, rank + 1))
            last_step = self.last_step[start:stop].clone()
            tables = {
                "bank": RowTable(NUM_ROWS, start, self.bank[start:stop], last_step),
                "last_step": RowTable(NUM_ROWS, start, last_step, last_step),
                "whole": RowTable(NUM_ROWS, start, torch.full((stop - start, 1), 1000 * self.attempt + self.step)),
            }
            state = {"attempt": self.attempt, "step": self.step}
            tensors = {"w": torch.tensor([self.attempt, self.step])} if rank == 0 else None
            since = self.last[rank] if incremental and self.may_add[rank] else None
            recorder = Recorder()
            snapshot = SnapshotTaker().take(self.step, tables, tensors, state, {})
            part = write_part(
                recorder,  # type: ignore[arg-type]
                id.prefix,
                snapshot,
                since=since,
                block_rows=BLOCK_ROWS,
                num_threads=1,
                pace=Pace(),
            )
            self.saving[rank] = RankSave(id, recorder.puts, {"part": part})

    def upload(self, rank: int, num_objects: int) -> None:
        save = self.saving[rank]
        for key, data in save.puts[:num_objects]:
            self.world.observe("put", key, data)
            self.world.reader.put(key, data)
        del save.puts[:num_objects]

    def fail(self, rank: int) -> None:
        """The rank's upload fails."""
        self.saving[rank].puts.clear()
        self.saving[rank].message = {"error": "disk full", "permanent": False}

    def say(self, rank: int) -> None:
        save = self.saving[rank]
        if len(self.driver.bag) < MAX_MESSAGES:
            self.driver.bag.append(Message(self, rank, save.id, json.dumps(save.message)))

    def hear(self, rank: int, id: SaveId, answer: dict[str, Any]) -> None:
        """Take in an answer, as `Checkpointer.wait`."""
        save = self.saving.get(rank)
        if answer["state"] == COLLECTING or save is None or save.id != id or save.outcome is not None:
            return
        save.outcome = answer
        if answer["state"] == COMMITTED:
            self.last[rank], self.may_add[rank] = id.manifest, answer["growth"] is not None
        elif answer["state"] == SUPERSEDED:
            newest = max(attempt_numbers(self.world.reader))
            assert newest > self.attempt, f"attempt {self.attempt} is told that it is superseded and is the newest"
            self.phase = "dead"
        self.world.hears(id, rank, answer)


class Driver:
    """A driver: its coordinator, which can be lost and started again, its groups (the last is not a zombie), and the
    calls that its coordinator works on: the thread that commits, the one that removes, and one for a request.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.bag: list[Message] = []
        self.groups: list[Group] = []
        self.coordinator: Coordinator | None = None
        self.working: Call | None = None
        self.removing: Call | None = None
        self.request: tuple[Call, Group, str] | None = None
        self.revive()

    def revive(self) -> None:
        """Start the coordinator again; it knows nothing but the store."""
        if self.coordinator is None:
            store = GatedStore(self.world.uri, self.world.observe)
            self.coordinator = Coordinator(store, retention=Retention(last=self.world.last))

    def lose(self) -> None:
        """The coordinator's process dies, with everything it was about to do."""
        for call in self.calls:
            call.kill()
        self.coordinator = self.working = self.removing = self.request = None

    @property
    def calls(self) -> list[Call]:
        calls = (self.working, self.removing, self.request and self.request[0])
        return [call for call in calls if call is not None]

    def begin(self, world_size: int) -> None:
        """A new worker group asks for an attempt; the ones before it go on as zombies."""
        assert self.coordinator is not None
        group = Group(self.world, self, world_size)
        self.groups = [*self.groups[-2:], group]
        self.request = Call(self.coordinator.begin_attempt), group, "begin"
        self.settle()

    def start(self, group: Group) -> None:
        self.request = group.start(), group, "start"
        self.settle()

    def work(self) -> None:
        assert self.coordinator is not None
        self.working = Call(self.coordinator.work)
        self.settle()

    def remove(self) -> None:
        """The thread that removes wakes up."""
        if self.coordinator is not None and self.removing is None:
            self.removing = Call(self.coordinator.remove_old)
            self.settle()

    def step(self, call: Call, fate: Fate = Fate.DONE) -> None:
        call.step(fate)
        if fate in KILLS:
            self.lose()
        self.settle()

    def settle(self) -> None:
        """Hand out the results of calls that have ended."""
        if self.working is not None and self.working.has_ended:
            error, self.working = self.working.error, None
            assert error is None, f"work() raised {error!r}, which ends the thread that commits"
        if self.removing is not None and self.removing.has_ended:
            error, self.removing = self.removing.error, None
            assert error is None, f"remove_old() raised {error!r}, which ends the thread that removes"
        if self.request is not None and self.request[0].has_ended:
            (call, group, kind), self.request = self.request, None
            if call.error is not None:
                assert isinstance(call.error, OSError), repr(call.error)
                group.phase = "dead"
            elif kind == "begin":
                group.take_number(json.loads(json.dumps(call.result)))
            else:
                group.is_started(json.loads(json.dumps(call.result)))

    def deliver(self, index: int, is_last: bool, answer_arrives: bool) -> None:
        """Bring a message to the coordinator and its answer back. is_last: no duplicate of it stays on its way."""
        message = self.bag.pop(index) if is_last else self.bag[index]
        if self.coordinator is None:
            return
        answer = json.loads(json.dumps(self._acknowledge(message)))
        if answer["state"] == COMMITTED:
            self.world.promise(message.id.manifest)
        if answer_arrives:
            message.group.hear(message.rank, message.id, answer)

    def _acknowledge(self, message: Message) -> dict[str, Any]:
        assert self.coordinator is not None
        return self.coordinator.acknowledge(
            message.id.attempt,
            message.id.step,
            message.id.number,
            message.rank,
            message.group.world_size,
            json.loads(message.text),
        )

    def finish_calls(self) -> None:
        for call in self.calls:
            while not call.has_ended:
                call.step()
        self.settle()

    def talk(self, group: Group) -> bool:
        """Without any fault: upload, say, deliver and work, once; return whether all ranks of the group know."""
        self.revive()
        for rank, save in group.saving.items():
            if save.outcome is None:
                group.upload(rank, len(save.puts))
                self.bag.append(Message(group, rank, save.id, json.dumps(save.message)))
                self.deliver(len(self.bag) - 1, True, True)
        self.finish_calls()
        self.work()
        self.finish_calls()
        self.remove()
        self.finish_calls()
        return not group.is_saving
