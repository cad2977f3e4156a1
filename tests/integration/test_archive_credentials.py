"""Credentials must be found where AWS's tools find them, in their order, and told nowhere."""

import http.server
import json
import os
import threading
from datetime import UTC, datetime
from urllib.parse import parse_qs

import pytest

from tests.support.archives import make_snapshot
from tests.support.s3 import BUCKET, serve_bucket
from zops.archive.backup import backup
from zops.archive.credentials import find_credentials, find_region, parse_xml
from zops.archive.store import open_store
from zops.errors import SourceFailed

EXPIRES = "2030-01-01T00:00:00Z"
GIVEN = {"AccessKeyId": "id", "SecretAccessKey": "hush", "Token": "token", "Expiration": EXPIRES}
STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>id</AccessKeyId><SecretAccessKey>hush</SecretAccessKey>
<SessionToken>token</SessionToken><Expiration>2030-01-01T00:00:00Z</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""

server = pytest.fixture(scope="module")(serve_bucket)


@pytest.fixture
def cloud():
    """Serve an instance's metadata, a container's credentials and STS; keep what was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked.append((self.command, self.path, dict(self.headers), body))
            answers = {
                "/latest/api/token": "session",
                "/latest/meta-data/iam/security-credentials/": "role\n",
                "/latest/meta-data/iam/security-credentials/role": json.dumps(GIVEN),
                "/container": json.dumps(GIVEN),
                "/": STS,
            }
            text = answers.get(self.path, "nonsense").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = handle_any  # noqa: N815 - the names are the library's

        def log_message(self, *_args: object) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", asked
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def home(tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = hush\n\n"
        "[work]\naws_access_key_id = two\naws_secret_access_key = hush\naws_session_token = token\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-west-1\n\n[profile work]\nregion = us-west-2\n\n[profile sso]\nsso_session = x\n"
    )
    return {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}


def test_variables_must_come_first(home):
    found = find_credentials({**home, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"})
    assert (found.access_key, found.secret_key, found.token) == ("id", "hush", "")
    assert "hush" not in repr(found)


def test_the_profile_must_give_keys_and_region(home):
    assert (find_credentials(home).access_key, find_region(home)) == ("one", "eu-west-1")
    work = {**home, "AWS_PROFILE": "work"}
    assert (find_credentials(work).access_key, find_credentials(work).token, find_region(work)) == (
        "two", "token", "us-west-2",
    )  # fmt: skip
    assert find_region({**home, "AWS_REGION": "here"}) == "here"


@pytest.mark.parametrize(("profile", "why"), [("sso", "sso_session"), ("nobody", "none of that name")])
def test_a_profile_that_gives_no_keys_must_be_said(home, profile, why):
    with pytest.raises(SourceFailed, match=why) as caught:
        find_credentials({**home, "AWS_PROFILE": profile})
    assert caught.value.code == "store-credentials-missing"


def test_a_profile_file_that_is_none_must_be_said_without_what_is_in_it(home, tmp_path):
    (tmp_path / ".aws" / "credentials").write_text("[default]\nhush hush hush\n")
    with pytest.raises(SourceFailed) as caught:
        find_credentials(home)
    assert "hush" not in str(caught.value.as_json())


def test_the_instance_must_be_asked_with_a_session(cloud, tmp_path):
    found = find_credentials({"HOME": str(tmp_path), "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud[0]})
    assert (found.access_key, found.token, found.expires) == ("id", "token", datetime(2030, 1, 1, tzinfo=UTC))
    assert cloud[1][0][0] == "PUT"
    assert all(
        {k.lower(): v for k, v in each[2].items()}["x-aws-ec2-metadata-token"] == "session" for each in cloud[1][1:]
    )


def test_the_container_must_be_asked_with_its_token(cloud, tmp_path):
    (tmp_path / "token").write_text("mine\n")
    environ = {
        "HOME": str(tmp_path),
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{cloud[0]}/container",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
    }
    assert find_credentials(environ).secret_key == "hush"
    assert cloud[1][0][2]["Authorization"] == "mine"


def test_a_web_identity_must_be_shown_in_the_body_and_never_in_an_address(cloud, tmp_path):
    (tmp_path / "token").write_text("proof")
    environ = {
        "HOME": str(tmp_path),
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/x",
        "AWS_ENDPOINT_URL_STS": f"{cloud[0]}/",
    }
    assert find_credentials(environ).token == "token"
    method, path, _, body = cloud[1][0]
    assert (method, "proof" in path) == ("POST", False)
    assert parse_qs(body)["WebIdentityToken"] == ["proof"]


@pytest.mark.parametrize("address", ["/nonsense", "file:///etc/passwd", "http://127.0.0.1:1/"])
def test_what_is_no_answer_must_be_said(cloud, tmp_path, address):
    full = f"{cloud[0]}{address}" if address.startswith("/") else address
    with pytest.raises(SourceFailed) as caught:
        find_credentials({"HOME": str(tmp_path), "AWS_CONTAINER_CREDENTIALS_FULL_URI": full})
    assert caught.value.code == "store-credentials-missing"


def test_without_any_a_backup_must_say_so_at_once(server, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = open_store(f"s3://{BUCKET}/x?endpoint={server[0]}")
    with pytest.raises(SourceFailed) as caught:
        backup([make_snapshot(tmp_path / "cache")], store)
    assert caught.value.code == "store-credentials-missing"


@pytest.mark.parametrize("text", [b"", b"<a>", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'])
def test_an_answer_that_is_no_plain_xml_must_be_refused(text):
    with pytest.raises(ValueError):
        parse_xml(text)
