"""A TCP proxy whose connections a test cuts, or lets go silent, as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class TcpProxy:
    """Passes connections to 127.0.0.1:`port` on. In a test: `with TcpProxy(port) as proxy:`, then proxy.port."""

    def __init__(self, port: int, *, passes_web_sockets: bool = True) -> None:
        self._target, self._passes_web_sockets = port, passes_web_sockets
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passes = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="tcp-proxy")

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        self._run(self._cut())

    def mend(self) -> None:
        """Take connections again."""
        self._run(self._listen())

    def silence(self) -> None:
        """Pass nothing on any more, without closing anything: what comes is kept."""
        self._loop.call_soon_threadsafe(self._passes.clear)

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _listen(self) -> None:
        self._passes.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        self._passes.set()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, on = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, on}
        try:
            tasks = [asyncio.ensure_future(self._pass(*ends)) for ends in ((reader, on), (back, writer))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        finally:
            self._writers -= {writer, on}
            for end in (writer, on):
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                if b"upgrade: websocket" in data.lower() and not self._passes_web_sockets:
                    return
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
