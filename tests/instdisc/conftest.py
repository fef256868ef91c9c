"""A real S3 server for the tests of a file."""

from __future__ import annotations

import pytest
from seaweed import Seaweed


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory):
    """Yield a server that no client here is led to."""
    try:
        seaweed = Seaweed(tmp_path_factory.mktemp("seaweed"))
        seaweed.start()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield seaweed
    seaweed.kill()


@pytest.fixture(scope="module")
def server(plain_server):
    """Yield a server to which S3 clients are led."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in plain_server.environment.items():
            patch.setenv(name, value)
        yield plain_server
