"""Which checkpoints are kept, and how the others are removed without ever endangering those.

A manifest is deleted before its objects, and both only after a newer manifest was committed: a crash between any two
operations leaves objects without a manifest, which the next removal finds, and never a manifest without objects.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from cluster.attempts import attempt_numbers
from cluster.manifest import Manifest, ManifestError, ManifestId, NewerFormatError
from cluster.store import Store

_OWNER = re.compile(r"objects/(\d{6,})/.*")


def keep(manifests: Sequence[ManifestId], keep_last: int) -> tuple[list[ManifestId], list[ManifestId]]:
    """Divide valid manifests, oldest first, into (kept, deletable): the last `keep_last`, at least 1, are kept."""
    if keep_last < 1:
        raise ValueError(f"keep_last: found {keep_last}, expected at least 1")
    return list(manifests[-keep_last:]), list(manifests[:-keep_last])


def remove_old(
    store: Store,
    *,
    attempt: int,
    chain: Sequence[ManifestId],
    manifests: Collection[ManifestId],
    damaged: Collection[ManifestId],
    keep_last: int,
) -> None:
    """Remove what no kept checkpoint needs: older ones, and the remains of attempts off the chain.

    attempt: the caller's; what later attempts wrote is not touched. chain: the valid ones of `manifests`.
    damaged: these stay for inspection. No rank of this attempt may be writing.
    """
    kept, deletable = keep(chain, keep_last)
    valid = set(chain)
    orphans = [id for id in manifests if id.attempt <= attempt and id not in valid and id not in damaged]
    for id in [*deletable, *orphans]:
        store.delete(id.key)
    needed_keys: set[str] = set()
    needed_prefixes = [id.objects_prefix for id in damaged]
    for id in kept:
        try:
            manifest = Manifest.from_bytes(store.get(id.key), id.key)
        except (ManifestError, NewerFormatError):
            needed_prefixes.append(id.objects_prefix)
        else:
            needed_keys.update(stored.key for stored in manifest.objects())
    for key in store.list("objects/"):
        owner = _OWNER.fullmatch(key)
        needed = key in needed_keys or key.startswith(tuple(needed_prefixes))
        if owner and int(owner[1]) <= attempt and not needed:
            store.delete(key)
    for number in attempt_numbers(store):
        if number <= attempt:
            store.remove_leftovers(f"objects/{number:06d}")
