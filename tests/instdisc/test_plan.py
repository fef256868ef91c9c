"""The division of a global batch into groups, ranks and slots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instdisc.train.plan import BatchPlan

plans = st.builds(
    BatchPlan, global_batch=st.integers(1, 200), norm_group=st.integers(1, 60), world_size=st.integers(1, 12)
)


@given(plans)
def test_every_position_belongs_to_exactly_one_rank_and_one_slot(plan):
    in_rank_order = [place for rank in range(plan.world_size) for place in range(*plan.offsets(rank))]
    in_slots = sorted(place for slot in plan.slots for group in slot for place in range(*group))
    assert in_rank_order == in_slots == list(range(plan.global_batch))
    assert sum(plan.counts_W) == plan.global_batch


@given(plans)
def test_groups_are_the_same_whatever_the_number_of_workers(plan):
    groups = sorted(group for slot in plan.slots for group in slot if group != (0, 0))
    assert groups == BatchPlan(plan.global_batch, plan.norm_group, 1).groups(0)
    assert len(groups) == plan.num_groups


@given(plans)
def test_ranks_differ_by_at_most_one_group_and_the_last_slot_is_full(plan):
    counts = [len(plan.groups(rank)) for rank in range(plan.world_size)]
    assert max(counts) - min(counts) <= 1
    for rank, count in enumerate(counts):
        assert (plan.slots[-1][rank] != (0, 0)) == (count > 0)
