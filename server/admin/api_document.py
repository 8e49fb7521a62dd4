"""The OpenAPI document of the admin API (`server.admin.handler`)."""

from collections.abc import Mapping
from typing import Any

from server.admin.export_format import ENCODING_NAMES
from server.admin.operations import MAX_PAGE
from server.auth.tenant import TENANT
from server.protocol.labels import A_TAG, KINDS, MAX_TAG_CHARACTERS
from server.web.openapi_parts import OBJECT, OPENAI_ERROR, TEXT, object_schema, openapi_document
from tiers.key import KEY_PATTERN
from tiers.purges.table import ALL, KEY, MAX_LABELS

_JSON, _JSONL = "application/json", "application/jsonl"
_NUMBER, _INTEGER = {"type": "number"}, {"type": "integer"}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_ROW = {
    "key": TEXT,
    "tiers": _list(TEXT),
    "bytes": _INTEGER,
    "age_s": _NUMBER,
    "ttl_s": _NUMBER,
    "state": TEXT,
    "frequency": _INTEGER,
    "labels": _list(TEXT),
}
_ENTRY = object_schema(
    **_ROW,
    stored_at=_NUMBER,
    expires_at=_NUMBER,
    kept_until=_NUMBER,
    took_s=_NUMBER,
    form={"enum": [*ENCODING_NAMES.values()]},
    content=TEXT,
)
_PAGE = object_schema(
    entries=_list(object_schema(**_ROW)),
    after={"type": ["string", "null"]},
)
_STATS = object_schema(tiers=_list(OBJECT))
_STATS["properties"]["prefix"] = OBJECT | {"description": "Where there is a prefix tier"}
_CHAINS = object_schema(
    chains=_list(
        object_schema(
            key=TEXT,
            blocks=_INTEGER,
            tokens=_INTEGER,
            bytes=_INTEGER,
            labels=_list(TEXT),
            priority=_NUMBER,
            ttl_s=_NUMBER,
        )
    )
)
_NAMES: Mapping[str, dict[str, Any]] = {
    KEY: {"pattern": f"^{KEY_PATTERN}$"},
    "model": {"minLength": 1},
    "tenant": {"pattern": f"^{TENANT}$"},
    "tag": {"minLength": 1, "maxLength": MAX_TAG_CHARACTERS, "description": A_TAG},
}


def _one_or_more(name: dict[str, Any]) -> dict[str, Any]:
    one = TEXT | name
    return {"anyOf": [one, _list(one) | {"minItems": 1, "maxItems": MAX_LABELS}]}


_PURGE = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
    "properties": {ALL: {"const": True}} | {kind: _one_or_more(_NAMES[kind]) for kind in KINDS},
}
_STATUSES = {
    "400": "The request is wrong; `param` names the field",
    "401": "The admin key is missing or wrong",
    "404": "No entry has this key",
    "408": "The body did not arrive in time",
    "409": "A running server can't do this, or there is no such tier",
    "413": "The body is larger than server.max_body_bytes",
    "503": "The disk, the prefix tier or the audit log is still opening, or can't be used",
}
_KEY = {"name": "key", "in": "path", "required": True, "schema": TEXT | {"minLength": 1}}
_QUERY = [
    {"name": name, "in": "query", "description": text, "schema": schema}
    for name, text, schema in (
        ("tier", "Only entries that this tier holds", TEXT),
        ("prefix", "Only keys that begin with this", TEXT),
        ("label", "Only entries with this label, such as `model:NAME`", TEXT),
        ("limit", "Entries per page", _INTEGER | {"minimum": 1, "maximum": MAX_PAGE}),
        ("after", "The `after` of the previous page", TEXT),
    )
]


def _operation(
    summary: str,
    answer: Mapping[str, Any] | None,
    *statuses: str,
    parameters: list[dict[str, Any]] | None = None,
    body: tuple[str, Mapping[str, Any]] | None = None,
    media_type: str = _JSON,
) -> dict[str, Any]:
    """Return an operation.

    Args:
        summary: one line.
        answer: the schema of its answer, or `None` where that has no body.
        statuses: of its errors, beside 401.
        parameters: of its query.
        body: media type and schema of the request's body.
        media_type: of the answer.
    """
    responses: dict[str, Any] = {"204": {"description": "Done"}}
    if answer is not None:
        responses = {"200": {"description": summary, "content": {media_type: {"schema": answer}}}}
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in ("401", *statuses):
        responses[status] = {"description": _STATUSES[status], "content": error}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters is not None:
        operation["parameters"] = parameters
    if body is not None:
        body_type, schema = body
        operation["requestBody"] = {"required": True, "content": {body_type: {"schema": schema}}}
    return operation


_PATHS = {
    "/stats": {
        "get": _operation("Counters and sizes of each tier, and of the prefix tier", _STATS)
    },
    "/entries": {
        "get": _operation(
            "A page of entries: nearest tier first, most requested first",
            _PAGE,
            *("400", "503"),
            parameters=_QUERY,
        )
    },
    "/entries/{key}": {
        "parameters": [_KEY],
        "get": _operation("An entry and its content", _ENTRY, "400", "404", "503"),
        "delete": _operation("Purge an entry", None, "400", "404", "503"),
    },
    "/chains": {
        "get": _operation(
            "The beginnings of prompts in the prefix tier: most requested first",
            _CHAINS,
            *("400", "409", "503"),
            parameters=[each for each in _QUERY if each["name"] in ("limit", "label")],
        )
    },
    "/purge": {
        "post": _operation(
            "Purge all entries with these labels, or all entries",
            object_schema(purged=_list(TEXT)),
            *("400", "408", "413", "503"),
            body=(_JSON, _PURGE),
        )
    },
    "/export": {"get": _operation("All entries, one per line", TEXT, "503", media_type=_JSONL)},
    "/import": {
        "post": _operation(
            "Store the entries of an export",
            OBJECT,
            *("400", "408", "503"),
            body=(_JSONL, TEXT),
        )
    },
    "/compact": {"post": _operation("Shrink the disk tier's file", OBJECT, "409", "503")},
    "/verify": {
        "post": _operation("Count damaged entries and blocks on disk", OBJECT, "409", "503")
    },
    "/overview": {"get": _operation("Which tiers answered in the last 24 hours", OBJECT)},
    "/prefixes": {
        "get": _operation(
            "The most frequent beginnings of prompts that reached an engine",
            object_schema(prefixes=_list(OBJECT)),
        )
    },
    "/config": {"get": _operation("The effective configuration, without secrets", OBJECT)},
    "/openapi.json": {"get": _operation("This document", OBJECT)},
}


def build_admin_document(version: str) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1); `version` is tierserve's."""
    return openapi_document(
        "tierserve, admin API",
        version,
        paths=_PATHS,
        components={
            "schemas": {"Error": OPENAI_ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        # The Unix socket needs no key.
        security=[{"bearer": []}, {}],
    )
