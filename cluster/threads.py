"""A function applied to many items by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> list[Result]:
    """Return [function(item), ...] computed in threads; the first error is raised when no thread runs any more."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="objects") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def failures_in_threads(
    function: Callable[[Item], object], items: Iterable[Item], num_threads: int, kinds: tuple[type[Exception], ...]
) -> list[tuple[Item, Exception]]:
    """Apply a function to all items, whatever becomes of others; return those for which it raised one of `kinds`."""

    def failure_of(item: Item) -> Exception | None:
        try:
            function(item)
        except kinds as error:
            return error
        return None

    items = list(items)
    failures = zip(items, in_threads(failure_of, items, num_threads), strict=True)
    return [(item, error) for item, error in failures if error is not None]
