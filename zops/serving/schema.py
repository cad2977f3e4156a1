"""What requests look like in OpenAPI: the fields with the bounds of this server, as far as JSON Schema can tell them.

It cannot tell that a size fits the pixels and the memory, or how many tokens a prompt has: these are answered with 400.
Whatever fits the schema is never answered with 422.
"""

from typing import Any

from zops.serving.fields import MAX_PROMPT_CHARS, EditBody, GenerationBody
from zops.serving.request import Limits

_SIZE = "^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$"
_NOT_BLANK = r"\S"


def generation_schema(limits: Limits) -> dict[str, Any]:
    """Return the media types of the body of a generation."""
    return {"application/json": {"schema": _bounded(GenerationBody.model_json_schema(), limits)}}


def edit_schema(limits: Limits) -> dict[str, Any]:
    """Return the media types of the body of an edit."""
    schema = _bounded(EditBody.model_json_schema(), limits)
    schema["properties"]["image"] = {
        "type": "string",
        "format": "binary",
        "description": f"one PNG, JPEG or WebP of at most {limits.max_upload_bytes} bytes",
    }
    schema["required"] = ["image", "prompt"]
    for name, field in schema["properties"].items():
        # A form has no null: a field that is empty is left out.
        if "anyOf" in field:
            [kind] = [kind for kind in field.pop("anyOf") if kind != {"type": "null"}]
            del field["default"]
            schema["properties"][name] = field | kind
    return {"multipart/form-data": {"schema": schema}}


def stream_schema(prefix: str) -> dict[str, Any]:
    """Return the media type of a stream: each event by its name, with JSON as its data.

    Args:
        prefix: image_generation or image_edit.
    """
    text, number = {"type": "string"}, {"type": "integer"}
    names = [f"{prefix}.partial_image", f"{prefix}.completed"]
    common = {"b64_json": text, "image_index": number, "created_at": number, "size": text, "output_format": text}
    image = {
        "type": "object",
        "description": "a preview has partial_image_index and preview_size, a finished image has receipt and usage",
        "properties": {"type": {"enum": names}} | common,
        "required": ["type", *common],
    }
    data = {"anyOf": [image, {"$ref": "#/components/schemas/ErrorAnswer"}]}
    event = {
        "type": "object",
        "properties": {
            "event": {"enum": [*names, "error"]},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
        "required": ["event", "data"],
    }
    return {"text/event-stream": {"schema": event}}


def _bounded(schema: dict[str, Any], limits: Limits) -> dict[str, Any]:
    fields = schema["properties"]
    fields["prompt"] |= {"minLength": 1, "maxLength": MAX_PROMPT_CHARS, "pattern": _NOT_BLANK}
    for name, bound in limits.bounds().items():
        if name in fields:
            fields[name]["anyOf"][0] |= {"minimum": bound.least, "maximum": bound.most}
    fields["size"]["anyOf"][0]["pattern"] = _SIZE
    fields["model"]["anyOf"][0] = {"const": limits.model}
    return schema


def drop_foreign_errors(document: dict[str, Any]) -> None:
    """Take the framework's own 422 out of an OpenAPI document: no path of ours answers with it."""
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
