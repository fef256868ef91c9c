"""The client of S3 and its credentials, which may be away for a while: a metadata service that is slow, a token's file
or a profile that is being rewritten. Whoever had them waits for them, as for a server that does not answer.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import aiobotocore.session
import botocore.exceptions
import botocore.handlers
import s3fs

from cluster.s3_errors import code_of

S3Files: TypeAlias = s3fs.S3FileSystem

CONNECT_TIMEOUT_S = 5.0
_METADATA_URL = "http://169.254.169.254"
_METADATA_TIMEOUT_S, _PROBE_TIMEOUT_S = 5, 1.0
_METADATA_VARIABLE = "AWS_METADATA_SERVICE_TIMEOUT"
# Something that hands out credentials by the request: a container's agent, a token for a role, a machine's own service.
_SOURCES = (
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"),
)
# Of a server, about credentials that were good before.
_EXPIRED = frozenset(
    {
        *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"),
        *("InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch"),
        # The answer to a HEAD has no text.
        "400",
    }
)


class NoCredentialsNow(Exception):
    """There are no credentials with which a request could be signed; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause
        super().__init__(str(cause))


class CredentialsAwayError(ConnectionError):
    """The credentials cannot be had, or are refused, although they could be had before or their source is there."""


def open_files(timeout_s: float, *, is_patient: bool = False) -> S3Files:
    """Return a client that repeats nothing by itself. is_patient: whether a metadata service has more than a second."""
    # It logs the traceback of every try; `Patience` says what is tried again.
    logging.getLogger("aiobotocore.credentials").setLevel(logging.CRITICAL)
    session = aiobotocore.session.AioSession()
    # aiohttp waits for the "100 Continue" that botocore asks for before each body, without a limit.
    session.unregister("before-call.s3", botocore.handlers.add_expect_header)
    if is_patient and _METADATA_VARIABLE not in os.environ:
        session.set_config_variable("metadata_service_timeout", _METADATA_TIMEOUT_S)
    files = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        session=session,
        config_kwargs={
            "max_pool_connections": 64,
            "connect_timeout": min(CONNECT_TIMEOUT_S, timeout_s),
            "read_timeout": timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )
    files.retries = 1
    return files


async def require_credentials(files: S3Files) -> None:
    """Have the client's credentials ready. NoCredentialsNow where that fails, whatever is raised on the way there.

    Beforehand: the error of a token's file that is not there must not be taken for an object that is not there.
    """
    try:
        if not files.anon:
            session: Any = files.session
            # Before there is a client: one that is made without credentials never has any.
            credentials = await session.get_credentials()
            if credentials is None:
                raise botocore.exceptions.NoCredentialsError
            await credentials.get_frozen_credentials()
        await files.set_session()
    except ValueError:
        raise  # of the address
    except Exception as error:
        raise NoCredentialsNow(error) from error


def is_of_credentials(error: Exception) -> bool:
    """Whether a request failed because of its credentials, and may succeed with others."""
    return isinstance(error, NoCredentialsNow | botocore.exceptions.NoCredentialsError) or code_of(error) in _EXPIRED


def may_come() -> bool:
    """Whether something that hands out credentials is there, so that having none may pass."""
    if any(os.environ.get(name) for name in _SOURCES):
        return True
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        place = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _METADATA_URL)
        socket.create_connection((place.hostname or "", place.port or 80), timeout=_PROBE_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True
