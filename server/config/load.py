"""Reads the configuration: the file, what the environment overrides, and every mistake in both."""

import difflib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import orjson
import yaml
from pydantic import (
    ValidationError,
)  # fmt: skip

from server.config.base import (
    CONFLICT,
    MASK,
    ConfigError,
    Section,
    expected,
)  # fmt: skip
from server.config.environment import apply_overrides, choices
from server.config.folders import _SOCKET_PATH_BYTES, cache_folder, is_socket_path
from server.config.models import clashes
from server.config.schema import Config
from server.config.shared_url import mask_url
from server.config.yaml_loader import EMPTY, Loader

# As they end: `api_key`, `hfToken`, `Authorization`.
_names_secret = re.compile(
    r"(?i)(key|token|password|passwd|passphrase|secret|credential|authorization|cookie)s?$"
).search


# As a header has them.
_holds_credentials = re.compile(r"(?i)\b(authorization|cookie|x-api-key)\s*[:=]|\bbearer\s").search


# What an engine is given may be anything.
_IN_ENGINE = frozenset({"args", "engine", "env", "vllm"})


class LoadResult(NamedTuple):
    """A configuration as it was given."""

    config: Config
    """What is right of it."""
    mistakes: list[str]
    invalid_paths: list[str]
    """The paths of what is wrong, and so isn't in `config`."""


def load(file: Path) -> Config:
    """Read the configuration.

    Raises:
        ConfigError: the file can't be read, or fields are wrong; it names every one of them.
    """
    given = load_partially(file)
    if given.mistakes:
        raise ConfigError(given.mistakes)
    return given.config


def load_partially(file: Path) -> LoadResult:
    """Read the configuration, as far as it is right.

    Raises:
        ConfigError: the file can't be read.
    """
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506
    except OSError as exc:
        raise ConfigError([f"{file}: should be a file to read: {exc.strerror}"]) from exc
    except yaml.MarkedYAMLError as exc:
        # Without the line itself, which may hold a secret.
        mark = exc.problem_mark or exc.context_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ConfigError(
            [f"{file}: can't be read as YAML: {exc.problem or exc.context}{where}"]
        ) from None
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise ConfigError([f"{file}: can't be read as YAML: {exc}"]) from exc
    if data is None or data is EMPTY:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError([f"{file}: should hold sections: {', '.join(Config.model_fields)}"])
    data, mistakes = apply_overrides(data, Config, os.environ)
    config, wrong, left_out = _right_of(data)
    config = _with_paths(config, _folder_of(file))
    mistakes += wrong + clashes(config.models)
    if (socket := config.admin.socket) is not None and not is_socket_path(socket):
        should = f"should have at most {_SOCKET_PATH_BYTES} bytes, as any socket"
        mistakes.append(f"admin.socket: {should}, not {str(socket)!r}")
        left_out.append("admin.socket")
    return LoadResult(config, mistakes, left_out)


def _folder_of(file: Path) -> Path:
    """Return the folder of a file, following links to files but not those to folders.

    Files in the folder may be read again: when a ConfigMap or a Secret changes, Kubernetes lets
    such a link lead to another folder, and removes the one before.
    """
    file = file.absolute()
    while file.is_symlink():
        file = file.parent / file.readlink()
    return file.parent


def _right_of(data: dict[str, Any]) -> LoadResult:
    """Leave out what is wrong until the rest is right, so that all of it is found."""
    mistakes: list[str] = []
    left_out: set[tuple[Any, ...]] = set()
    while True:
        try:
            config = Config(**data)
        except ValidationError as exc:
            before = set(left_out)
            for error in exc.errors():
                path = tuple(part for part in error["loc"] if part != "[key]")
                # What was left out may be all that is missing.
                is_of_rest = not any(each[: len(path)] == path for each in before)
                if is_of_rest or error["type"] == CONFLICT:
                    mistakes.append(_explain(error))
                if not any(path[: len(each)] == each for each in left_out - before):
                    data, at = _without(data, path)
                    left_out.add(at)
        else:
            return LoadResult(config, mistakes, [".".join(map(str, path)) for path in left_out])


def _without(data: dict[str, Any], path: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Return `data` without what stands at `path`, or else nearest above it; and where that was."""
    first, *rest = path
    held = data[first]
    if rest and isinstance(held, dict) and rest[0] in held:
        changed, at = _without(held, rest)
        return data | {first: changed}, (first, *at)
    return {name: value for name, value in data.items() if name != first}, (first,)


def _with_paths(config: Config, folder: Path) -> Config:
    """Return the configuration with the paths as they take effect, relative ones from `folder`.

    Those that would be in the cache folder aren't set where there is none.
    """
    admin, tiers, log = config.admin, config.tiers, config.log
    server, tenants = config.server, config.tenants
    caches = cache_folder()
    if "socket" not in admin.model_fields_set and caches is not None:
        socket = caches / f"admin-{config.server.port}.sock"
        admin = admin.model_copy(update={"socket": socket})
    if admin.socket is not None:
        admin = admin.model_copy(update={"socket": folder / admin.socket})
    if (disk := tiers.disk) is not None:
        path = disk.path or (caches and caches / "disk")
        key_file = disk.encryption_key_file and folder / disk.encryption_key_file
        paths = {"path": path and folder / path, "encryption_key_file": key_file}
        tiers = tiers.model_copy(update={"disk": disk.model_copy(update=paths)})
    if log.trace is not None:
        log = log.model_copy(update={"trace": folder / log.trace})
    if tenants.file is not None:
        tenants = tenants.model_copy(update={"file": folder / tenants.file})
    if (tls := server.tls) is not None:
        files = {name: folder / path for name, path in tls}
        server = server.model_copy(update={"tls": tls.model_copy(update=files)})
    changed = {"server": server, "tenants": tenants, "tiers": tiers, "admin": admin, "log": log}
    return config.model_copy(update=changed)


def _explain(error: Any) -> str:
    """Say where the mistake is, what is wrong, and what would be right."""
    *parents, last = error["loc"] or ("configuration",)
    path = ".".join(str(part) for part in (*parents, last) if part != "[key]")
    if error["type"] == "extra_forbidden":
        fields = _fields(parents)
        near = difflib.get_close_matches(str(last), fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
        return f"{path}: unknown key; {hint}"
    given = mask_url(error["input"]) if isinstance(error["input"], str) else error["input"]
    is_secret = _names_secret(str(last)) or (_IN_ENGINE & {*parents[2:], last})
    is_shown = isinstance(given, str | int | float | bool) and not is_secret
    shown = f", not {given!r}" if is_shown else ""
    if error["type"] == "model_type":
        return f"{path}: should hold keys of {', '.join(_fields(error['loc']))}{shown}"
    return f"{path}: {expected(error)}{shown}"


def redact(value: Any, name: str = "") -> Any:
    """Return what may be pasted into an issue, of the value of a field."""
    if isinstance(value, dict):
        is_secret = _names_secret(name)
        return {n: redact(each, name if is_secret else n) for n, each in value.items()}
    if isinstance(value, list):
        return [redact(each, name) for each in value]
    if isinstance(value, bool | None):
        return value
    # Unlike `max_tokens`, which is a number.
    if _names_secret(name) and (isinstance(value, str) or not name.endswith("s")):
        return MASK
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        # vLLM takes options as JSON, too.
        with suppress(ValueError):
            return orjson.dumps(redact(orjson.loads(value), name)).decode()
    if _holds_credentials(value):
        return MASK
    return mask_url(value) if "://" in value else value


def _fields(path: list[Any]) -> list[str]:
    """Return the keys of the section at `path`."""
    kinds: list[Any] = [Config]
    for part in path:
        within = [
            each.model_fields[part].annotation if _is_section(each) else _item(each)
            for each in kinds
            if _is_section(each) or get_origin(each) in (dict, tuple)
        ]
        kinds = [choice for annotation in within for choice in choices(annotation)]
    return sorted(next(filter(_is_section, kinds)).model_fields)


def _item(kind: Any) -> Any:
    """Return the type of what a list or a mapping holds."""
    first, second = get_args(kind)
    return second if get_origin(kind) is dict else first


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
