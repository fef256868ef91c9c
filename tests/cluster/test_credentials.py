"""What looks like a credential, by name and by value, and that no text shows one."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from cluster.credentials import (
    is_secret_argument,
    is_secret_file,
    is_secret_variable,
    without_credentials,
)
from cluster.store import Store, StoreError
from cluster.store_errors import explain

LETTERS = "Zm9vYmFyYmF6"  # made up, and long enough to be one
VARIABLES = {
    "AZURE_STORAGE_CONNECTION_STRING": "x",
    "AWS_SESSION_TOKEN": "x",
    "WANDB_API_KEY": "x",
    "ENCRYPTION_KEY": "x",
    "DB_PASS": "x",
    "PGPASSWORD": "x",
    "GH_PAT": "x",
    "SENTRY_DSN": "x",
    "AZURE_SAS": "x",
    "MYSQL_PWD": "x",
    "A": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={LETTERS};EndpointSuffix=x",
    "B": f"Server=h;Password={LETTERS};Database=d",
    "C": f"https://b.s3.amazonaws.com/x?X-Amz-Expires=9&X-Amz-Signature={LETTERS}",
    "D": f"?sv=2024&sig={LETTERS}",
    "E": "https://hooks.slack.com/services/T/B/x",
    "F": f"https://{LETTERS}@o1.ingest.example/1",
    "G": "ghp_0123456789abcdef",
    "H": "AKIAIOSFODNN7EXAMPLE",
    "I": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "J": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "K": f"postgresql://me:{LETTERS}@db/x",
    "L": f"me:{LETTERS}@proxy:3128",
    "M": f"host=h user=me password='{LETTERS} x' dbname=d",
    "N": f'{{"password": "{LETTERS}"}}',
    "O": f"Authorization: Basic {LETTERS}==",
    "P": f"s3://me:a/{LETTERS}@bucket",
    "Q": f"sk_live_{LETTERS}",
    "R": f"SG.{LETTERS}abcdef.{LETTERS}abcdef",
    "S": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "OPENAIKEY": "x",
    "GCP_CREDS": "x",
    "LDAP_BINDPW": "x",
    "DBPASS": "x",
    "BASICAUTH": "x",
}
HARMLESS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "PWD": "/home/me/project",
    "NCCL_SOCKET_IFNAME": "eth0",
    "MONKEY": "banana",
    "OLDPWD": "/home/me",
    "COMPASS": "north",
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "512",
    "IMAGE": "registry.example/me/train:2026@sha256:da39a3ee5e6b4b0d3255bfef95601890",
    "PORT_AND_PATH": "http://host:8000/me@home",
    "NODE_IDS": "12:30,13:45",
    "COMMIT": "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "MODEL": "runs/2026-11-30/ResNet50-Batch4096-augmented",
    "PATTERN": "train-{000000..000099}.tar",
    "QUERY": "https://host/search?size=1&page=2",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_secret_by_its_name_or_by_its_value(name):
    assert is_secret_variable(name, VARIABLES[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_an_ordinary_variable_is_none(name):
    assert not is_secret_variable(name, HARMLESS[name])


@pytest.mark.parametrize(
    ("argument", "is_secret"),
    [
        ("s3://key:geheim@bucket/x", True),
        (f"https://b.example/x?X-Amz-Signature={LETTERS}", True),
        (f"--logger.api-key={LETTERS}", True),
        ("--data.root=s3://bucket/images", False),
        ("--optim.lr=0.1", False),
        ("s3://bucket/Images-2026/ImageNet1k-Train-Resized256px", False),
    ],
)
def test_a_word_of_a_command_line_is_judged_by_what_it_holds(argument, is_secret):
    assert is_secret_argument(argument) == is_secret


SECRET_FILES = """
    .env .env.local aws.env .envrc .netrc .npmrc .pgpass .s3cfg .boto rclone.conf kubeconfig .kube/config
    service-account.json gcp-key.json secrets.yaml .streamlit/secrets.toml .passwd-s3fs .htpasswd .config/gcloud/x.db
    .huggingface/token .cache/huggingface/token id_ecdsa id_rsa.old .git-credentials .aws/config terraform.tfvars my.ppk
    .authinfo .kaggle/kaggle.json keys.json serviceAccount.json deploy_key my.keytab .bash_history .dev.vars .env_prod
    auth.json cookies.txt accessKeys.csv .vault_pass pgpass .databrickscfg .m2/settings.xml
    .vault-token conf/Credentials.JSON deploy.pem server.key auth_token hf_token.txt .docker/config.json prod.tfstate
"""
ORDINARY_FILES = """
    train.py secrets.py src/credentials.py tokenizer.json special_tokens_map.json keys/README.md monkey.txt config.yaml
    notes.txt environment.yml passing.csv
"""


@pytest.mark.parametrize("name", SECRET_FILES.split())
def test_a_file_is_secret_by_its_name_or_its_folders(name):
    assert is_secret_file(PurePosixPath(name))


@pytest.mark.parametrize("name", ORDINARY_FILES.split())
def test_an_ordinary_file_is_none_by_name(name):
    assert not is_secret_file(PurePosixPath(name), b"import os\n")


@pytest.mark.parametrize(
    "content",
    [
        b"# mine\n-----BEGIN OPENSSH PRIVATE KEY-----\nabc",
        b"[default]\naws_secret_access_key = " + b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n",
        b'{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----"}',
        b"TOKEN=ghp_0123456789abcdefghij",
    ],
)
def test_a_file_of_any_name_is_secret_by_what_is_in_it(content):
    assert is_secret_file(PurePosixPath("src/settings.py"), content)


@pytest.mark.parametrize(
    ("content", "is_secret"),
    [
        (b"db:\n  password: geheim1\n", True),
        (b"<password>geheim1</password>", True),
        (b"url = postgres://me:geheim@host/db\n", True),
        (b"kind: Config\nusers: []\n", True),
        ("TOKEN=ghp_0123456789abcdefghij".encode("utf-16"), True),
        (b"password: ${oc.env:DB_PASSWORD}\npassword: null\nurl: https://host:443/a\n", False),
        (b'{"api_key": "<yours>", "tokens": ["me:you@"], "access_key": ""}', False),
    ],
)
def test_a_settings_file_is_secret_by_a_password_that_stands_there(content, is_secret):
    assert is_secret_file(PurePosixPath("conf/site.yaml"), content) == is_secret


@pytest.mark.parametrize("value", [v for v in VARIABLES.values() if LETTERS in v])
def test_a_text_is_shown_without_its_credentials(value):
    shown = without_credentials(f"cannot read {value} now")
    assert LETTERS not in shown
    assert shown.startswith("cannot read ")
    assert shown.endswith(" now")


def test_no_text_of_a_store_shows_its_password():
    store = Store("webhdfs://user:geheim@127.0.0.1:1/dir")
    texts = [repr(store)]
    for error, action in [(FileNotFoundError("x"), "read"), (FileNotFoundError("x"), "write"), (OSError("y"), "list")]:
        texts.append(str(explain(error, f"cannot {action} 'a' in {store.uri}")))
    for call in (lambda: store.create("a", b"x"), lambda: store.get("a")):
        with pytest.raises(StoreError) as refused:
            call()
        texts.append(str(refused.value))
    with pytest.raises(ValueError, match="web server") as web:
        Store("https://user:geheim@host/x")
    with pytest.raises(ValueError, match="what fsspec knows") as unknown:
        Store("nothing://user:geheim@host/x")
    for text in (*texts, str(web.value), str(unknown.value)):
        assert "geheim" not in text
        assert "user" not in text
