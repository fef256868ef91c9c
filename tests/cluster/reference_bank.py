"""What a run's bank must hold at any step of any attempt, computed from who started from what and nothing else; and an
outside reader that compares with it whatever a store shows.

Every row holds (attempt, step) of its last write, so that rows of two states in one checkpoint show.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from cluster.attempts import History, read_history
from cluster.checkpoint_reader import Checkpoint, read_latest, verify_share
from cluster.manifest import Manifest, ManifestId, read_manifest, visible_chain
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError

NUM_ROWS = 7
Bank = list[tuple[int, int]]


def rows_written(attempt: int, step: int) -> set[int]:
    """Return the rows that a step of an attempt writes."""
    return {(3 * step + attempt) % NUM_ROWS, (step * step + 5 * attempt) % NUM_ROWS}


@dataclass
class World:
    """A run's store as everybody sees it, and the truth about it.

    lineage: what the workers of each attempt really started from. given: what each attempt was told that it may start
    from. needs: the objects of every manifest ever written. harmed_keys: what was damaged from outside. promised:
    those that any worker was told are committed. bold: attempts that started from a checkpoint older than the
    newest `last`, because those were harmed: what an older process deletes may be theirs until they saved one.
    """

    last: int
    uri: str = field(default_factory=lambda: f"memory://{uuid.uuid4().hex}")
    lineage: dict[int, ManifestId | None] = field(default_factory=dict)
    given: dict[int, list[ManifestId]] = field(default_factory=dict)
    needs: dict[ManifestId, set[str]] = field(default_factory=dict)
    harmed_keys: set[str] = field(default_factory=set)
    promised: set[ManifestId] = field(default_factory=set)
    bold: set[int] = field(default_factory=set)
    born: dict[str, int] = field(default_factory=dict)
    told: dict[Any, dict[int, str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    verified: set[ManifestId] = field(default_factory=set)
    changed: bool = True

    def __post_init__(self) -> None:
        self.reader = Store(self.uri)

    def clean_up(self) -> None:
        for path in [path for path in MemoryFileSystem.store if path.startswith(self.reader.root + "/")]:
            del MemoryFileSystem.store[path]

    def bank(self, id: ManifestId | None) -> Bank:
        """Return each row's (attempt, step) after the step of `id`, (0, -1) for rows never written."""
        if id is None:
            return [(0, -1)] * NUM_ROWS
        parent = self.lineage[id.attempt]
        rows = self.bank(parent)
        for step in range(parent.step + 1 if parent else 1, id.step + 1):
            for row in rows_written(id.attempt, step):
                rows[row] = (id.attempt, step)
        return rows

    def descends(self, attempt: int, id: ManifestId) -> bool:
        """Whether an attempt goes on from `id`: is the one that wrote it, or started from it or from a later one."""
        while attempt > id.attempt:
            parent = self.lineage[attempt]
            if parent is None:
                return False
            if parent.attempt == id.attempt:
                return parent.step >= id.step
            attempt = parent.attempt
        return attempt == id.attempt

    def observe(self, name: str, key: str, data: bytes) -> None:
        """Take down a change right before it is applied, and whether it is one that must not be."""
        self.changed = True
        self.verified -= {other for other in self.verified if key in self.needs[other] or key == other.key}
        self.born.setdefault(key, len(self.born))
        id = ManifestId.from_key(key)
        if name == "create" and id is not None and not self.reader.exists(key):
            self.needs[id] = {stored.key for stored in Manifest.from_bytes(data, key).objects()}
        if name == "put" and self.reader.exists(key):
            self.violations.append(f"{key} is written twice")
        if name == "delete" and id is not None:
            history = read_history(self.reader)
            newest = max(history.attempts, default=0)
            # Whoever deletes may have decided before others were made to vanish from outside.
            vanished = {other for other in self.harmed if not self.reader.exists(other.key)}
            chain = visible_chain(history.parents, {*history.manifests, *vanished})
            if id in chain[-self.last :] and newest not in self.bold:
                self.violations.append(f"{id} is deleted and is one of the newest {self.last} of {chain}")

    @property
    def harmed(self) -> set[ManifestId]:
        return {id for id, keys in self.needs.items() if self.harmed_keys & {id.key, *keys}}

    def harm(self, key: str, vanish: bool) -> None:
        """Damage an object or a manifest from outside."""
        self.harmed_keys.add(key)
        if vanish:
            self.reader.delete(key)
        else:
            data = self.reader.get(key)
            self.reader.put(key, data[:-1] + bytes([data[-1] ^ 1]))
        self.changed = True

    def promise(self, id: ManifestId) -> None:
        """A worker is told that a checkpoint is committed: nobody won a higher number before it was written."""
        if id in self.promised:
            return
        self.promised.add(id)
        later = [key for key in self.born if key.startswith("attempts/") and int(key[9:15]) > id.attempt]
        assert id.key in self.born, f"{id} was promised and never written"
        too_late = [key for key in later if self.born[key] < self.born[id.key]]
        assert not too_late, f"{id} was promised although {too_late} came before its manifest"

    def hears(self, save: Any, rank: int, answer: Mapping[str, Any]) -> None:
        """A rank's save has ended: all ranks of it are told the same."""
        states = self.told.setdefault(save, {})
        states[rank] = answer["state"]
        assert {"committed", "failed"} - set(states.values()), f"{save}: the ranks are told {states}"

    def check(self) -> None:
        """Assert that what an outside reader sees now is neither torn nor mixed nor older than what was promised."""
        assert not self.violations, self.violations
        if not self.changed:
            return
        self.changed = False
        history = read_history(self.reader)
        for id in history.chain:
            if id not in self.verified | self.harmed:
                self.verified.add(id)
                self.assert_holds(Checkpoint(self.reader, read_manifest(self.reader, id), num_threads=1))
        self._assert_not_regressed(history)

    def assert_holds(self, checkpoint: Checkpoint) -> None:
        """Assert that a checkpoint is intact and exactly the state of its attempt's lineage after its step."""
        id = checkpoint.manifest.id
        problems = verify_share(self.reader, id, 0, 1, 1)[1]
        assert not problems, f"{id} is torn: {problems}"
        expected = self.bank(id)
        assert [tuple(row) for row in checkpoint.rows("bank").tolist()] == expected, f"{id} is mixed"
        assert checkpoint.rows("last_step").tolist() == [step for _, step in expected], f"{id} is mixed"
        assert checkpoint.rows("whole").flatten().tolist() == [1000 * id.attempt + id.step] * NUM_ROWS
        assert checkpoint.tensors()["w"].tolist() == list(id)
        assert checkpoint.state == {"attempt": id.attempt, "step": id.step}

    def _assert_not_regressed(self, history: History) -> None:
        promised = self.promised - self.harmed
        if self.harmed_keys:
            # Older ones may have gone before those that they made room for were damaged.
            promised = {id for id in promised if id in history.manifests}
        newest = max(history.attempts, default=0)
        lost = [id for id in promised if not self.descends(newest, id)]
        assert not lost, f"{lost} were promised, and attempt {newest} does not go on from them: {self.lineage}"
        if not history.chain:
            assert not promised or newest in self.bold or self.harmed, f"{promised} were promised and nothing is left"
            return
        latest = max((id.step for id in promised), default=0)
        if not self.harmed:
            assert history.chain[-1].step >= latest, f"{history.chain} after {latest} was promised"
            found = read_latest(self.reader)
            assert found is not None
            assert found.manifest.id == history.chain[-1]

    def check_read(self, checkpoint: Checkpoint | None, error: Exception | None, promised: set[ManifestId]) -> None:
        """Judge what a reader that was slow saw. promised: when it began."""
        if error is not None:
            assert isinstance(error, CheckpointError | ObjectMissingError), repr(error)
            return
        expected = promised - self.harmed
        found = checkpoint.manifest.id if checkpoint else None
        if not self.harmed:
            assert not expected or found is not None, f"a reader found nothing after {expected}"
            older = [
                id for id in expected if found and not (self.descends(found.attempt, id) and found.step >= id.step)
            ]
            assert not older, f"a reader found {found} after {older} were promised"
