"""Stores for the tests of this folder: in memory, and a real S3 server, started by the first that needs it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from seaweed import Seaweed


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        server.start()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield server
    server.kill()


@pytest.fixture
def s3_environment(s3_server, monkeypatch, tmp_path):
    """Lead S3 clients to the server, and to no file or machine that knows other credentials. Returns the server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws_config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws_credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_uri(s3_environment, request) -> str:
    """A place of its own on the server, the same in every session: the faults of a proxy depend on it."""
    return f"s3://images/{re.sub('[^a-z0-9_]', '-', request.node.name)}/run"


@pytest.fixture
def uri() -> Iterator[str]:
    """A store of its own in memory."""
    yield f"memory://{uuid.uuid4().hex}"
    # The memory file system belongs to the process, and its listings look at everything in it.
    MemoryFileSystem.store.clear()
