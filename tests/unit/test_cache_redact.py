"""No secret may get into a message, whoever repeats it."""

import pytest

from zops.cache.redact import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://joe:pass-word@mirror.example/a failed", "GET https://***@mirror.example/a failed"),
        (
            "for url: https://cdn.example/x/y?Signature=abc&Expires=9 (HTTP 403)",
            "for url: https://cdn.example/x/y?*** (HTTP 403)",
        ),
        ("Authorization: Bearer abc.def-123 is not valid", "Authorization: Bearer *** is not valid"),
        ("token=hunter2-hunter2, status 401", "token=***, status 401"),
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz is no token", "*** is no token"),
        ("ms-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0 is no token", "*** is no token"),
        ("m_session_id=abcdef0123456789;", "m_session_id=***;"),
        ("modelscope http://127.0.0.1:8080/models: HTTP 503", "modelscope http://127.0.0.1:8080/models: HTTP 503"),
    ],
)
def test_what_looks_like_a_secret_must_be_hidden_and_the_rest_stay(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("variable", ["MODELSCOPE_API_TOKEN", "HF_TOKEN"])
def test_the_operators_own_token_must_be_hidden_in_any_shape(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "quite plain")
    assert redacted("refused: quite plain (401)") == "refused: *** (401)"
