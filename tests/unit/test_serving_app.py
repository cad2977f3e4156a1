"""The application without a socket: what no client can bring about on purpose."""

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest

from tests.support.studio import ScriptedScheduler
from zops.serving import body as body_module
from zops.serving import studio as studio_module
from zops.serving.access import AccessLog, set_up_log
from zops.serving.app import Identity, create_app
from zops.serving.metrics import Metrics
from zops.serving.request import Limits
from zops.spec import Spec


@pytest.fixture
def log():
    """Where the server's log goes; loggers are the process's own, so they are put back."""
    loggers = [logging.getLogger(name) for name in ("zops.serving", "uvicorn")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield io.StringIO()
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def serving(log):
    metrics = Metrics(model="m/m", revision="r", manifest_digest="d")
    limits = Limits.of(Spec())
    app = create_app(ScriptedScheduler(facts=None), limits, Identity("m/m", "r", "d", Path("/")), metrics)
    return AccessLog(app, set_up_log(as_json=True, stream=log))


def call(app, method, path, *messages):
    """Drive the application as an HTTP server would; return status, headers, body, and what it raised."""
    inbox = list(messages) or [{"type": "http.request", "body": b"", "more_body": False}]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "root_path": "",
    }
    sent, raised = [], []

    async def receive():
        return inbox.pop(0) if inbox else await asyncio.Future()

    async def send(message):
        sent.append(message)

    async def drive():
        try:
            await app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - what an HTTP server would log
            raised.append(error)

    asyncio.run(drive())
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body), raised


def test_a_bug_must_give_the_envelope_and_keep_its_traceback(serving, monkeypatch):
    def broken(*_args):
        raise KeyError("sesame")

    monkeypatch.setattr(studio_module, "parse", broken)
    status, headers, body, raised = call(serving, "POST", "/v1/images/generations")
    assert (status, body["error"]["code"], body["error"]["type"]) == (500, "internal_error", "server_error")
    assert "sesame" not in json.dumps(body)
    assert headers[b"x-request-id"].startswith(b"req_")
    assert isinstance(raised[0], KeyError)


def test_a_body_that_does_not_arrive_must_be_given_up(serving, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.05)
    start = {"type": "http.request", "body": b"{", "more_body": True}
    status, _, body, _ = call(serving, "POST", "/v1/images/generations", start)
    assert (status, body["error"]["code"]) == (408, "body_too_slow")


def test_a_probe_must_be_logged_only_when_its_answer_changes(serving, log):
    assert call(serving, "GET", "/livez")[0] == 200
    assert log.getvalue() == ""
    status, headers, body, _ = call(serving, "GET", "/readyz")
    assert (status, body["status"], body["phase"]) == (503, "unready", "starting")
    assert int(headers[b"retry-after"]) > 0
    line = json.loads(log.getvalue())
    assert (line["path"], line["status"]) == ("/readyz", 503)
    call(serving, "GET", "/readyz")
    assert len(log.getvalue().splitlines()) == 1


def test_a_hostile_path_must_stay_on_one_log_line(serving, log):
    call(serving, "GET", "/\n\x1b[31mforged\r")
    assert len(log.getvalue().splitlines()) == 1
    assert "\x1b" not in log.getvalue()
