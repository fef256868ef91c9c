"""What looks like a credential: names of variables, values, files. One list, for everything that leaves this machine.

Nothing here proves that a text is none: the rules know the names that people and tools give to secrets, and the forms
that the common ones have.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

_NAME = re.compile(
    r"SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_?STR|CONN_STR|WEBHOOK|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY"
    r"|PRIVATE|BEARER|COOKIE|DSN(_|$)|(^|_)(AUTH|KEYS?|PATS?|SAS|JWT|OTP|SIGNATURE|PWD|PASS|LICEN[CS]E)(_|$)",
    re.IGNORECASE,
)
_NAMES_THAT_ARE_NONE = frozenset({"PWD", "RAY_AUTH_MODE"})

_SIGNED = (
    r"x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential|awsaccesskeyid"
    r"|signature|sig|token|access_token|api_?key|key|password|passwd|pwd|secret|client_secret|auth|sas"
)
_USER_IN_URI = re.compile(r"(?<=://)[^/?#\s\"']+@")
_SIGNED_QUERY = re.compile(rf"(?<=[?&])((?:{_SIGNED})=)[^&\s\"'#]+", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"((?:^|(?<=[;,\s?&]))(?:AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd|passwd|secret(?:_key)?"
    r"|aws_secret_access_key|aws_session_token)\s*=\s*)[^;,\s\"']+",
    re.IGNORECASE,
)
_WEBHOOK = re.compile(
    r"https://(?:hooks\.slack\.com/|discord(?:app)?\.com/api/webhooks/|[\w.-]*webhook\.office\.com/)[^\s\"']+"
)
# What services give out. Long enough that a text that only speaks of them does not match.
_ISSUED = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{16}\b"
    r"|\bgh[opsur]_[A-Za-z0-9]{10,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{15,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abeoprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bnpm_[A-Za-z0-9]{30,}"
    r"|\bpypi-[\w-]{30,}|\bdop_v1_[a-f0-9]{40,}|\bhvs\.[\w-]{20,}|\bdckr_pat_[\w-]{20,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
_SECRET_SETTING = re.compile(
    r"aws_secret_access_key\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b|AccountKey=[A-Za-z0-9+/=]{20,}"
    r"|\"private_key\"\s*:\s*\"-----BEGIN",
    re.IGNORECASE,
)
_RANDOM = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=\D*\d)(?!.*[a-z]{7})[A-Za-z0-9+=][A-Za-z0-9+/=]{31,}")
"""No path and no sentence: both have longer words."""

_FILE_PATTERNS = """
    .env .env.* *.env .envrc .netrc _netrc .pgpass pgpass.conf .my.cnf .mylogin.cnf *passwd* .htpasswd
    .npmrc .yarnrc .yarnrc.yml .pypirc pip.conf .s3cfg .boto rclone.conf .git-credentials .vault-token .dockercfg
    .dockerconfigjson kubeconfig* *.kubeconfig *.ovpn .modal.toml
    .aws .ssh .kube .docker .gnupg .azure .oci .config .cache .huggingface gcloud
    .terraform *.tfstate* *.tfvars *.tfvars.json .terraformrc terraform.rc
    *.pem *.key *.p12 *.pfx *.p8 *.ppk *.jks *.keystore *.kdbx *.gpg *.kwallet
    id_rsa* id_dsa* id_ecdsa* id_ed25519* service-account* service_account* *-sa.json
    *-key.json *_key.json *-keys.json *_keys.json client_secret* application_default_credentials*
    token token.* *_token *-token *.token *_token.* *-token.* auth_token* tokens.*
    *credential* *secret* *password* *apikey* *api_key* *api-key* *webhook*
"""
_FILES = tuple(_FILE_PATTERNS.split())
_SOURCE_CODE = frozenset({".py", ".pyi", ".pyx", ".sh", ".md", ".rst", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp"})
"""Files of these kinds are judged by what is in them, not by their name: `secrets.py` may be a module."""


def is_secret_name(name: str) -> bool:
    """Return whether a variable, field or query parameter of this name usually holds a credential."""
    return name not in _NAMES_THAT_ARE_NONE and _NAME.search(name) is not None


def is_secret_value(text: str) -> bool:
    """Return whether a text holds a credential: a user in a URI, a signature, a connection string, an issued token."""
    patterns = (_USER_IN_URI, _SIGNED_QUERY, _ASSIGNED, _WEBHOOK, _ISSUED, _SECRET_SETTING)
    return any(pattern.search(text) for pattern in patterns)


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable holds a credential, by its name or its value.

    A value of 32 and more random letters and digits counts as one, whatever its name.
    """
    return is_secret_name(name) or is_secret_value(value) or _RANDOM.fullmatch(value.strip()) is not None


def is_secret_argument(argument: str) -> bool:
    """Return whether a word of a command line holds a credential, as its value or in the form NAME=VALUE."""
    name, is_setting, _ = argument.partition("=")
    name = re.sub(r"[-.]", "_", name.lstrip("-"))
    return is_secret_value(argument) or bool(is_setting and name.isidentifier() and is_secret_name(name))


def is_secret_file(path: PurePosixPath, beginning: bytes = b"") -> bool:
    """Return whether a file holds credentials, by its name and the names of its folders, or by what it begins with.

    path: relative, so that the folders above it do not count. beginning: of its content.
    """
    names = [part.lower() for part in path.parts]
    if path.suffix.lower() in _SOURCE_CODE:
        names = names[:-1]
    if any(fnmatchcase(name, pattern) for name in names for pattern in _FILES):
        return True
    text = beginning.decode("latin-1")
    return _ISSUED.search(text) is not None or _SECRET_SETTING.search(text) is not None


def without_credentials(text: str) -> str:
    """Return the text with what looks like a credential left out, for messages and logs."""
    for pattern in (_SIGNED_QUERY, _ASSIGNED):
        text = pattern.sub(r"\1…", text)
    for pattern in (_WEBHOOK, _ISSUED):
        text = pattern.sub("…", text)
    return _USER_IN_URI.sub("", text)
