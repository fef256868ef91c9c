"""A store whose every operation passes through one method, for tests that count, fail or order operations."""

from __future__ import annotations

from typing import Any

from cluster.store import Store


class InterceptedStore(Store):
    """`intercept` gets an operation's name, key and other arguments, and does it, with `do`, or something else."""

    def intercept(self, name: str, key: str, *args: Any) -> Any:
        return self.do(name, key, *args)

    def do(self, name: str, key: str, *args: Any) -> Any:
        """Carry the operation out."""
        return getattr(Store, name)(self, key, *args)

    def put(self, key, *parts):
        self.intercept("put", key, *parts)

    def create(self, key, data):
        return self.intercept("create", key, data)

    def get(self, key, start=None, stop=None):
        return self.intercept("get", key, start, stop)

    def read_into(self, key, target, start, seen):
        return self.intercept("read_into", key, target, start, seen)

    def list(self, prefix=""):
        return self.intercept("list", prefix)

    def delete(self, key):
        self.intercept("delete", key)

    def delete_many(self, keys):
        """One after the other: in bulk, too, others see any part of it done."""
        for key in keys:
            self.delete(key)

    def size(self, key):
        return self.intercept("size", key)

    def remove_leftovers(self, folder, *more):
        self.intercept("remove_leftovers", folder, *more)
