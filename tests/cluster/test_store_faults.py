"""A store's promises behind a network that fails in every way, at a share of the requests, and a server that goes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fault_proxy
import numpy as np
import pytest
from fault_proxy import FaultProxy, fault_of

from cluster import patience, s3_objects
from cluster.store import ObjectMissingError, Store, StoreError

TENTH = dict.fromkeys(fault_proxy.KINDS, 0.1)


@pytest.fixture
def proxy(s3_environment, monkeypatch):
    """A proxy that breaks nothing yet, to which stores lead; what they wait for is short."""
    monkeypatch.setenv(s3_objects.TIMEOUT_VARIABLE, "0.7")
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(patience, "PATIENCE_S", 60.0)
    with FaultProxy(s3_environment.endpoint, seed=3, stall_s=1.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(s3_uri, proxy):
    store = Store(s3_uri)
    store.put("first", b"")  # the place has answered: it is waited for from now on
    return store


def in_threads(function, items, num_threads=8):
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, items))


def read_back(store, key, start, size):
    target, seen = bytearray(size), bytearray()
    filled, has_more = store.read_into(key, memoryview(target), start, seen.extend)
    assert (bytes(seen), has_more) == (target[:filled], False)
    return target[:filled]


def test_a_tenth_of_every_fault_changes_nothing_but_the_time(s3_uri, proxy, monkeypatch):
    # Long enough for a part of 5 MiB on a busy machine.
    monkeypatch.setenv(s3_objects.TIMEOUT_VARIABLE, "1.5")
    proxy.stall_s, proxy.bytes_per_s = 2.0, 4e6
    store = Store(s3_uri)
    store.put("first", b"")
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * 2**20)
    data = {f"d/{number:02d}": np.random.default_rng(number).bytes(50 * number) for number in range(10)}
    data["d/large"] = np.random.default_rng(99).bytes(11 * 2**20)
    proxy.shares = TENTH

    in_threads(lambda item: store.put(item[0], b"old"), data.items())
    in_threads(lambda item: store.put(item[0], item[1][:7], item[1][7:]), data.items())
    assert store.list_sizes("d/") == [(key, len(value)) for key, value in sorted(data.items())]
    same = in_threads(lambda item: store.get(item[0]) == item[1], data.items())
    assert all(same), same
    assert in_threads(lambda key: store.get(key, 5, 40), data) == [value[5:40] for value in data.values()]
    assert in_threads(lambda key: read_back(store, key, 3, 11 * 2**20), data) == [value[3:] for value in data.values()]
    assert in_threads(store.size, data) == [len(value) for value in data.values()]

    assert all(in_threads(lambda number: store.claim(f"c/{number}", b"mine"), range(6)))
    assert not any(in_threads(lambda number: store.claim(f"c/{number}", b"theirs"), range(6)))
    assert not any(in_threads(lambda number: store.create(f"c/{number}", b"theirs"), range(6)))
    assert in_threads(lambda number: store.get(f"c/{number}"), range(6)) == [b"mine"] * 6
    with pytest.raises(ObjectMissingError):
        store.get("nothing")

    in_threads(store.delete, data)
    store.remove_leftovers("d")
    assert store.list("d/") == []
    proxy.shares = {}
    assert store.list() == [*sorted(f"c/{number}" for number in range(6)), "first"]
    found = {kind: proxy.counts[kind] for kind in fault_proxy.KINDS}
    assert min(found.values()) >= 2, found


@pytest.mark.parametrize("kind", ["503", "429", "stall", "reset", "truncate", "lost", "corrupt"])
def test_each_fault_once_is_outlasted_by_each_operation(store, proxy, kind, monkeypatch):
    seen = []

    def first_time(seed, shares, method, path, times_seen):
        del seed, shares
        seen.append(method)
        return kind if times_seen == 0 else None

    monkeypatch.setattr(fault_proxy, "fault_of", first_time)
    proxy._seen.clear()
    store.put("k", b"0123")
    assert store.get("k") == b"0123"
    assert read_back(store, "k", 0, 9) == b"0123"
    assert store.size("k") == 4
    assert store.list("k") == ["k"]
    store.delete("k")
    assert store.claim("new", b"mine")
    assert {"PUT", "GET", "HEAD", "DELETE"} <= set(seen)
    # Only what has a body can be changed on the way; and a claim whose answer is lost reads what is there.
    assert proxy.counts[kind] == {"corrupt": 2, "lost": 7, "truncate": 7}.get(kind, 6)


def test_of_racing_claimers_whose_answers_are_lost_exactly_one_wins(store, proxy):
    proxy.shares = {"lost": 0.5}
    num_keys, num_writers = 4, 3
    for number in range(num_keys):
        start = threading.Barrier(num_writers)

        def claim(writer, number=number, start=start):
            start.wait(10)
            return store.claim(f"keys/{number}", b"writer %d" % writer)

        won = in_threads(claim, range(num_writers), num_writers)
        assert won.count(True) == 1
        assert store.get(f"keys/{number}") == b"writer %d" % won.index(True)
    assert proxy.counts["lost"] >= num_keys


def test_a_create_whose_answer_was_lost_is_ours_although_it_says_that_it_is_not(store, proxy, monkeypatch):
    monkeypatch.setattr(fault_proxy, "fault_of", lambda *about: "lost" if about[2:] == ("PUT", about[3], 0) else None)
    assert not store.create("a", b"mine")
    assert store.get("a") == b"mine"
    assert store.claim("b", b"mine")
    assert proxy.counts["lost"] == 2


def test_a_conflict_of_conditional_writes_is_no_lost_race(store, proxy, monkeypatch):
    original, refused = proxy._answer, []

    async def conflict(method, request, fault, writer):
        if method == "PUT" and len(refused) < 2:
            refused.append(request.header("if-none-match"))
            writer.write(fault_proxy._refusal(method, 409, "Conflict", "ConditionalRequestConflict"))
            return True
        return await original(method, request, fault, writer)

    monkeypatch.setattr(proxy, "_answer", conflict)
    assert store.create("k", b"mine")
    assert refused == ["*", "*"]


def test_a_server_that_is_gone_for_a_while_is_waited_for_by_writers_and_readers(store, proxy):
    store.put("k", b"v")
    proxy.refuse(True)
    back = threading.Timer(1.5, proxy.refuse, [False])
    back.start()
    started_s = time.monotonic()
    actions = (
        lambda: store.put("a", b"1"), lambda: store.claim("b", b"2"), lambda: store.get("k"), lambda: store.size("k"),
        lambda: store.delete("c"), lambda: store.list("k"), lambda: store.remove_leftovers("x"),
    )  # fmt: skip
    in_threads(lambda action: action(), actions)
    assert time.monotonic() - started_s >= 1.4
    back.join()
    assert (store.get("a"), store.get("b")) == (b"1", b"2")


def test_what_never_comes_back_is_given_up_after_the_patience(s3_uri, proxy, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    monkeypatch.setenv(s3_objects.TIMEOUT_VARIABLE, "10.0")  # nothing stalls here, and the machine may be busy
    store = Store(s3_uri)
    store.put("k", b"v")
    proxy.refuse(True)
    for action in (lambda: store.put("k", b"w"), lambda: store.claim("n", b"w"), lambda: store.delete("k")):
        started_s = time.monotonic()
        with pytest.raises(StoreError, match=f"nothing answers at {proxy.endpoint}"):
            action()
        assert 0.5 < time.monotonic() - started_s < 15
    proxy.refuse(False)
    assert store.get("k") == b"v"


def test_faults_are_the_same_for_the_same_seed_and_as_frequent_as_asked():
    def faults(seed):
        return [fault_of(seed, TENTH, "GET", f"/{n % 50}", n // 50) for n in range(5000)]

    assert faults(1) == faults(1) != faults(2)
    for kind in fault_proxy.KINDS:
        assert 400 < faults(1).count(kind) < 600
    assert 900 <= faults(1).count(None) <= 1100


def test_the_proxy_as_a_program_prints_its_port_and_tells_what_it_did(s3_environment, s3_uri, monkeypatch):
    command = [
        sys.executable,
        str(Path(fault_proxy.__file__)),
        "--target",
        s3_environment.endpoint,
        "--share",
        "503=0.5",
    ]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        endpoint = f"http://127.0.0.1:{int(program.stdout.readline())}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.02)
        store = Store(s3_uri)
        for number in range(10):
            store.put(f"{number}", b"v")
        with urllib.request.urlopen(f"{endpoint}/.proxy", timeout=5) as answer:
            counts = json.load(answer)["counts"]
        assert counts["requests"] == 10 + counts["503"] > 10
        change = json.dumps({"shares": {}, "refuse_s": 0.5}).encode()
        with urllib.request.urlopen(f"{endpoint}/.proxy", change, timeout=5) as answer:
            assert json.load(answer)["shares"] == {}
        started_s = time.monotonic()
        store.put("k", b"v")
        assert time.monotonic() - started_s > 0.3
    finally:
        program.kill()
        program.communicate()
