"""Secrets out of what people and logs get to see: hubs repeat URLs in their errors, and some URLs carry tokens."""

import os
import re

HIDDEN = "***"
# Where the SDKs find a token in the environment.
TOKEN_VARIABLES = ("MODELSCOPE_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
# Storage behind the hubs is reached by links that are signed in their query.
_QUERY = re.compile(r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]+")
# The hubs' own tokens by their shape, and whatever is given as a credential.
_SHAPED = re.compile(r"\b(?:hf_|ms-)[A-Za-z0-9-]{16,}")
_NAMED = re.compile(r"(?i)\b(bearer\s+|(?:token|signature|password|api_key|m_session_id)=)[^\s&'\",;]+")


def redacted(text: str) -> str:
    """Return a text without the user and query of URLs, without tokens that look like one, and without ours."""
    for variable in TOKEN_VARIABLES:
        secret = os.environ.get(variable, "")
        if len(secret) > 3:
            text = text.replace(secret, HIDDEN)
    text = _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    return _NAMED.sub(rf"\1{HIDDEN}", _SHAPED.sub(HIDDEN, text))
