"""The reference of the configuration: all fields as commented YAML, and as a JSON Schema.

Both come from the sections' classes and the texts below their fields. In the YAML, prose begins
with `# `; a line that begins with `#` alone is an example of a field that has no value by default.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from server.config.base import CENTURY_S, RELOAD_MARK
from server.config.schema import Config

_HEAD = """\
# Every field with its default value, as `tierserve config` prints it. This is a configuration; a
# field without a value is commented out, and shows an example. Sizes may be written 256MiB.
# Relative paths begin at the configuration's folder. The environment can override each field:
# TIERSERVE__SERVER__PORT=9000. A running server takes over fields with [reload] once the file has
# changed, or at SIGHUP; all others change at its next start.
"""
_COLUMNS = 86
_UNITS = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "": 1}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration, for editors."""
    schema = Config.model_json_schema()
    for section in schema["$defs"].values():
        for field in section.get("properties", {}).values():
            if (minimum := field.pop("ge", None)) is not None:
                # Pydantic leaves the least size beside the two types that a size may have.
                field["anyOf"][1]["minimum"] = minimum
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def reference() -> str:
    """Return all fields with their default values, as commented YAML."""
    schema = json_schema()
    properties = _inlined(schema["properties"], schema["$defs"])
    text, defaults = _HEAD, Config().model_dump(mode="json")
    for name, field in properties.items():
        section = {"properties": {name: field}}
        text += "\n" + "".join(f"{line}\n" for line in _fields(section, defaults))
    return text


def _inlined(node: Any, defs: Mapping[str, Any]) -> Any:
    """Return a schema with definitions in place of references to them."""
    if isinstance(node, list):
        return [_inlined(each, defs) for each in node]
    if not isinstance(node, dict):
        return node
    definition = defs[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    return {
        name: _inlined(each, defs) for name, each in (definition | node).items() if name[0] != "$"
    }


def _fields(section: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a section whose fields have these values, or else their defaults."""
    for name, field in section["properties"].items():
        kinds = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
        yield from _comment(name, field, kinds)
        value = values.get(name, field.get("default"))
        if name in section.get("required", ()):
            yield from _entry(name, _example(field, kinds[0]))
        elif value in (None, [], {}):
            yield from (f"#{line}" for line in _entry(name, _example(field, kinds[0])))
        else:
            yield from _entry(name, _value(name, value, kinds[0]))


def _comment(name: str, field: Mapping[str, Any], kinds: Iterable[Mapping[str, Any]]) -> list[str]:
    ranges = [_range(name, kind) for kind in kinds]
    texts = [field.get("description", ""), *(kind.get("description", "") for kind in kinds)]
    words = [*next(filter(None, texts)).split(), *filter(None, ranges)]
    if RELOAD_MARK in field:
        words.append("[reload]")
    lines = textwrap.wrap(" ".join(words), _COLUMNS, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def _range(name: str, kind: Mapping[str, Any]) -> str:
    """Return which values a field may have, as far as that is a choice or a range."""
    if "enum" in kind:
        return f"One of {', '.join(kind['enum'])}."
    least, above, most = (kind.get(each) for each in ("minimum", "exclusiveMinimum", "maximum"))
    if most is not None and most < CENTURY_S:
        return f"({least:n} to {most:n})"
    if above is not None:
        return f"(more than {above:n})"
    return f"(at least {_inline(least, name)})" if least else ""


def _example(field: Mapping[str, Any], kind: Mapping[str, Any]) -> str | list[str]:
    if "properties" in kind:
        return [*_fields(kind, {})]
    if "properties" in kind.get("items", ()):
        return _entry("-", [*_fields(kind["items"], {})])
    return _inline(field["examples"][0])


def _value(name: str, value: Any, kind: Mapping[str, Any]) -> str | list[str]:
    if "properties" in kind:
        return [*_fields(kind, value)]
    if isinstance(value, dict):
        item = kind["additionalProperties"]
        return [line for each in value for line in _entry(each, [*_fields(item, value[each])])]
    return _inline(value, name)


def _entry(name: str, value: str | Iterable[str]) -> list[str]:
    if isinstance(value, str):
        return [f"{name}: {value}"]
    return ["-" if name == "-" else f"{name}:", *(f"  {line}" for line in value)]


def _inline(value: Any, name: str = "") -> str:
    """Return a value as YAML in one line, that of a field `..._bytes` with its unit."""
    if name.endswith("_bytes"):
        unit, size = next((u, s) for u, s in _UNITS.items() if value % s == 0)
        return f"{value // size}{unit}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()
