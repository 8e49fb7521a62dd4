"""Reads the configuration: the file, the environment's overrides, and every mistake in both."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import orjson
import yaml
from pydantic import ValidationError

from server.config.base import CONFLICT, MASK, ConfigError, expected
from server.config.environment import apply_overrides, choices, hint
from server.config.folders import SOCKET_PATH_BYTES, cache_folder, is_socket_path
from server.config.models import clashes, misplaced_fallbacks
from server.config.prefix_tier import excluded_options
from server.config.schema import Config
from server.config.shared_url import mask_url
from server.config.yaml_loader import EMPTY, Loader

# By the end of a name: `api_key`, `hfToken`, `Authorization`.
_names_secret = re.compile(
    r"(?i)(key|token|password|passwd|passphrase|secret|credential|authorization|cookie)s?$"
).search
# As headers hold them.
_holds_credentials = re.compile(r"(?i)\b(authorization|cookie|x-api-key)\s*[:=]|\bbearer\s").search
# Values below these fields may be secrets, whatever their names.
_IN_ENGINE = frozenset({"args", "engine", "env", "vllm"})


class LoadResult(NamedTuple):
    """A configuration without its mistakes."""

    config: Config
    """The valid fields; those with mistakes have their defaults."""
    mistakes: list[str]
    """A line for each mistake."""
    invalid_paths: list[str]
    """The paths of the fields with mistakes, such as `server.port`."""


def load(file: Path, *, may_be_empty: bool = True) -> Config:
    """Read the configuration; an empty file stands for all defaults, unless it may not be empty.

    Raises:
        ConfigError: the file can't be read, or has mistakes; the error names all of them.
    """
    result = load_partially(file, may_be_empty=may_be_empty)
    if result.mistakes:
        raise ConfigError(result.mistakes)
    return result.config


def load_partially(file: Path, *, may_be_empty: bool = True) -> LoadResult:
    """Read the configuration as `load` does, and leave out what is wrong.

    Raises:
        ConfigError: the file can't be read.
    """
    data, mistakes = apply_overrides(_read(file, may_be_empty=may_be_empty), Config, os.environ)
    result = _validate(data)
    config = _with_paths(result.config, _folder_of(file))
    mistakes += result.mistakes + clashes(config.models) + misplaced_fallbacks(config.models)
    if config.tiers.prefix is not None:
        mistakes += excluded_options(config.models, os.environ)
    invalid_paths = result.invalid_paths
    if (socket := config.admin.socket) is not None and not is_socket_path(socket):
        should = f"should have at most {SOCKET_PATH_BYTES} bytes, as any socket"
        mistakes.append(f"admin.socket: {should}, not {str(socket)!r}")
        invalid_paths.append("admin.socket")
    return LoadResult(config, mistakes, invalid_paths)


def _read(file: Path, *, may_be_empty: bool) -> dict[str, Any]:
    """Return the fields of a file.

    Raises:
        ConfigError: the file can't be read, or is empty and may not be.
    """
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506
    except OSError as exc:
        raise ConfigError([f"{file}: should be a readable file: {exc.strerror}"]) from exc
    except yaml.MarkedYAMLError as exc:
        # Without the line itself, which may hold a secret.
        mark = exc.problem_mark or exc.context_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        problem = f"{exc.problem or exc.context}{where}"
        raise ConfigError([f"{file}: can't be read as YAML: {problem}"]) from None
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise ConfigError([f"{file}: can't be read as YAML: {exc}"]) from exc
    if data is None or data is EMPTY:
        if not may_be_empty:
            raise ConfigError([f"{file}: should not be empty"])
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError([f"{file}: should hold sections: {', '.join(Config.model_fields)}"])
    return data


def _folder_of(file: Path) -> Path:
    """Return the folder of a file; links to files are followed, and links to folders kept.

    Kubernetes updates a ConfigMap or a Secret by letting a link lead to another folder, and
    removes the old one; files in the folder may be read again later.
    """
    file = file.absolute()
    while file.is_symlink():
        file = file.parent / file.readlink()
    return file.parent


def _validate(data: dict[str, Any]) -> LoadResult:
    """Remove wrong fields until the rest is valid.

    One pass of pydantic doesn't do: it checks a section's own rules only once all of the section's
    fields are valid, and returns nothing of a configuration with mistakes.
    """
    mistakes: list[str] = []
    removed: list[Sequence[Any]] = []
    while True:
        try:
            config = Config(**data)
        except ValidationError as exc:
            before = len(removed)
            for error in exc.errors():
                path = [part for part in error["loc"] if part != "[key]"]
                # A mistake above a removed field, such as a missing one, only follows from it.
                follows = any(each[: len(path)] == path for each in removed[:before])
                if not follows or error["type"] == CONFLICT:
                    mistakes.append(_explain(error, path))
                if not any(path[: len(each)] == each for each in removed[before:]):
                    data, length = _without(data, path)
                    removed.append(path[:length])
        else:
            return LoadResult(config, mistakes, [".".join(map(str, each)) for each in removed])


def _without(data: dict[str, Any], path: Sequence[Any]) -> tuple[dict[str, Any], int]:
    """Return `data` without the key at `path`, or else the nearest above; and its path's length."""
    first, *rest = path
    held = data[first]
    if rest and isinstance(held, dict) and rest[0] in held:
        changed, length = _without(held, rest)
        return data | {first: changed}, length + 1
    return {name: value for name, value in data.items() if name != first}, 1


def _with_paths(config: Config, folder: Path) -> Config:
    """Return the configuration with absolute paths, those relative to `folder` and by default.

    Paths that would be in the cache folder stay `None` where there is no such folder.
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
    if (prefix := tiers.prefix) is not None:
        path = prefix.path or (caches and caches / "prefix")
        prefix = prefix.model_copy(update={"path": path and folder / path})
        tiers = tiers.model_copy(update={"prefix": prefix})
    if log.trace is not None:
        log = log.model_copy(update={"trace": folder / log.trace})
    if (audit := log.audit) is not None:
        key_file = audit.key_file and folder / audit.key_file
        paths = {"file": folder / audit.file, "key_file": key_file}
        log = log.model_copy(update={"audit": audit.model_copy(update=paths)})
    if tenants.file is not None:
        tenants = tenants.model_copy(update={"file": folder / tenants.file})
    if (tls := server.tls) is not None:
        files = {name: folder / path for name, path in tls}
        server = server.model_copy(update={"tls": tls.model_copy(update=files)})
    changed = {"server": server, "tenants": tenants, "tiers": tiers, "admin": admin, "log": log}
    return config.model_copy(update=changed)


def _explain(error: Any, path: Sequence[Any]) -> str:
    """Return the field of a mistake, what is wrong, and what would be right."""
    *parents, last = path or ["configuration"]
    at = ".".join(map(str, (*parents, last)))
    if error["type"] == "extra_forbidden":
        return f"{at}: unknown key; {hint(str(last), _keys_at(parents))}"
    value = mask_url(error["input"]) if isinstance(error["input"], str) else error["input"]
    # A number under a plural isn't one: `min_tokens`.
    names_secret = _names_secret(str(last)) and (isinstance(value, str) or str(last)[-1:] != "s")
    is_secret = names_secret or (_IN_ENGINE & {*parents[2:], last})
    is_shown = isinstance(value, str | int | float | bool) and not is_secret
    shown = f", not {value!r}" if is_shown else ""
    if error["type"] == "model_type":
        return f"{at}: should hold keys of {', '.join(_keys_at(path))}{shown}"
    return f"{at}: {expected(error)}{shown}"


def _keys_at(path: Sequence[Any]) -> list[str]:
    """Return the keys of the section at `path`."""
    kind: Any = Config
    for part in path:
        if get_origin(kind) is None:
            kinds = choices(kind.model_fields[part].annotation)
        else:
            kinds = choices(get_args(kind)[get_origin(kind) is dict])
        # Of the types of a field, at most one holds others.
        kind = next(each for each in kinds if get_origin(each) or hasattr(each, "model_fields"))
    return sorted(kind.model_fields)


def redact(value: Any, name: str = "") -> Any:
    """Return the value of the field `name` without secrets."""
    if isinstance(value, dict):
        is_secret = _names_secret(name)
        return {n: redact(each, name if is_secret else n) for n, each in value.items()}
    if isinstance(value, list):
        return [redact(each, name) for each in value]
    if isinstance(value, bool | None):
        return value
    # A number under a plural isn't one: `max_tokens`.
    if _names_secret(name) and (isinstance(value, str) or not name.endswith("s")):
        return MASK
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        # vLLM reads such options as JSON.
        with suppress(ValueError):
            return orjson.dumps(redact(orjson.loads(value), name)).decode()
    if _holds_credentials(value):
        return MASK
    return mask_url(value) if "://" in value else value
