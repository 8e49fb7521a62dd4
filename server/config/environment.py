"""Environment variables that override single fields of the configuration.

`TIERSERVE__SERVER__PORT=9000` overrides `server.port`: two underscores separate the parts, and
fields may be written in either case. A name that stands in the file, such as a model's, is found
whatever its case, with an underscore for each character that a variable can't have. Sections, lists
and mappings are given whole, as YAML or JSON.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from server.config.yaml_loader import EMPTY, Loader

PREFIX = "TIERSERVE__"
# Kubernetes sets some such as TIERSERVE_SERVER_PORT, but none with two underscores.
_is_near = re.compile(r"(?i)TIERSERVE_[^_]+(_[^_]+)*__").match


class _MistakeError(ValueError):
    """A variable can't be what it says."""


def apply_overrides(
    data: Mapping[str, Any], sections: type[BaseModel], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return `data` with what the environment says in place of it, and a line for each mistake.

    Args:
        data: the fields as a file gives them.
        sections: describes all fields.
        environment: of it, what begins with `PREFIX` counts.
    """
    changed, mistakes = dict(data), []
    # What is given whole comes before parts of it.
    for variable in sorted(environment, key=str.upper):
        if variable.upper().startswith(PREFIX):
            try:
                parts = variable[len(PREFIX) :].split("__")
                _put(changed, sections, parts, environment[variable])
            except _MistakeError as exc:
                mistakes.append(f"{variable}: {exc}")
        elif _is_near(variable):
            mistakes.append(f"{variable}: should be {PREFIX}{variable[len(PREFIX) - 1 :]}")
    return changed, mistakes


def _put(holder: dict[str, Any], of: Any, parts: list[str], text: str) -> None:
    """Set the field that `parts` lead to; `of` is the type of what `holder` holds."""
    part, *rest = parts
    name, kind, default = _field(holder, of, part)
    if not rest:
        holder[name] = _value(kind, text)
        return
    inner = next((each for each in choices(kind) if _has_parts(each)), None)
    if inner is None:
        raise _MistakeError(f"{name} has no parts, so {'__'.join(rest)} means nothing")
    held = holder.get(name, default)
    holder[name] = dict(held) if isinstance(held, Mapping) else {}
    _put(holder[name], inner, rest, text)


def _field(holder: Mapping[str, Any], of: Any, part: str) -> tuple[str, Any, Any]:
    """Return name, type and, of a mapping, the default of the field that `part` means."""
    if hasattr(of, "model_fields"):
        fields = of.model_fields
        if (name := part.lower()) not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0].upper()}?" if near else f"known are {', '.join(fields)}"
            raise _MistakeError(f"there is no {part}; {hint}")
        default = fields[name].get_default(call_default_factory=True)
        return name, fields[name].annotation, _as_given(default)
    _, kind = get_args(of)
    found = [name for name in holder if _folded(name) == _folded(part)]
    if len(found) == 1:
        return found[0], kind, None
    if found or hasattr(kind, "model_fields"):
        raise _MistakeError(
            f"{part} should be one of {', '.join(map(repr, holder))}; more are given with"
            " all others, as YAML or JSON, by the variable without it"
        )
    # vLLM's options are in lower case, its own variables as they are.
    return part.lower() if kind is Any else part, kind, None


def _value(kind: Any, text: str) -> Any:
    """Return what `text` says of a field of that type; what it says may still be wrong."""
    kinds = choices(kind)
    if text == "null" and (NoneType in kinds or Any in kinds):
        return None
    if not (Any in kinds or any(map(_is_whole, kinds))):
        return text
    try:
        value = yaml.load(text, Loader) if text.strip() else EMPTY  # noqa: S506
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        # Without the text itself, which may hold a secret.
        why = getattr(exc, "problem", None) or getattr(exc, "context", None) or type(exc).__name__
        raise _MistakeError(f"should be YAML or JSON: {why}") from None
    if Any not in kinds and not isinstance(value, dict | list):
        raise _MistakeError("should be YAML or JSON, of a section, a list or a mapping")
    return value


def choices(annotation: Any) -> list[Any]:
    """Return the types that a type admits."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for choice in get_args(annotation) for each in choices(choice)]
    return [annotation]


def _has_parts(kind: Any) -> bool:
    return hasattr(kind, "model_fields") or get_origin(kind) is dict


def _is_whole(kind: Any) -> bool:
    return _has_parts(kind) or get_origin(kind) in (list, tuple)


def _as_given(default: Any) -> Any:
    """Return the default of a mapping as a file would give it."""
    if isinstance(default, dict):
        return dict(_given(default))
    return None


def _given(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        yield name, value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", str(name).lower())
