"""The operations of a `Store` on S3 and on servers that speak its language.

One layer decides what is tried again and for how long (`Patience`), for every request by itself: the retries of s3fs
and of botocore are switched off. botocore sends a CRC32 with what it writes and compares it on what it reads, so that
bytes that change on the wire are refused and sent again.

A write that was given up may still be carried out by the server later. So a key is written once, or always with the
same bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast
from uuid import uuid4

import aiohttp
import botocore.exceptions
from fsspec.asyn import sync

from cluster.joined_views import JoinedViews
from cluster.patience import Patience
from cluster.s3_credentials import (
    CredentialsAwayError,
    NoCredentialsNow,
    S3Files,
    is_of_credentials,
    may_come,
    open_files,
    require_credentials,
)
from cluster.s3_errors import code_of
from cluster.s3_removals import S3Removals, split_path
from cluster.threads import in_threads

Result = TypeVar("Result")

TIMEOUT_VARIABLE = "INSTDISC_STORE_TIMEOUT_S"
"""Environment variable: the seconds without a byte after which a request is given up and sent again."""
TIMEOUT_S = 30.0
PART_BYTES = 64 * 2**20
"""Objects above this size are written and read in parts: what fails and is repeated is one part."""
_MOST_PARTS, _PARTS_AT_ONCE = 10_000, 4
_PIECE_BYTES = 2**20


class S3Objects:
    """Objects of buckets by "bucket/key". Raises OSErrors and botocore's errors (`errors`). Safe in threads."""

    errors: tuple[type[Exception], ...] = (
        OSError,
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        aiohttp.ClientError,
    )

    def __init__(self, patience: Patience) -> None:
        self._timeout_s = float(os.environ.get(TIMEOUT_VARIABLE) or TIMEOUT_S)
        self._files = open_files(self._timeout_s)
        self._patience = patience
        self._has_worked = patience.has_answered
        self._renewing = threading.Lock()
        self._removals = S3Removals(lambda method, **arguments: self._once(method, **arguments), patience, self.errors)

    @property
    def endpoint(self) -> str:
        """The address of the server, as far as it is known."""
        # Not `s3`: it would make a client, if need be without credentials.
        client: Any = self._files._s3
        return os.environ.get("AWS_ENDPOINT_URL", "the S3 server") if client is None else client.meta.endpoint_url

    def put(self, path: str, parts: Sequence[memoryview]) -> None:
        """Write the concatenated parts to `path`, replacing what is there. Copies nothing."""
        views = JoinedViews(parts)
        if len(views) > PART_BYTES:
            self._put_in_parts(path, views)
        else:
            self._write("put_object", path, views)

    def create(self, path: str, data: memoryview) -> None:
        """Write `data` to `path`. FileExistsError if there is something, be it the work of an earlier try of ours."""
        try:
            self._write("put_object", path, JoinedViews([data]), IfNoneMatch="*")
        except OSError as error:
            # s3fs knows it by a detail that not every server sends.
            if code_of(error) in ("PreconditionFailed", "412") and not isinstance(error, FileExistsError):
                raise FileExistsError(errno.EEXIST, "there is an object", path) from error
            raise

    def get(self, path: str, start: int | None, stop: int | None) -> bytes:
        """Return bytes [start, stop) of an object, fewer where it ends before."""
        start = start or 0
        if stop is not None and stop <= start:
            self.size(path)
            return b""
        span = {} if (start, stop) == (0, None) else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        try:
            found = self._patience.call(lambda: self._read(path, **span))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return b""
            raise
        if isinstance(found, bytes):
            return found
        num_bytes, tag = found
        spans = [(start + at, start + min(at + PART_BYTES, num_bytes)) for at in range(0, num_bytes, PART_BYTES)]

        def read(span: tuple[int, int]) -> bytes | tuple[int, str]:
            part = {"Range": f"bytes={span[0]}-{span[1] - 1}", "IfMatch": tag}
            return self._patience.call(lambda: self._read(path, **part))

        return b"".join(part for part in in_threads(read, spans, _PARTS_AT_ONCE) if isinstance(part, bytes))

    def read_into(
        self, path: str, target: memoryview, start: int, seen: Callable[[memoryview], None]
    ) -> tuple[int, bool]:
        """Fill `target` from byte `start` of an object on; see `Store.read_into`."""
        if not target:
            return 0, self.size(path) > start
        try:
            size, num_bytes = self._patience.call(lambda: self._fill(path, target, start))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return 0, False
            raise
        seen(target[:size])
        return size, num_bytes > start + size

    def list(self, folder: str) -> list[tuple[str, int]]:
        """Return (path, bytes) of all objects below a folder."""
        return [(path, int(about["Size"])) for path, about in self._listed(folder)]

    def versions(self, folder: str) -> dict[str, str]:
        """Return the ETags of all objects below a folder, by path."""
        return {path: about["ETag"] for path, about in self._listed(folder) if about.get("ETag")}

    def _listed(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        bucket, key = split_path(folder)
        more = {"Prefix": f"{key}/" if key else ""}
        while True:
            answer = self._call("list_objects_v2", Bucket=bucket, **more)
            for about in answer.get("Contents", []):
                if not about["Key"].endswith("/"):  # tools leave empty objects that stand for folders
                    yield f"{bucket}/{about['Key']}", about
            if not answer.get("IsTruncated"):
                return
            more["ContinuationToken"] = answer["NextContinuationToken"]

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens if there is none."""
        bucket, key = split_path(path)
        self._call("delete_object", Bucket=bucket, Key=key)

    def delete_many(self, paths: Sequence[str]) -> list[tuple[str, Exception]]:
        """Remove objects in bulk; return those that stay, and why."""
        return self._removals.delete_many(paths)

    def get_tagged(self, path: str, stop: int) -> tuple[bytes, str | None]:
        """Return an object's bytes [0, stop) and its ETag."""
        bucket, key = split_path(path)

        async def read(files: Any) -> tuple[bytes, str | None]:
            answer = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{stop - 1}")
            try:
                return await answer["Body"].read(), answer.get("ETag")
            finally:
                answer["Body"].close()

        try:
            return self._patience.call(lambda: self._run(read))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return b"", None
            raise

    def replace(self, path: str, data: memoryview, tag: str) -> bool | None:
        """Write `data` to `path` if its ETag is still this one: False if it is not, None if the server cannot."""
        try:
            self._write("put_object", path, JoinedViews([data]), IfMatch=tag)
        except OSError as error:
            code = code_of(error)
            if code in ("PreconditionFailed", "412", "NoSuchKey", "404"):
                return False
            if code in ("NotImplemented", "501", "MethodNotAllowed", "InvalidArgument", "InvalidRequest"):
                return None
            raise
        return True

    def size(self, path: str) -> int:
        """Return an object's size in bytes. FileNotFoundError if there is none."""
        bucket, key = split_path(path)
        if key.endswith("/"):
            raise FileNotFoundError(errno.ENOENT, "a folder, not an object", path)
        return int(self._call("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def remove_leftovers(self, folders: Sequence[str]) -> None:
        """Abort the uploads in parts below folders that killed writers left."""
        self._removals.remove_leftovers(folders)

    def _put_in_parts(self, path: str, views: JoinedViews) -> None:
        bucket, key = split_path(path)
        token = uuid4().hex
        where = {"Bucket": bucket, "Key": key}
        # Known only to us: it tells our object from another's when the answer to the last request is lost.
        where["UploadId"] = self._call("create_multipart_upload", **where, Metadata={"upload": token})["UploadId"]
        part_bytes = max(PART_BYTES, -(-len(views) // _MOST_PARTS))
        starts = range(0, len(views), part_bytes)

        def write(number: int) -> dict[str, Any]:
            start = starts[number - 1]
            part = views.part(start, start + part_bytes)
            answer = self._write("upload_part", path, part, UploadId=where["UploadId"], PartNumber=number)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            parts = in_threads(write, range(1, len(starts) + 1), _PARTS_AT_ONCE)
            try:
                self._call("complete_multipart_upload", **where, MultipartUpload={"Parts": parts})
            except OSError as error:
                if code_of(error) != "NoSuchUpload" or self._token(bucket, key) != token:
                    raise
        except BaseException:
            with suppress(Exception):
                self._files.call_s3("abort_multipart_upload", **where)
            raise

    def _token(self, bucket: str, key: str) -> str | None:
        return self._call("head_object", Bucket=bucket, Key=key).get("Metadata", {}).get("upload")

    def _write(self, method: str, path: str, views: JoinedViews, **arguments: Any) -> dict[str, Any]:
        bucket, key = split_path(path)
        where = {"Bucket": bucket, "Key": key, **arguments}
        # Every try reads from a file of its own: one that was given up may still be reading.
        return self._patience.call(lambda: self._once(method, Body=views.part(0, len(views)), **where))

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._patience.call(lambda: self._once(method, **arguments))

    def _once(self, method: str, **arguments: Any) -> dict[str, Any]:
        body = arguments.get("Body")
        if body is None:
            return self._run(lambda files: files._call_s3(method, **arguments))
        return self._run(lambda files: _while_moving(files._call_s3(method, **arguments), body, self._timeout_s))

    def _run(self, function: Callable[[Any], Awaitable[Result]]) -> Result:
        """Return what the coroutine of function(files) returns, run by the loop of s3fs."""
        files, run = self._files, cast(Any, sync)

        async def request() -> Result:
            await require_credentials(files)
            return await function(files)

        try:
            result = run(files.loop, request)
        except FileNotFoundError as error:
            # What s3fs calls a missing file and is none.
            if code_of(error) in ("NoSuchBucket", "NoSuchUpload"):
                raise OSError(errno.ENXIO, str(error)) from error.__cause__
            raise
        except (ValueError, botocore.exceptions.HTTPClientError) as error:
            # Nothing that passes: the address itself is wrong.
            if "Invalid endpoint" in str(error) or "encoded in URL" in str(error):
                raise OSError(errno.EINVAL, str(error)) from None
            raise
        except Exception as error:
            if not is_of_credentials(error):
                raise
            cause = error.cause if isinstance(error, NoCredentialsNow) else error
            if self._has_worked or may_come():
                self._renew(files)
                raise CredentialsAwayError("the credentials cannot be had now") from cause
            raise cause from cause.__cause__
        self._has_worked = True
        return result

    def _renew(self, failed: S3Files) -> None:
        """Connect anew: a client keeps the credentials that it was made with, and none if there were none."""
        with self._renewing:
            if self._files is failed:
                self._files = open_files(self._timeout_s, is_patient=True)

    def _read(self, path: str, **arguments: Any) -> bytes | tuple[int, str]:
        """Return an answer's bytes; (how many, ETag) if they are to be read in parts."""
        bucket, key = split_path(path)

        async def read(files: Any) -> bytes | tuple[int, str]:
            answer = await files._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
            try:
                if answer["ContentLength"] > PART_BYTES:
                    return answer["ContentLength"], answer["ETag"]
                return await answer["Body"].read()
            finally:
                answer["Body"].close()

        return self._run(read)

    def _fill(self, path: str, target: memoryview, start: int) -> tuple[int, int]:
        """Fill `target` from byte `start` on; return how many bytes there were, and how many the object has."""
        bucket, key = split_path(path)
        span = f"bytes={start}-{start + len(target) - 1}"

        async def read(files: Any) -> tuple[int, int]:
            answer = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=span)
            body, done = answer["Body"], 0
            try:
                while piece := await body.read(_PIECE_BYTES):
                    if done + len(piece) > len(target):
                        raise OSError(errno.EIO, f"the server sent more than {span}", path)
                    target[done : done + len(piece)] = piece
                    done += len(piece)
            finally:
                body.close()
            # "bytes 0-99/1234"; without it the answer is the whole object.
            total = answer.get("ContentRange", "").rpartition("/")[2]
            return done, int(total) if total.isdigit() else start + done

        return self._run(read)


async def _while_moving(request: Awaitable[Result], body: JoinedViews, timeout_s: float) -> Result:
    """Return await request; ConnectionAbortedError if for timeout_s it neither takes bytes of its body nor ends.

    The time-outs of the client library begin when a body has been sent.
    """
    task = asyncio.ensure_future(request)
    try:
        while True:
            before = body.tell()
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
            if done:
                return task.result()
            if body.tell() == before:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"the server took nothing for {timeout_s:g} s")
    finally:
        task.cancel()
