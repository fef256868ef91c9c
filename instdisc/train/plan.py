"""How a global batch is divided: into normalisation groups, over ranks, and into the slots in which ranks run them.

Ranks own whole groups and may own one group more or less. They run their groups in slots; those with fewer groups have
empty slots first, so that in the last slot, the one whose backward pass carries the gradient exchange, every rank that
owns a group has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dataloading.stream import group_offsets


@dataclass(frozen=True)
class BatchPlan:
    """The division of G positions for one world size: a pure function of (G, norm_group, W)."""

    global_batch: int
    norm_group: int
    world_size: int

    @property
    def num_groups(self) -> int:
        """Groups in the global batch."""
        return -(-self.global_batch // self.norm_group)

    def groups(self, rank: int) -> list[tuple[int, int]]:
        """Return a rank's groups as (start, stop) offsets into the G positions."""
        return group_offsets(self.global_batch, self.norm_group, rank, self.world_size)

    def offsets(self, rank: int) -> tuple[int, int]:
        """Return a rank's contiguous part of the G positions."""
        groups = self.groups(rank)
        return (groups[0][0], groups[-1][1]) if groups else (0, 0)

    @cached_property
    def counts_W(self) -> list[int]:
        """Samples of each rank."""
        return [stop - start for start, stop in map(self.offsets, range(self.world_size))]

    @cached_property
    def slots(self) -> list[list[tuple[int, int]]]:
        """For each slot and rank the offsets of the group that it runs, (0, 0) where the slot is empty."""
        by_rank = [self.groups(rank) for rank in range(self.world_size)]
        most = max(map(len, by_rank))
        padded = [[(0, 0)] * (most - len(groups)) + groups for groups in by_rank]
        return [[groups[slot] for groups in padded] for slot in range(most)]
