"""Indexes of far tars that the cache of this machine keeps: commands and starts after the first read no tar whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import asdict

from dataloading.cache import ShardCache
from dataloading.index import DatasetError, DatasetIndex
from dataloading.layout import Part
from dataloading.pixel_rules import PixelRules
from dataloading.shards import fingerprint_of

_DIGEST_BYTES = hashlib.sha256().digest_size
_NEXT_USE_S = 24 * 3600.0


class KeptIndex:
    """The index that answers one question, kept with its SHA-256 before it."""

    def __init__(self, cache: ShardCache, uri: str, part: Part, max_rows: int | None, rules: PixelRules | None) -> None:
        asked = repr((part, max_rows, sorted(asdict(rules or PixelRules()).items())))
        self._cache, self._key = cache, f"indexes/{fingerprint_of(uri.encode(), asked.encode())}"
        self._where = str(cache.path(self._key))

    def load(self) -> DatasetIndex | None:
        """Return the index as it was kept, None where there is none or where it lost bytes."""
        descriptor = self._cache.open(self._key)
        if descriptor is None:
            return None
        try:
            with os.fdopen(descriptor, "rb") as file:
                digest, content = file.read(_DIGEST_BYTES), file.read()
            if hashlib.sha256(content).digest() == digest:
                index = DatasetIndex.from_bytes(content, self._where)
                self._cache.touch(self._key, time.time() + _NEXT_USE_S)
                return index
        except (OSError, DatasetError):  # of this machine's disk, or of another version: the tars still tell all
            pass
        self._cache.remove(self._key)
        return None

    def save(self, index: DatasetIndex) -> None:
        """Keep an index, if the storage tells the versions of all its tars: else a changed one would not be noticed."""
        if not index.files.keys() <= index.versions.keys():
            return
        content = index.to_bytes()
        data = hashlib.sha256(content).digest() + content

        def write(descriptor: int) -> None:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)

        self._cache.remove(self._key)
        with contextlib.suppress(OSError):  # it is kept for speed alone
            self._cache.fetch(self._key, len(data), write, time.time() + _NEXT_USE_S)
