"""A real HTTP server that behaves as the metadata services of EC2 (version 2) and of Compute Engine do."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LEAST_TTL_S, MOST_TTL_S = 1, 21600


class MetadataServer:
    """Serves on a port of `host`. What it says is set on the object, at any time; port: to come back at the same one.

    Attributes:
        texts: what stands at each path; everything else is 404.
        delay_s: how long it waits before each answer; trickle_s: between the bytes of one.
        token_life_s: how long tokens are good, whatever was asked for; None: as asked.
        requests: (method, path, status) of each request.
    """

    def __init__(self, cloud: str, port: int = 0, host: str = "127.0.0.1"):
        self.cloud = cloud
        self.texts: dict[str, str] = {}
        self.delay_s = self.trickle_s = 0.0
        self.token_life_s: float | None = None
        self.requests: list[tuple[str, str, int]] = []
        self.tokens: dict[str, float] = {}
        self._server = ThreadingHTTPServer((host, port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> MetadataServer:
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def interrupt(self, action: str, deadline_s: float) -> None:
        """Announce the end of a spot instance, as EC2 does."""
        at = datetime.fromtimestamp(deadline_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.texts["/latest/meta-data/spot/instance-action"] = json.dumps({"action": action, "time": at})

    def say(self, name: str, text: str) -> None:
        """Set a value of Compute Engine's instance."""
        self.texts[f"/computeMetadata/v1/instance/{name}"] = text


def _handler(metadata: MetadataServer):
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if metadata.cloud != "aws" or self.path != "/latest/api/token":
                self.answer(404, "")
            elif not ttl.isdigit() or not LEAST_TTL_S <= int(ttl) <= MOST_TTL_S:
                self.answer(400, "")
            else:
                token = secrets.token_urlsafe(40)
                life_s = float(ttl) if metadata.token_life_s is None else metadata.token_life_s
                metadata.tokens[token] = time.monotonic() + life_s
                self.answer(200, token)

        def do_GET(self):
            if metadata.cloud == "aws":
                token = self.headers.get("X-aws-ec2-metadata-token", "")
                is_known = metadata.tokens.get(token, 0.0) > time.monotonic()
            else:
                is_known = self.headers.get("Metadata-Flavor") == "Google"
            if not is_known:
                self.answer(401 if metadata.cloud == "aws" else 403, "")
            elif self.path in metadata.texts:
                self.answer(200, metadata.texts[self.path])
            else:
                self.answer(404, "<html>404 - Not Found</html>")

        def answer(self, status: int, text: str):
            metadata.requests.append((self.command, self.path, status))
            time.sleep(metadata.delay_s)
            body = text.encode()
            self.send_response(status)
            if metadata.cloud == "gcp":
                self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            pieces = [bytes([byte]) for byte in body] if metadata.trickle_s else [body]
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(metadata.trickle_s)

        def log_message(self, *_):
            pass

        def handle(self):
            with contextlib.suppress(ConnectionError):  # who asked has hung up
                super().handle()

    return Handler
