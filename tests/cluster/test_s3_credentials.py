"""Credentials that cannot be had for a while: a role's service, a token's file, a profile that is being rewritten."""

from __future__ import annotations

import datetime
import http.server
import json
import threading
import time
from urllib.parse import parse_qs

import pytest

from cluster import patience, s3_credentials
from cluster.coordination import answered, unpacked
from cluster.failures import describe
from cluster.store import ObjectMissingError, Store, StoreError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHERS = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED")


class Services(http.server.ThreadingHTTPServer):
    """A machine's metadata service, a container's agent and STS in one; each answers with `secret`, after `delay_s`.

    fails: how many requests are answered with 503 from now on.
    """

    def __init__(self, key: str, secret: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.key, self.secret, self.delay_s, self.fails, self.num_asked = key, secret, 0.0, 0, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def credentials(self) -> dict[str, str]:
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=6)
        ends = soon.strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"AccessKeyId": self.key, "SecretAccessKey": self.secret, "Token": "", "Expiration": ends}

    def handle_error(self, request, client_address):
        """Who asked did not wait for the answer."""


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Services

    def log_message(self, format, *args): ...

    def _say(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fails(self) -> bool:
        self.server.num_asked += 1
        time.sleep(self.server.delay_s)
        if self.server.fails > 0:
            self.server.fails -= 1
            self.send_error(503)
            return True
        return False

    def do_PUT(self):
        self._say("token")

    def do_GET(self):
        if self._fails():
            return
        if self.path.endswith("security-credentials/"):
            return self._say("role")
        about = {"Code": "Success", "LastUpdated": "2026-01-01T00:00:00Z", "Type": "AWS-HMAC"}
        self._say(json.dumps({**about, **self.server.credentials()}))

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert asked["Action"] == ["AssumeRoleWithWebIdentity"]
        if self._fails():
            return
        found = {**self.server.credentials(), "SessionToken": ""}
        del found["Token"]
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in found.items())
        self._say(
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            f"<AssumeRoleWithWebIdentityResult><Credentials>{inner}</Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )


@pytest.fixture
def services(s3_environment, monkeypatch, tmp_path):
    """No keys in the environment, nor files of this user; the services know those of the S3 server."""
    server = Services(*(s3_environment.environment[name] for name in KEYS))
    for name in (*KEYS, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(s3_credentials, "_PROBE_TIMEOUT_S", 0.5)
    yield server
    server.shutdown()
    server.server_close()


def of_a_machine(services, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", services.url)


def of_a_container(services, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{services.url}/credentials")


def of_a_token(services, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", services.url)
    (tmp_path / "token").write_text("header.claims.signature")


@pytest.mark.parametrize("role", [of_a_machine, of_a_container, of_a_token])
def test_a_service_that_refuses_some_times_is_asked_again(services, s3_uri, monkeypatch, tmp_path, role):
    role(services, monkeypatch, tmp_path)
    services.fails = 3
    Store(s3_uri).put("k", b"v")
    assert services.fails == 0
    assert Store(s3_uri).get("k") == b"v"


def test_a_metadata_service_that_takes_more_than_a_second_is_given_more_time(services, s3_uri, monkeypatch, tmp_path):
    of_a_machine(services, monkeypatch, tmp_path)
    services.delay_s = 1.1  # botocore waits for one
    Store(s3_uri).put("k", b"v")


def test_a_store_that_found_no_credentials_finds_them_later(services, s3_uri, monkeypatch, tmp_path):
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.2)
    of_a_machine(services, monkeypatch, tmp_path)
    services.fails = 1000
    store = Store(s3_uri)
    with pytest.raises(StoreError, match="found no credentials; set AWS_ACCESS_KEY_ID") as caught:
        store.put("k", b"v")
    assert describe(caught.value, 0, 1).may_pass, "other workers may have more luck"
    services.fails = 0
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 20.0)
    store.put("k", b"v")


def test_a_token_file_that_is_away_is_no_missing_object(services, s3_uri, monkeypatch, tmp_path):
    of_a_token(services, monkeypatch, tmp_path)
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.2)
    (tmp_path / "token").unlink()
    with pytest.raises(StoreError, match=r"the credentials cannot be had.*No such file.*token") as caught:
        Store(s3_uri).get("k")
    assert not isinstance(caught.value, ObjectMissingError)
    # Being replaced by the node's agent.
    threading.Timer(0.1, (tmp_path / "token").write_text, ["header.claims.signature"]).start()
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 20.0)
    with pytest.raises(ObjectMissingError):
        Store(s3_uri, patience_s=30).get("k")


def write_profile(tmp_path, services, secret):
    text = f"[default]\naws_access_key_id = {services.key}\naws_secret_access_key = {secret}\n"
    (tmp_path / "credentials").write_text(text)


def test_keys_that_a_profile_gets_while_a_store_is_open_are_used(services, s3_uri, tmp_path):
    write_profile(tmp_path, services, services.secret)
    store = Store(s3_uri)
    store.put("k", b"v")
    # The server changes the key; what rewrites the profile is a moment late, and leaves it empty in between.
    files = store._backend()._files
    files.session._credentials.secret_key = "replaced by now"
    files._s3._request_signer._credentials.secret_key = "replaced by now"
    (tmp_path / "credentials").write_text("")
    threading.Timer(0.3, write_profile, [tmp_path, services, services.secret]).start()
    assert store.get("k") == b"v"


def test_a_mistake_is_told_at_once_where_nothing_hands_out_credentials(services, s3_uri):
    started_s = time.monotonic()
    with pytest.raises(StoreError, match="found no credentials") as caught:
        Store(s3_uri).put("k", b"v")
    assert time.monotonic() - started_s < patience.FIRST_PATIENCE_S / 2
    assert caught.value.is_permanent
    assert not describe(caught.value, 0, 1).may_pass


def test_what_passes_is_known_as_such_beyond_the_coordinator(monkeypatch):
    def fail(error):
        raise error

    away = StoreError("cannot list")
    away.is_permanent = False
    for error, may_pass in ((away, True), (StoreError("no permission"), False)):
        answer = answered(json.dumps({"method": "fail", "arguments": {}}), {"fail": lambda error=error: fail(error)})
        with pytest.raises(StoreError) as caught:
            unpacked(answer)
        assert describe(caught.value, 0, 2).may_pass is may_pass
