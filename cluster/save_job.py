"""A save after its snapshot: what one rank does in the background until the coordinator says what became of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint_writer import write_part
from cluster.commits import SaveId
from cluster.coordination import Coordination
from cluster.coordinator import COLLECTING, FAILED
from cluster.manifest import ManifestId
from cluster.patience import is_transient
from cluster.phase import Phase, phase
from cluster.snapshot import Snapshot
from cluster.store import Store
from cluster.uploads import Pace

_FIRST_POLL_S, _LONGEST_POLL_S = 0.01, 1.0


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """One rank's part of a save. No torch collectives: a dead rank cannot hang it.

    snapshot: or what went wrong when it was taken. since: the checkpoint that increments add to, None for whole tables.
    about: what rank 0 adds to its part, for the manifest. closing: set when nobody waits for the outcome any more.
    """

    id: SaveId
    snapshot: Snapshot | Exception
    since: ManifestId | None
    rank: int
    world_size: int
    store: Store
    coordinator: Coordination
    block_rows: int | None
    num_threads: int
    pace: Pace
    about: Mapping[str, Any]
    closing: threading.Event

    def run(self) -> dict[str, Any]:
        """Write this rank's part, tell the coordinator, and return what became of the save: `Coordinator.state_of`."""
        try:
            with phase(Phase.UPLOAD):
                message: dict[str, Any] = {"part": self._write()}
        except Exception as error:
            text = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            message = {"error": text, "permanent": not is_transient(error)}
        with phase(Phase.MANIFEST):
            return self._agree(message)

    def _write(self) -> dict[str, Any]:
        if isinstance(self.snapshot, Exception):
            raise self.snapshot
        try:
            part = write_part(
                self.store,
                self.id.prefix,
                self.snapshot,
                since=self.since,
                block_rows=self.block_rows,
                num_threads=self.num_threads,
                pace=self.pace,
            )
        finally:
            self.snapshot.release()
        return part | dict(self.about) if self.rank == 0 else part

    def _agree(self, message: dict[str, Any]) -> dict[str, Any]:
        pause_s = _FIRST_POLL_S
        try:
            while True:
                # Said again each time: a coordinator that was started again knows nothing of it.
                outcome = self.coordinator.call(
                    "acknowledge",
                    attempt=self.id.attempt,
                    step=self.id.step,
                    number=self.id.number,
                    rank=self.rank,
                    world_size=self.world_size,
                    message=message,
                )
                if outcome["state"] != COLLECTING:
                    return outcome
                if self.closing.wait(pause_s):
                    return {"state": FAILED, "error": "the process ended before the save did", "permanent": False}
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except OSError as error:
            return {"state": FAILED, "error": str(error), "permanent": True}
