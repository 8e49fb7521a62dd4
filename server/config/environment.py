"""Environment variables that override single fields of the configuration.

`TIERSERVE__SERVER__PORT=9000` overrides `server.port`: two underscores separate the parts of a
path, in which case doesn't matter. A name from the file, such as a model's, is found with an
underscore in place of each character that a variable can't have. Sections, lists and mappings are
given whole, as YAML or JSON.

pydantic-settings isn't used, since it can't match such names, lowers the case of vLLM's variables,
ignores variables that it doesn't know, and reads JSON only.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from server.config.yaml_loader import EMPTY, Loader

PREFIX = "TIERSERVE__"
# Kubernetes sets variables such as TIERSERVE_SERVER_PORT, but none with two underscores.
_is_near = re.compile(r"(?i)TIERSERVE_[^_]+(_[^_]+)*__").match


class _OverrideError(ValueError):
    """A variable names no field, or its value can't be read."""


def apply_overrides(
    data: Mapping[str, Any], sections: type[BaseModel], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return `data` with the environment's overrides, and a line for each mistake in them.

    Args:
        data: the fields that a file gives.
        sections: the class that describes all fields.
        environment: of its variables, those that begin with `PREFIX` count.
    """
    changed, mistakes = dict(data), []
    # Sorted, so that a section that is given whole precedes its fields.
    for variable in sorted(environment, key=str.upper):
        if variable.upper().startswith(PREFIX):
            parts = variable[len(PREFIX) :].split("__")
            try:
                _override(changed, sections, parts, environment[variable])
            except _OverrideError as exc:
                mistakes.append(f"{variable}: {exc}")
        elif _is_near(variable):
            mistakes.append(f"{variable}: should be {PREFIX}{variable[len(PREFIX) - 1 :]}")
    return changed, mistakes


def _override(holder: dict[str, Any], kind: Any, parts: list[str], text: str) -> None:
    """Set the field at the path `parts` in `holder`, which is of the type `kind`."""
    part, *rest = parts
    find = _field_of_section if _is_section(kind) else _item_of_mapping
    name, field_kind, default = find(holder, kind, part)
    if not rest:
        holder[name] = _parse(field_kind, text)
        return
    inner = next((each for each in choices(field_kind) if _has_parts(each)), None)
    if inner is None:
        raise _OverrideError(f"{name} has no parts, so {'__'.join(rest)} means nothing")
    held = holder.get(name, default)
    holder[name] = dict(held) if isinstance(held, Mapping) else {}
    _override(holder[name], inner, rest, text)


def _field_of_section(_: Any, section: type[BaseModel], part: str) -> tuple[str, Any, Any]:
    """Return name, type and default of the field that `part` means."""
    fields = section.model_fields
    if (name := part.lower()) not in fields:
        raise _OverrideError(f"there is no {part}; {hint(name, fields, str.upper)}")
    default = fields[name].get_default(call_default_factory=True)
    if isinstance(default, dict):
        # As a file would give it.
        default = {
            key: each.model_dump(exclude_unset=True) if isinstance(each, BaseModel) else each
            for key, each in default.items()
        }
    return name, fields[name].annotation, default


def _item_of_mapping(holder: Mapping[str, Any], mapping: Any, part: str) -> tuple[str, Any, None]:
    """Return name and type of the item that `part` means, which may be a new one."""
    _, kind = get_args(mapping)
    found = [name for name in holder if _folded(name) == _folded(part)]
    if len(found) == 1:
        return found[0], kind, None
    if found or _is_section(kind):
        raise _OverrideError(
            f"{part} should be one of {', '.join(map(repr, holder))}; more are given with"
            " all others, as YAML or JSON, by the variable without it"
        )
    # vLLM's options are in lower case; its variables keep theirs.
    return part.lower() if kind is Any else part, kind, None


def _parse(kind: Any, text: str) -> Any:
    """Return the value that `text` gives a field of the type `kind`; it may still be invalid."""
    kinds = choices(kind)
    if text == "null" and (NoneType in kinds or Any in kinds):
        return None
    if not any(each is Any or _is_container(each) for each in kinds):
        return text
    try:
        value = yaml.load(text, Loader) if text.strip() else EMPTY  # noqa: S506
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        # Without the text itself, which may hold a secret.
        why = getattr(exc, "problem", None) or getattr(exc, "context", None) or type(exc).__name__
        raise _OverrideError(f"should be YAML or JSON: {why}") from None
    if Any not in kinds and not isinstance(value, dict | list):
        raise _OverrideError("should be YAML or JSON, of a section, a list or a mapping")
    return value


def choices(annotation: Any) -> list[Any]:
    """Return the types that a type admits."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for choice in get_args(annotation) for each in choices(choice)]
    return [annotation]


def hint(name: str, known: Collection[str], shown: Callable[[str], str] = str) -> str:
    """Return a hint for an unknown `name`: the known name that is similar, or else all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {shown(near[0])}?" if near else f"known are {', '.join(known)}"


def _is_section(kind: Any) -> bool:
    return hasattr(kind, "model_fields")


def _has_parts(kind: Any) -> bool:
    return _is_section(kind) or get_origin(kind) is dict


def _is_container(kind: Any) -> bool:
    return _has_parts(kind) or get_origin(kind) in (list, tuple)


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", str(name).lower())
