"""Removing objects of S3 in bulk, and the uploads in parts that killed writers left."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from os.path import commonpath
from typing import Any

import botocore.exceptions

from cluster.patience import Patience, is_transient
from cluster.s3_errors import code_of
from cluster.threads import failures_in_threads

_LOG = logging.getLogger("instdisc.storage")
_BULK, _AT_ONCE = 1000, 16


class S3Removals:
    """Removals by "bucket/key" through once(method, **arguments), which makes one request. Safe in threads."""

    def __init__(
        self, once: Callable[..., dict[str, Any]], patience: Patience, errors: tuple[type[Exception], ...]
    ) -> None:
        self._once, self._patience, self._errors = once, patience, errors
        self._has_bulk = True

    def delete_many(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        """Remove objects, a thousand with a request; return those that stay, and why.

        A server that does not take such requests gets one for each object.
        """
        failed: list[tuple[str, Exception]] = []
        for start in range(0, len(paths), _BULK):
            bulk = paths[start : start + _BULK]
            if self._has_bulk and len(bulk) > 1:
                try:
                    failed += self._delete_bulk(bulk)
                    continue
                except self._errors:
                    one_by_one = self._delete_each(bulk)
                    self._has_bulk = bool(one_by_one)
            else:
                one_by_one = self._delete_each(bulk)
            failed += one_by_one
        return failed

    def _delete_bulk(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        bucket = split_path(paths[0])[0]
        left = {split_path(path)[1]: path for path in paths}
        refused: dict[str, Exception] = {}
        passing: dict[str, Exception] = {}

        def delete() -> None:
            passing.clear()
            wanted = {"Objects": [{"Key": key} for key in left], "Quiet": True}
            answer = self._once("delete_objects", Bucket=bucket, Delete=wanted)
            for about in answer.get("Errors", []):
                error = botocore.exceptions.ClientError({"Error": about}, "DeleteObjects")
                if about.get("Code") != "NoSuchKey" and about.get("Key") in left:
                    (passing if is_transient(error) else refused)[about["Key"]] = error
            for key in left.keys() - passing.keys():
                del left[key]
            if passing:
                raise next(iter(passing.values()))

        where = dict(left)
        try:
            self._patience.call(delete)
        except self._errors:
            if not passing:
                raise
        return [(where[key], error) for key, error in {**refused, **passing}.items()]

    def remove_leftovers(self, folders: Sequence[str]) -> None:
        """Abort the uploads in parts below folders that killed writers left: they hold storage and are not listed."""
        bucket = split_path(folders[0])[0]
        below = tuple(f"{split_path(folder)[1]}/" for folder in folders)
        common = commonpath(below)
        prefix = f"{common}/" if common else ""
        seen: set[str] = set()
        # From the beginning again after each page, as SeaweedFS goes on in the wrong place.
        while uploads := [upload for upload in self._uploads(bucket, prefix) if upload["UploadId"] not in seen]:
            for upload in uploads:
                seen.add(upload["UploadId"])
                if not upload["Key"].startswith(below):
                    continue
                with suppress(FileNotFoundError):
                    self._call("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _uploads(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        """Return the first thousand unfinished uploads."""
        try:
            answer = self._call("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        except OSError as error:
            # A right or an operation that writing and reading do not need: what stays costs money and harms nothing.
            if isinstance(error, PermissionError) or error.errno in (errno.ENOSYS, errno.EPERM):
                _LOG.warning(
                    "unfinished uploads below s3://%s/%s may stay, as they cannot be listed (%s: %s); give the "
                    "bucket a rule AbortIncompleteMultipartUpload, or these credentials s3:ListBucketMultipartUploads",
                    *(bucket, prefix, code_of(error), error),
                )
                return []
            raise
        return [upload for upload in answer.get("Uploads", []) if upload["Key"].startswith(prefix)]

    def _delete_each(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        return failures_in_threads(self._delete, paths, _AT_ONCE, self._errors)

    def _delete(self, path: str) -> None:
        bucket, key = split_path(path)
        self._call("delete_object", Bucket=bucket, Key=key)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._patience.call(lambda: self._once(method, **arguments))


def split_path(path: str) -> tuple[str, str]:
    """Return the bucket and the key of "bucket/key"."""
    bucket, _, key = path.partition("/")
    return bucket, key
