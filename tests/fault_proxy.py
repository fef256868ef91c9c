"""An HTTP proxy in front of a real S3 server that breaks a share of the requests, the same ones for the same seed.

In a test: `with FaultProxy(server.endpoint, seed=3, shares={"503": 0.1}) as proxy:`, AWS_ENDPOINT_URL=proxy.endpoint.
By itself: `python tests/fault_proxy.py --target http://127.0.0.1:8333 --port 0 --seed 3 --share 503=0.1`: prints the
port. GET /.proxy answers with its counts, POST /.proxy with {"shares": {...}, "refuse_s": 2.0} changes what it does.

Signatures cover the Host header, which is passed on as it came; so are path, query and body.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KINDS = {
    "503": "SlowDown; the server is not asked",
    "429": "TooManyRequests; the server is not asked",
    "stall": "no answer for stall_s, then the connection is closed; the server is not asked",
    "reset": "the connection is closed; the server is not asked",
    "corrupt": "one byte of what a PUT brings is changed on its way to the server (no fault for other requests)",
    "truncate": "the server does its work, its answer is cut in the middle",
    "lost": "the server does its work, its answer is dropped",
    "slow": "the server does its work, its answer trickles at bytes_per_s",
}
ALL = tuple(KINDS)
_CONTROL = "/.proxy"
_RETRY = {"503": (503, "Slow Down", "SlowDown"), "429": (429, "Too Many Requests", "TooManyRequests")}


def fault_of(seed: int, shares: Mapping[str, float], method: str, path: str, times_seen: int) -> str | None:
    """Return the kind of fault of a request, None for no fault: a pure function of these, with `shares` as odds.

    method, path: as in the request line, the path without its query. times_seen: how many requests with this method
    and path came before. So the fate of a request does not depend on what other threads ask for.
    """
    digest = hashlib.blake2b(f"{seed} {method} {path} {times_seen}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest, "big") / 2**64
    for kind in KINDS:
        left -= shares.get(kind, 0.0)
        if left < 0:
            return kind
    return None


@dataclass
class _Message:
    """The head of a request or an answer as it came, and its body with its framing."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value for found, value in self.headers if found.lower() == name), "")

    def bytes(self, drop: tuple[str, ...] = (), add: tuple[tuple[str, str], ...] = ()) -> bytes:
        kept = [(name, value) for name, value in self.headers if name.lower() not in drop]
        lines = [self.first, *(f"{name}: {value}" for name, value in (*kept, *add))]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


@dataclass
class FaultProxy:
    """The proxy, running in a thread of its own between start() and stop(). Its settings may change at any time.

    counts: requests under "requests", faults by their kind. log: (method, target, fault or None, headers by lower-case
    name) of each request, in order.
    """

    target: str
    seed: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    port: int = 0
    stall_s: float = 5.0
    bytes_per_s: float = 20_000.0
    counts: Counter[str] = field(default_factory=Counter)
    log: list[tuple[str, str, str | None, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = self.shares.keys() - KINDS.keys()
        assert not unknown, f"shares: found {sorted(unknown)}, expected of {list(KINDS)}"
        self._seen: Counter[tuple[str, str]] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="fault-proxy")
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task, asyncio.StreamWriter] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to listen on 127.0.0.1; `port` is then known."""
        self._thread.start()
        self._run(self._listen())

    def stop(self) -> None:
        """Close everything."""
        self._run(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def refuse(self, on: bool) -> None:
        """Refuse connections and close those that are open, or listen again at the same port."""
        self._run(self._hang_up() if on else self._listen())

    def faults(self) -> int:
        """How many faults there were, of all kinds."""
        return sum(self.counts[kind] for kind in KINDS)

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**20)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        me = asyncio.current_task()
        tasks = [task for task in self._connections if task is not me]
        for task in tasks:
            self._connections[task].transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the next round

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while await self._answer_one(reader, writer):
                pass
            writer.transport.abort()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            del self._connections[task]

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False if the connection is to be closed at once."""
        request = await _head(reader)
        if request.header("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await _body(reader, request)
        method, target, _ = request.first.split(" ")
        if urlsplit(target).path == _CONTROL:
            return await self._control(method, request.body, writer)
        path = urlsplit(target).path
        fault = fault_of(self.seed, self.shares, method, path, self._seen[method, path])
        self._seen[method, path] += 1
        if fault == "corrupt" and not (method == "PUT" and request.body):
            fault = None
        self.counts["requests"] += 1
        self.counts.update([fault] if fault else [])
        self.log.append((method, target, fault, {name.lower(): value for name, value in request.headers}))
        return await self._answer(method, request, fault, writer)

    async def _answer(self, method: str, request: _Message, fault: str | None, writer: asyncio.StreamWriter) -> bool:
        if fault in _RETRY:
            writer.write(_refusal(method, *_RETRY[fault]))
            await writer.drain()
            return True
        if fault == "stall":
            await asyncio.sleep(self.stall_s)
        if fault in ("stall", "reset"):
            return False
        if fault == "corrupt":
            middle = len(request.body) // 2
            request.body = request.body[:middle] + bytes([request.body[middle] ^ 1]) + request.body[middle + 1 :]
        answer = (await self._ask(method, request)).bytes(drop=("connection",))
        if fault == "lost":
            return False
        if fault == "truncate":
            # Behind the head if there is a body, else within the head.
            head = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[: (head + len(answer)) // 2 if len(answer) > head else head // 2])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return False
        step = max(int(self.bytes_per_s / 20), 1) if fault == "slow" else len(answer)
        for start in range(0, len(answer), step):
            writer.write(answer[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.05 if fault == "slow" else 0)
        return True

    async def _ask(self, method: str, request: _Message) -> _Message:
        place = urlsplit(self.target)
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=2**20)
        try:
            writer.write(request.bytes(drop=("expect", "connection"), add=(("Connection", "close"),)))
            await writer.drain()
            answer = await _head(reader)
            while answer.first.split(" ")[1] == "100":
                answer = await _head(reader)
            if method != "HEAD" and answer.first.split(" ")[1] not in ("204", "304"):
                answer.body = await _body(reader, answer)
            return answer
        finally:
            writer.close()

    async def _control(self, method: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if method == "POST":
            wanted = json.loads(body)
            self.shares = wanted.get("shares", self.shares)
            if seconds := wanted.get("refuse_s"):
                await self._hang_up()
                self._loop.call_later(seconds, lambda: asyncio.ensure_future(self._listen()))
        text = json.dumps({"counts": self.counts, "shares": self.shares}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
        await writer.drain()
        return True


async def _head(reader: asyncio.StreamReader) -> _Message:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text[:-4].split("\r\n")
    return _Message(first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)])


async def _body(reader: asyncio.StreamReader, message: _Message) -> bytes:
    """Return a body with its framing: as it has to be passed on."""
    if "chunked" not in message.header("transfer-encoding").lower():
        return await reader.readexactly(int(message.header("content-length") or 0))
    found = []
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        found += [line, await reader.readexactly(size + 2)]
        if size == 0:
            return b"".join(found)


def _refusal(method: str, status: int, reason: str, code: str) -> bytes:
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{reason}</Message></Error>'.encode()
    )
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else text)


def _share(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"found {kind!r}, expected one of {list(KINDS)}")
    return kind, float(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the server's URL")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=_share, action="append", default=[], metavar="KIND=SHARE", help=str(KINDS))
    parser.add_argument("--stall-s", type=float, default=5.0)
    parser.add_argument("--bytes-per-s", type=float, default=20_000.0)
    wanted = parser.parse_args()
    proxy = FaultProxy(
        wanted.target, wanted.seed, dict(wanted.share), wanted.port, wanted.stall_s, bytes_per_s=wanted.bytes_per_s
    )
    proxy.start()
    print(proxy.port, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
