"""Opens the images of a configuration: hands the data path what it needs of storage, and the machine's cache."""

from __future__ import annotations

import os

from cluster.store import Store
from dataloading.cache import ShardCache
from dataloading.headers import Progress
from dataloading.index import Dataset, DatasetIndex
from dataloading.pixel_rules import PixelRules
from dataloading.sources import open_dataset
from dataloading.storage import Storage
from instdisc.config_sections import DataConfig

CACHE_VARIABLE = "INSTDISC_CACHE"
_DEFAULT_CACHE = "~/.cache/instdisc"


def open_images(
    data: DataConfig,
    split: str,
    *,
    max_rows: int | None = None,
    index: DatasetIndex | None = None,
    on_progress: Progress | None = None,
    as_packed: bool = False,
) -> Dataset:
    """Return the images of a split. Arguments and errors as `dataloading.sources.open_dataset`.

    as_packed: packed images keep the pixel rules of their manifest where the configuration asks for no others than the
    present ones; else DatasetError is raised where they differ.
    """
    rules = data.pixel_rules
    return open_dataset(
        data.kind,
        data.root,
        split,
        config=data.config,
        layout_rule=data.layout_rule,
        max_rows=max_rows,
        index=index,
        on_progress=on_progress,
        download=data.download,
        storage=storage_of(data),
        rules=None if as_packed and index is None and rules == PixelRules() else rules,
    )


def storage_of(data: DataConfig | None = None) -> Storage:
    """Return how remote images are reached and kept: as a configuration asks, or by default."""
    data = data or DataConfig()
    folder = data.cache_dir or os.environ.get(CACHE_VARIABLE) or _DEFAULT_CACHE
    limit_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    return Storage(open=Store, cache=None if limit_bytes == 0 else ShardCache(folder, limit_bytes))
