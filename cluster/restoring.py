"""Finding the newest intact checkpoint of a run, by all ranks together, and taking it over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.agreement import WorkerLike, gather
from cluster.checkpoint_reader import Checkpoint, verify_share
from cluster.manifest import Manifest, ManifestError, ManifestId, describe, read_listed_manifest
from cluster.shared_reads import SharedReads
from cluster.store import ObjectMissingError, Store
from cluster.stored_object import CheckpointError, DamagedObjectError

Load = Callable[[Checkpoint], None]
_MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
"""What taking over tables of other shapes, or a state without what is expected, raises."""


@dataclass
class Restoring:
    """Tries checkpoints from the newest to the oldest. All ranks call it alike.

    load: takes over a checkpoint; None only verifies, and the ranks share that. accepted: the digests that a checkpoint
    of what the run is now may have, by name.
    damaged, warnings: what was found on the way, the first as ids, the second in sentences.
    """

    store: Store
    worker: WorkerLike
    load: Load | None
    accepted: Mapping[str, Collection[str]]
    num_threads: int
    damaged: list[ManifestId] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shared = SharedReads(self.store) if self.worker.world_size > 1 else None

    def newest_intact(self, chain: Sequence[ManifestId]) -> Checkpoint | None:
        """Return the newest intact one of valid checkpoints, oldest first; None if there are none at all. Collective.

        CheckpointError if none is intact, or one cannot be used for another reason than damage.
        """
        for id in reversed(chain):
            manifest, problems = self._try(id)
            if manifest:
                # It was found damaged before, which has passed.
                self.damaged[:] = [other for other in self.damaged if other != id]
                return Checkpoint(self.store, manifest, num_threads=self.num_threads)
            if id not in self.damaged:
                self.damaged.append(id)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.warnings.append(
                f"the checkpoint of {describe([id])} is damaged and was skipped: {problems[0]}{more}; it is kept "
                "for inspection"
            )
        if chain:
            raise CheckpointError(
                f"no checkpoint of {self.store.uri} is intact, {len(chain)} tried: {'; '.join(self.warnings)}; "
                "put the damaged objects back from a copy, or start a new run under another URI"
            )
        return None

    def _try(self, id: ManifestId) -> tuple[Manifest | None, list[str]]:
        """Return the manifest if everything of it that the ranks read is intact, else None and what is wrong."""
        found: list[Manifest] = []

        def read() -> list[str]:
            manifest, problems = self._verify(id) if self.load is None else self._load(id, self.load)
            if problems and not self.store.exists(id.key):
                raise CheckpointError(
                    f"{id.key} in {self.store.uri} was deleted while it was read: another process still writes to "
                    "this run; stop it and start again"
                )
            found.extend([manifest] if manifest else [])
            return problems

        try:
            replies = gather(self.worker, f"read the checkpoint of {describe([id])}", read)
        finally:
            if self._shared:
                self._shared.clear()  # all ranks have read
        problems = list(dict.fromkeys(problem for reply in replies for problem in reply))
        return (None if problems else found[0]), problems

    def _verify(self, id: ManifestId) -> tuple[Manifest | None, list[str]]:
        manifest, problems = verify_share(self.store, id, self.worker.rank, self.worker.world_size, self.num_threads)
        if manifest:
            self._check_digests(manifest)
        return manifest, problems

    def _load(self, id: ManifestId, load: Load) -> tuple[Manifest | None, list[str]]:
        try:
            manifest = read_listed_manifest(self.store, id)
        except (ManifestError, ObjectMissingError) as error:
            return None, [str(error)]
        self._check_digests(manifest)
        try:
            load(Checkpoint(self.store, manifest, num_threads=self.num_threads, shared=self._shared))
        except DamagedObjectError as error:
            return manifest, [str(error)]
        except _MISFITS as error:
            # Of the same configuration, so that its content is not what a save writes.
            return manifest, [f"{id.key} in {self.store.uri} does not fit this run: {error!r:.400}"]
        return manifest, []

    def _check_digests(self, manifest: Manifest) -> None:
        found = manifest.digests
        differing = [name for name, digests in self.accepted.items() if name in found and found[name] not in digests]
        if differing:
            raise CheckpointError(
                f"{manifest.id.key} in {self.store.uri} was saved with another {' and '.join(differing)}; put the "
                "checkpoints of this run back, or start a new run under another URI"
            )
