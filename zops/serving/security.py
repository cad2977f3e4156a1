"""What OpenAPI says of the gate, of jobs and of repeated requests: they are in front of the paths, not in them."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from zops.serving.errors import ERROR_CODES
from zops.serving.gate import IMAGE_PATHS, is_guarded
from zops.serving.schema import drop_foreign_errors

_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
_JOB = {"application/json": {"schema": {"$ref": "#/components/schemas/JobAnswer"}}}
_PREFER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "respond-async: answer with a job",
    "schema": {"type": "string"},
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "the same key and request again get the same answer, made once; streams are made again",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
}


def describe_access(app: FastAPI, *, keyed: bool) -> None:
    """Complete an application's OpenAPI by what happens in front of its paths.

    Args:
        app: an application with all its paths.
        keyed: whether the gate wants API keys.
    """
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(make(), keyed=keyed)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # the documented way to change it


def _completed(schema: dict[str, Any], *, keyed: bool) -> dict[str, Any]:
    scheme = {"type": "http", "scheme": "bearer", "description": "a key made with zops key new, where keys are wanted"}
    drop_foreign_errors(schema)
    schema.setdefault("components", {})["securitySchemes"] = {"ApiKey": scheme}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            statuses = [431]
            if is_guarded(path):
                statuses.append(401)
                if keyed:
                    operation["security"] = [{"ApiKey": []}]
            if path in IMAGE_PATHS and method == "post":
                statuses += [400, 409, 429]
                operation.setdefault("parameters", []).extend([_PREFER, _IDEMPOTENCY_KEY])
                operation["responses"]["202"] = {"description": "a job, for Prefer: respond-async", "content": _JOB}
            for status in statuses:
                operation["responses"].setdefault(str(status), _refusal(status))
    return schema


def _refusal(status: int) -> dict[str, Any]:
    codes = [code for code, kind in ERROR_CODES.items() if kind.status == status]
    return {"description": ", ".join(codes), "content": _ERROR}
