"""What our OpenAPI documents have in common: their head, and the JSON Schemas of errors."""

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object"}


def object_schema(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that requires all these properties."""
    return {"type": "object", "required": [*properties], "properties": properties}


OPENAI_ERROR = {
    "description": "An error in OpenAI's shape",
    **object_schema(
        error=object_schema(
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["integer", "string"]},
        )
    ),
}
ANTHROPIC_ERROR = {
    "description": "An error in Anthropic's shape",
    **object_schema(type={"const": "error"}, error=object_schema(type=TEXT, message=TEXT)),
}
FASTAPI_ERROR = {
    "description": "An error of the engine's framework: an unknown path or method, or a bad body",
    **object_schema(detail={}),
}


def openapi_document(title: str, version: str, **parts: Any) -> dict[str, Any]:
    """Return an OpenAPI 3.1 document; `version` is tierserve's."""
    info = {"title": title, "version": version, "license": {"name": "Apache-2.0"}}
    return {"openapi": "3.1.0", "info": info, **parts}
