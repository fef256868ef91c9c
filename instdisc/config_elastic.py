"""The section of a run's configuration that says when the number of its workers changes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from instdisc.config_sections import check


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """When workers on a cluster begin, and when they make place for more; see `cluster.worker_range.WorkerRange`."""

    start_settle_s: float = 10.0
    """At the first start: seconds without a new machine after which fewer than the most workers begin."""
    grow_settle_s: float = 60.0
    """Seconds for which there must have been the same room for more workers before a group makes place for them, so
    that machines that come one after the other restart the workers once."""
    resize_interval_s: float = 600.0
    """Seconds from the start of a group until it may make place for a larger one, at least."""
    silence_s: float = 10.0
    """Seconds without an answer after which a machine is taken for dead; Ray itself takes up to a minute."""

    def __post_init__(self) -> None:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        check("elastic", *((name, value, value >= 0, "0 or more seconds") for name, value in values))
