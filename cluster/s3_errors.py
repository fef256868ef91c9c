"""What the errors of an S3 server and of its client library mean, and what a person can do about them.

By name, and not by type: the libraries of S3 are imported only where S3 is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
_ENDPOINT = "check AWS_ENDPOINT_URL (or endpoint_url in ~/.aws/config), the network, and that the server runs"
_OF_CODES = {
    "InvalidAccessKeyId": f"the server does not know this access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the server refuses the signature, so the secret key is a wrong one; {_CREDENTIALS}",
    "AccessDenied": "these credentials may not do this here; have s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:ListBucket allowed for them, or use others (AWS_PROFILE)",
    "403": "the server refuses these credentials: a wrong key or secret, or no right to do this here. Check "
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and the rights of this user",
    "ExpiredToken": "these credentials have expired; get new ones (aws sso login)",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it (NTP)",
    "NoSuchBucket": "there is no such bucket; create it, or correct the URI",
    "InvalidBucketName": "no bucket can have this name; correct the URI",
    "MethodNotAllowed": "the server does not offer this; is it an S3 server?",
    "NotImplemented": "the server does not offer this; use Amazon S3 or another server that does",
}
_OF_CODES["AllAccessDisabled"] = _OF_CODES["AccessDenied"]
_OF_CODES["Forbidden"] = _OF_CODES["403"]
_OTHER_REGION = frozenset(
    {
        *("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "Redirect"),
        *("301", "TemporaryRedirect", "307"),
    }
)
_OF_NAMES = {
    "NoCredentialsError": f"found no credentials; {_CREDENTIALS}",
    "PartialCredentialsError": f"found only a part of the credentials; {_CREDENTIALS}",
    "CredentialRetrievalError": f"the credentials cannot be had; {_CREDENTIALS}",
    "TokenRetrievalError": "the login has expired; log in again (aws sso login)",
    "UnauthorizedSSOTokenError": "the login has expired; log in again (aws sso login)",
    "SSOTokenLoadError": "nobody is logged in; log in (aws sso login)",
    "ProfileNotFound": "AWS_PROFILE names a profile that ~/.aws/config does not have; correct one of them",
    "ConfigParseError": "the file ~/.aws/config (or AWS_CONFIG_FILE) cannot be read; correct it",
    "NoRegionError": "no region is known; set AWS_DEFAULT_REGION",
    "InvalidRegionError": "there is no such region; correct AWS_DEFAULT_REGION",
    "ParamValidationError": "no bucket can have this name; correct the URI",
}


def advise(error: BaseException, endpoint: str) -> str | None:
    """Return what is wrong and what to do, for an error that is not just a missing object; None if that is unknown."""
    is_away = False
    for seen in chain(error):
        names = {kind.__name__ for kind in type(seen).__mro__}
        if "CredentialsAwayError" in names:
            is_away = True
            continue
        # Of a bucket, unless it is about a token that is half written.
        known = names & _OF_NAMES.keys() - ({"ParamValidationError"} if is_away else set())
        if known:
            return _OF_NAMES[known.pop()]
        if is_away and code_of(seen) not in _OF_CODES:
            return f"{_OF_NAMES['CredentialRetrievalError']} ({type(seen).__name__}: {seen})"
        if "SSLError" in names:
            return (
                f"{endpoint} shows no valid certificate; set AWS_CA_BUNDLE to its authority's, or correct the address"
            )
        if names & {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"}:
            return f"nothing answers at {endpoint}; {_ENDPOINT}"
        if "ProxyConnectionError" in names:
            return "the proxy does not answer; check HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
        if "encoded in URL" in str(seen):
            return f"AWS_ENDPOINT_URL holds a user name and a password; leave them out. {_CREDENTIALS}"
        if names & {"HTTPClientError", "ResponseStreamingError"}:
            return f"{endpoint} takes connections and does not answer properly; {_ENDPOINT}"
        if "ResponseParserError" in names:
            return f"{endpoint} does not answer as an S3 server does; {_ENDPOINT}"
        if "Invalid endpoint" in str(seen):
            return f"AWS_ENDPOINT_URL is no URL; expected one such as https://s3.example.org; {_ENDPOINT}"
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return _of_answer(response, endpoint)
        if names & {"TimeoutError", "ConnectionAbortedError"}:
            return f"{endpoint} takes connections and does not answer properly; {_ENDPOINT}"
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its cause, the cause of that, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def code_of(error: BaseException) -> str | None:
    """Return the S3 code of an error ("NoSuchKey"; "404" where the answer had no text), None if it is not S3's."""
    for seen in chain(error):
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return None


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an S3 server's answer, 0 if the error is not one."""
    for seen in chain(error):
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def _of_answer(response: dict[str, Any], endpoint: str) -> str | None:
    error = response.get("Error", {})
    code = str(error.get("Code", ""))
    if code in _OTHER_REGION:
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or error.get("Region")
        where = f"in the region {region}; set AWS_DEFAULT_REGION={region}" if region else "in another region; set"
        return f"the bucket is {where}{'' if region else ' AWS_DEFAULT_REGION to it'} (asked was {endpoint})"
    return _OF_CODES.get(code)
