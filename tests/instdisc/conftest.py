"""A real S3 server for the tests of a file, to which S3 clients are led."""

from __future__ import annotations

import pytest
from seaweed import Seaweed


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        seaweed = Seaweed(tmp_path_factory.mktemp("seaweed"))
        seaweed.start()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    patch = pytest.MonkeyPatch()
    for name, value in seaweed.environment.items():
        patch.setenv(name, value)
    yield seaweed
    seaweed.kill()
    patch.undo()
