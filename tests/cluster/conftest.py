"""A real S3 server for the tests of this folder, started by the first that needs it."""

from __future__ import annotations

import uuid

import pytest
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
def s3_uri(s3_environment) -> str:
    """A place of its own on the server."""
    return f"s3://images/{uuid.uuid4().hex}/run"
