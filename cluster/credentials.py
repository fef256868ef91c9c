"""What looks like a credential: names of variables, values, files. One list, for everything that leaves this machine.

Nothing here proves that a text is none: the rules know the names that people and tools give to secrets, and the forms
that the common ones have.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

_NAME = re.compile(
    r"SECRET|(?<!NUM_)(?<!MAX_)(?<!MIN_)TOKEN(?!IZ)|PASSW|PASSPHRASE|PASSKEY|PASSCODE|CREDENTIAL|CONNECTION_?STR"
    r"|CONN_STR|WEBHOOK|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|PRIVATE|BEARER|COOKIE|MNEMONIC|KEYTAB|SEED_?PHRASE|USERPASS"
    r"|(?:DSN|PWD?|CREDS?|AUTH|AUTHORIZATION|(?<!MON)(?<!DON)(?<!TUR)(?<!HOT)KEYS?)(_|$)"
    r"|(^|_)(PATS?|SAS|JWT|OTP|SIGNATURE|(DB|ROOT|USER|MY|LDAP)?PASS|LICEN[CS]E)(_|$)",
    re.IGNORECASE,
)
_NAMES_THAT_ARE_NONE = frozenset({"PWD", "OLDPWD", "RAY_AUTH_MODE"})

_SIGNED = (
    r"x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential|awsaccesskeyid"
    r"|signature|sig|token|access_token|api_?key|key|password|passwd|pwd|secret|client_secret|auth|sas"
)
_USER_IN_URI = re.compile(
    r"(?:(?<=://)|(?<=^//))(?:[^/?#\s\"']+"
    # A password that holds what should have been escaped; not a port and a path.
    r"|[^/?#\s\"':@]+:(?!\d+(?:[/?#]|$))[^\s\"']{0,200})@"
    r"|(?<![^\s\"'=(,])[\w.%+-]+:[^\s/@\"']+@(?!sha\d+:)(?=[\w\[])"  # no scheme: a proxy, or scp
)
_SIGNED_QUERY = re.compile(rf"(?<=[?&])((?:{_SIGNED})=)[^&\s\"'#]+", re.IGNORECASE)
_SETTING = (
    r"AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd|passwd|passphrase|secret(?:_key)?|client_secret"
    r"|aws_secret_access_key|aws_session_token|access_token|_?auth_?token|api_key|Authorization"
)
_ASSIGNED = re.compile(
    rf"((?:^|(?<=[;,\s?&{{\"'<(/:]))(?:{_SETTING})[\"']?\s*[=:]\s*)"
    r"(?:\"[^\"]+\"|'[^']+'|(?:Bearer\s+|Basic\s+)?[^;,\s\"'&})…]+)",
    re.IGNORECASE,
)
_WEBHOOK = re.compile(
    r"https://(?:hooks\.slack\.com/|discord(?:app)?\.com/api/webhooks/|[\w.-]*webhook\.office\.com/)[^\s\"']+"
)
# What services give out. Long enough that a text that only speaks of them does not match.
_ISSUED = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\b(?:"
    r"(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{16}\b|AGE-SECRET-KEY-1\w{4,}|AIza[\w-]{35}"
    r"|gh[opsur]_[A-Za-z0-9]{10,}|github_pat_\w{20,}|gl[a-z]{2,6}-[\w-]{18,}|hf_[A-Za-z0-9]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|[sr]k_(?:live|test)_\w{10,}|whsec_\w{10,}|SG\.[\w-]{16,}\.[\w-]{16,}|sq0[a-z]{3}-[\w-]{20,}"
    r"|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}|ya29\.[\w-]{20,}|npm_[A-Za-z0-9]{30,}|nvapi-[\w-]{20,}|pypi-[\w-]{30,}"
    r"|dop_v1_[a-f0-9]{40,}|dckr_pat_[\w-]{20,}|dapi[a-f0-9]{32}\b|hvs\.[\w-]{20,}|lin_api_\w{20,}|r8_\w{20,}"
    r"|\d{8,10}:[\w-]{35}\b|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|Bearer [\w.~+/=-]{12,}|Basic (?=\S*[\d=])[A-Za-z0-9+/=]{8,})"
)
_SECRET_SETTING = re.compile(
    r"aws_secret_access_key\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b|AccountKey=[A-Za-z0-9+/=]{20,}"
    r"|\"private_key\"\s*:\s*\"-----BEGIN|\"auth\"\s*:\s*\"[A-Za-z0-9+/=]{8,}\"|_authToken\s*=\s*\S"
    r"|client-key-data:\s*\S{20,}|\bkind:\s*Config\b|\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S",
    re.IGNORECASE,
)
_PASSWORD_SETTING = re.compile(
    # A value that stands there, not one that is taken from somewhere else ($VAR, {{ x }}, <yours>) or none.
    r"(?:^|[\s,{<\"'])[\w.-]*(?:password|passwd|client_secret|secret_key|api_key|access_key|auth_token|access_token)"
    r"[\"']?\s*[=:>]\s*[\"']?(?!null\b|none\b|true\b|false\b|changeme\b)[^\s\"'${%<*,}]{6,}"
    r"|\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@\"'$<{]*:[^/\s@\"'$<{]+@[\w.\[]",
    re.IGNORECASE,
)
_SETTINGS = frozenset(
    {"", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".config", ".properties", ".xml", ".json", ".txt", ".csv"}
)
_RANDOM = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=\D*\d)(?!.*[a-z]{7})[A-Za-z0-9+=][A-Za-z0-9+/=]{31,}")
"""No path and no sentence: both have longer words."""

_FILE_PATTERNS = """
    .env .env.* *.env .envrc .env-* .env_* .dev.vars .netrc netrc _netrc .pgpass pgpass* .my.cnf .mylogin.cnf *passwd*
    .htpasswd htpasswd .authinfo .msmtprc .ftpconfig sftp*.json .odbc.ini odbc.ini .*_history .smbcredentials
    .npmrc .yarnrc .yarnrc.yml .pypirc pip.conf pip.ini .condarc nuget.config .s3cfg s3cfg .boto *rclone.conf
    .git-credentials .vault-token .vault_pass* vault_pass* .dockercfg .dockerconfigjson kubeconfig* *.kubeconfig *.ovpn
    .modal.toml .databrickscfg kaggle.json firebase-adminsdk* auth.json auth.toml oauth*.json cookies.* *.cookies
    .cookies .aws .ssh .kube .docker .gnupg .azure .oci .config .cache .huggingface gcloud .gcloud .kaggle .m2 .snowsql
    .dbt .fly .terraform *.tfstate* *.tfvars *.tfvars.json .terraformrc terraform.rc
    *.pem *.key *.p12 *.pfx *.p8 *.pkcs8 *.pkcs12 *.ppk *.jks *.keystore *.kdbx *.gpg *.age *.kwallet *.keytab *.kirbi
    wallet.dat
    id_rsa* id_dsa* id_ecdsa* id_ed25519* *deploy_key* *deploy-key*
    service-account* service_account* serviceaccount* *-sa.json sa.json
    key.json keys.json *-key.json *_key.json *-keys.json *_keys.json client_secret* application_default_credentials*
    token token.* .token *_token *-token *.token *_token.* *-token.* auth_token* tokens.*
    *credential* *secret* *password* *apikey* *api_key* *api-key* *webhook* *accesskey* *access_key* rootkey*
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
    names = [part.lower().strip() for part in path.parts]
    if path.suffix.lower() in _SOURCE_CODE:
        names = names[:-1]
    if any(fnmatchcase(name, pattern) for name in names for pattern in _FILES):
        return True
    text = beginning.replace(b"\0", b"").decode("latin-1")  # UTF-16 is read as well
    patterns = [_ISSUED, _SECRET_SETTING, *([_PASSWORD_SETTING] if path.suffix.lower() in _SETTINGS else [])]
    return any(pattern.search(text) for pattern in patterns)


def without_credentials(text: str) -> str:
    """Return the text with what looks like a credential left out, for messages and logs."""
    for pattern in (_SIGNED_QUERY, _ASSIGNED):
        text = pattern.sub(r"\1…", text)
    for pattern in (_WEBHOOK, _ISSUED):
        text = pattern.sub("…", text)
    return _USER_IN_URI.sub("", text)
