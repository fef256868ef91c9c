"""A second opinion on the conditional writes of S3: moto's server, which knows them and is not SeaweedFS."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import botocore.session
import pytest
from fault_proxy import FaultProxy
from seaweed import free_ports

from cluster import patience
from cluster.store import Store, StoreError


@pytest.fixture(scope="module")
def moto_endpoint(tmp_path_factory):
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed (uv sync)")
    (port,) = free_ports(1)
    with open(tmp_path_factory.mktemp("moto") / "log", "wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline_s
            assert server.poll() is None
            time.sleep(0.1)
    yield endpoint
    server.kill()
    server.wait()


@pytest.fixture
def moto(moto_endpoint, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    with contextlib.closing(botocore.session.get_session().create_client("s3")) as client:
        client.create_bucket(Bucket="second")
    return moto_endpoint


def test_of_racing_claimers_whose_answers_are_lost_one_wins(moto, monkeypatch):
    with FaultProxy(moto, seed=5, shares={"lost": 0.4, "reset": 0.1}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = Store(f"s3://second/{random.getrandbits(64):x}")
        for number in range(8):
            start = threading.Barrier(2)

            def claim(writer, number=number, start=start):
                start.wait(10)
                return store.claim(f"keys/{number}", b"writer %d" % writer)

            with ThreadPoolExecutor(2) as pool:
                won = list(pool.map(claim, range(2)))
            assert won.count(True) == 1
            assert store.get(f"keys/{number}") == b"writer %d" % won.index(True)
    assert proxy.counts["lost"] >= 5


def test_its_promise_of_one_winner_is_found_kept(moto):
    Store("s3://second/run").require_exclusive_create()


def test_a_bucket_that_is_not_there_is_named(moto):
    store = Store("s3://nowhere/run")
    actions = (
        lambda: store.put("k", b"v"), lambda: store.claim("k", b"v"), lambda: store.get("k"), lambda: store.list(),
        lambda: store.delete("k"), lambda: store.remove_leftovers("k"),
    )  # fmt: skip
    for action in actions:
        with pytest.raises(StoreError, match=r"s3://nowhere/run: there is no such bucket; create it") as caught:
            action()
        assert not isinstance(caught.value, FileNotFoundError)
