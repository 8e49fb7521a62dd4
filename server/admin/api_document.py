"""The OpenAPI document of the admin API (`server.admin.handler`)."""

from collections.abc import Mapping
from typing import Any

from server.admin.operations import MAX_PAGE
from server.auth.tenants import TENANT
from server.pages.openapi import ERROR
from server.protocol.labels import A_TAG, MAX_TAG_CHARACTERS
from tiers.key import KEY_PATTERN
from tiers.purges.table import ALL, KEY, KINDS, MAX_LABELS


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_JSON, _LINES = "application/json", "application/jsonl"
_TEXT, _NUMBER, _WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_TEXTS = _list(_TEXT)
_ANY = {"type": "object"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*properties], "properties": properties}


def _one_or_more(name: dict[str, Any]) -> dict[str, Any]:
    one = _TEXT | name
    return {"anyOf": [one, _list(one) | {"minItems": 1, "maxItems": MAX_LABELS}]}


_ROW = {
    "key": _TEXT,
    "tiers": _TEXTS,
    "bytes": _WHOLE,
    "age_s": _NUMBER,
    "ttl_s": _NUMBER,
    "state": _TEXT,
    "frequency": _WHOLE,
    "labels": _TEXTS,
}
_ENTRY = _object(
    **_ROW,
    stored_at=_NUMBER,
    expires_at=_NUMBER,
    kept_until=_NUMBER,
    took_s=_NUMBER,
    form={"enum": ["body", "events"]},
    content=_TEXT,
)
_NAMES: Mapping[str, dict[str, Any]] = {
    KEY: {"pattern": f"^{KEY_PATTERN}$"},
    "model": {"minLength": 1},
    "tenant": {"pattern": f"^{TENANT}$"},
    "tag": {"minLength": 1, "maxLength": MAX_TAG_CHARACTERS, "description": A_TAG},
}
_PURGE = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
    "properties": {ALL: {"const": True}} | {kind: _one_or_more(_NAMES[kind]) for kind in KINDS},
}
_REFUSALS = {
    "400": "The request is wrong; `param` names the field",
    "404": "There is no entry under this key",
    "408": "The body did not come in time",
    "409": "It can't be done while a server runs, or without a disk tier",
    "413": "The body is larger than server.max_body_bytes",
    "503": "The disk tier is being opened, or can't be written; try again",
}
_KEY = {"name": "key", "in": "path", "required": True, "schema": _TEXT | {"minLength": 1}}
_QUERY = {
    "tier": ("Only entries that this tier holds", _TEXT),
    "prefix": ("Only keys that begin with this", _TEXT),
    "label": ("Only entries with this label, such as `model:NAME`", _TEXT),
    "limit": ("Entries of a page", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
    "after": ("As the page before gave it", _TEXT),
}
_PARAMETERS = [
    {"name": name, "in": "query", "description": text, "schema": schema}
    for name, (text, schema) in _QUERY.items()
]


def document(version: str) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1); `version` is ours."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tierserve, admin API",
            "version": version,
            "license": {"name": "Apache-2.0"},
        },
        "paths": {
            "/stats": {"get": _does("What the tiers hold and did", _object(tiers=_list(_ANY)))},
            "/entries": {
                "get": _does(
                    "A page of entries, nearest tier and hottest first",
                    _object(entries=_list(_object(**_ROW)), after={"type": ["string", "null"]}),
                    "400",
                    "503",
                    parameters=_PARAMETERS,
                )
            },
            "/entries/{key}": {
                "parameters": [_KEY],
                "get": _does("An entry and its content", _ENTRY, "400", "404"),
                "delete": _does("Purge it", None, "400", "404", "503"),
            },
            "/purge": {
                "post": _does(
                    "Purge all entries with a label, or all",
                    _object(purged=_TEXTS),
                    *("400", "408", "413", "503"),
                    body=(_JSON, _PURGE),
                )
            },
            "/export": {
                "get": _does("All entries, a line each", _TEXT, "503", media_type=_LINES),
            },
            "/import": {
                "post": _does(
                    "Store the entries of an export",
                    _ANY,
                    *("400", "408", "503"),
                    body=(_LINES, _TEXT),
                )
            },
            "/compact": {"post": _does("Make the disk tier's file smaller", _ANY, "409")},
            "/verify": {"post": _does("Look for damaged entries on disk", _ANY, "409", "503")},
            "/overview": {"get": _does("Who answered in the last day", _ANY)},
            "/prefixes": {
                "get": _does(
                    "The beginnings of prompts that engines are asked for most",
                    _object(prefixes=_list(_ANY)),
                )
            },
            "/config": {"get": _does("The effective configuration, without secrets", _ANY)},
            "/openapi.json": {"get": _does("This document", _ANY)},
        },
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        # The Unix socket asks for no key.
        "security": [{"bearer": []}, {}],
    }


def _does(
    summary: str,
    told: Mapping[str, Any] | None,
    *refusals: str,
    parameters: list[dict[str, Any]] | None = None,
    body: tuple[str, Mapping[str, Any]] | None = None,
    media_type: str = _JSON,
) -> dict[str, Any]:
    """Return an operation, whose answer is `told`, or is none."""
    done: dict[str, Any] = {"204": {"description": "It is done"}}
    if told is not None:
        done = {"200": {"description": summary, "content": {media_type: {"schema": told}}}}
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {status: {"description": _REFUSALS[status], "content": error} for status in refusals}
    unknown = {"401": {"description": "It takes the admin key", "content": error}}
    made: dict[str, Any] = {"summary": summary, "responses": done | unknown | refused}
    if parameters is not None:
        made["parameters"] = parameters
    if body is not None:
        media, schema = body
        made["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
    return made
