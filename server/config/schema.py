"""The configuration: one YAML file, whose single fields environment variables may override.

Unknown keys are mistakes. Units stand in the names; sizes may be written `256MiB`. Environment
variables are described in `server.config.environment`.
"""

import difflib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from socket import has_dualstack_ipv6
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

import orjson
import yaml
from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)  # fmt: skip

from server.auth.credentials import KeyOrHash
from server.config.base import (
    CONFLICT,
    MASK,
    FilePath,
    PositiveSeconds,
    Seconds,
    Section,
    conflict,
    should,
)  # fmt: skip
from server.config.environment import choices, overridden
from server.config.models import Model, Name, clashes, embedded
from server.config.secrets import CipherKey
from server.config.shared_url import check, masked
from server.config.tracing import Tracing
from server.config.yaml_loader import EMPTY, Loader
from server.protocol.cache_field import MAX_VARIANTS
from tiers.disk import MIN_BYTES, Durability
from tiers.movement.background import Write
from tiers.policies import DEFAULT, POLICIES

_has_shape_of_origin = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+").fullmatch
# As they end: `api_key`, `hfToken`, `Authorization`.
_names_secret = re.compile(
    r"(?i)(key|token|password|passwd|passphrase|secret|credential|authorization|cookie)s?$"
).search
# As a header has them.
_holds_credentials = re.compile(r"(?i)\b(authorization|cookie|x-api-key)\s*[:=]|\bbearer\s").search
# What an engine is given may be anything.
_IN_ENGINE = frozenset({"args", "engine", "env", "vllm"})
_SOCKET_PATH_BYTES = 107
"""Of Linux's sockaddr_un, without the final zero."""


def is_socket_path(path: Path) -> bool:
    """Whether the path is short enough for a socket."""
    return len(os.fsencode(path)) <= _SOCKET_PATH_BYTES


def is_dual(host: str) -> bool:
    """Whether it is IPv6's «any address», which stands for IPv4's, too, where there is IPv6."""
    try:
        return ip_address(host) == IPv6Address("::") and has_dualstack_ipv6()
    except ValueError:
        return False


NO_HOME = "this user has no home folder, and neither HOME nor XDG_CACHE_HOME is set"
"""Why there is no cache folder."""


def cache_folder() -> Path | None:
    """Return the folder for what can be made again: models and, by default, the disk tier.

    There is none where this user has no home, as in a container whose user has no name.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with suppress(RuntimeError):
        return Path(base).expanduser() / "tierserve"
    return None


class ConfigError(ValueError):
    """The configuration can't be used. `mistakes` has one line for each thing that is wrong."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def _is_origin(text: str) -> str:
    if text != "*" and not _has_shape_of_origin(text):
        raise ValueError("should be as https://app.example:8443, in lower case, or *")
    return text


class Tls(Section):
    """PEM files of a certificate, with those that lead to its root, and of its private key."""

    certificate_file: FilePath
    key_file: FilePath


class Listener(Section):
    """Where clients connect, and how long a stop may take.

    The `host` `::` is all addresses of this machine, IPv6 and IPv4.
    `client_timeout_s` is how long a client may take to send a head, or a body that we read whole,
    and how long it may pause within one that is passed through, or in taking what it is sent.
    A request may have `max_prompts` prompts, on any route. `tls` is of the admin API's port, too.
    `allowed_origins` names the origins, such as `https://app.example`, whose pages may ask us from
    a browser; `*` stands for all.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(10 * 1024**2)
    max_prompts: Annotated[int, Field(ge=1)] = 2048
    client_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 60
    allowed_origins: tuple[Annotated[str, AfterValidator(_is_origin)], ...] = ()
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 30
    tls: Tls | None = None


class Tenants(Section):
    """Who may ask. With neither a `file` of tenants nor the one tenant's `key`, everybody may.

    `key` is a key or its hash. `cache_salt` says whether engines are sent one, so that they keep
    the tenants' prompt prefixes apart; some that aren't vLLM refuse it.
    """

    file: FilePath | None = None
    key: KeyOrHash | None = None
    open_metrics: bool = False
    cache_salt: bool = True

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.file is not None and self.key is not None:
            raise conflict("file and key: only one of them can say who may ask")
        return self


class Rule(Section):
    """Freshness for the models and routes that match; what it leaves out is as in `cache`.

    `*` stands for any text.
    """

    model: str = "*"
    route: str = "*"
    ttl_s: PositiveSeconds | None = None
    stale_while_revalidate_s: Seconds | None = None
    stale_if_error_s: Seconds | None = None


class Cache(Section):
    """What is cached, and for how long: by the first rule that matches, or else by these.

    After `ttl_s`, an answer may be given out while a new one is made, or where none can be had.
    `nondeterministic` says whether answers are kept that asked for chance: only where the request's
    `cache.mode` is `use` (`per_request`), always, or never; `variants` is how many of them are kept
    for a request, and given out in turn. `wait_for_others_s` is how long to wait for an answer that
    another process is generating; 0 never waits. `obey_upstreams` says whether an upstream's
    `Cache-Control` forbids to keep its answers, or bounds for how long.
    """

    ttl_s: PositiveSeconds = 7 * 24 * 3600
    stale_while_revalidate_s: Seconds = 0
    stale_if_error_s: Seconds = 0
    rules: tuple[Rule, ...] = ()
    ttl_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    nondeterministic: Literal["never", "per_request", "always"] = "per_request"
    variants: Annotated[int, Field(ge=1, le=MAX_VARIANTS)] = 1
    wait_for_others_s: Annotated[float, Field(ge=0, le=3600)] = 10
    obey_upstreams: bool = True
    max_answer_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(4 * 1024**2)


def _is_policy(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"should be one of {', '.join(POLICIES)}")
    return name


class MemoryTier(Section):
    """Answers in this process; `policy` says which leave for room."""

    max_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = ByteSize(256 * 1024**2)
    policy: Annotated[str, AfterValidator(_is_policy)] = DEFAULT


class DiskTier(Section):
    """Answers in an LMDB file, which never exceeds `max_bytes`.

    `durability` says when an answer counts as stored: synced (`commit`), synced within
    `interval_ms` (`interval`), or when the operating system likes (`os`). `compression` makes
    twice as many answers fit, and hits a tenth slower. With an `encryption_key`, or a file that
    holds it, a new file is encrypted: 32 bytes in hexadecimal or base64.
    """

    path: FilePath | None = None
    max_bytes: Annotated[ByteSize, Field(ge=MIN_BYTES)] = ByteSize(4 * 1024**3)
    durability: Durability = Durability.COMMIT
    interval_ms: Annotated[float, Field(ge=1, le=60_000)] = 50
    compression: Literal["none", "zstd"] = "none"
    encryption_key: Annotated[CipherKey | None, Field(repr=False)] = None
    encryption_key_file: FilePath | None = None

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if self.encryption_key is not None and self.encryption_key_file is not None:
            raise conflict("encryption_key and encryption_key_file: only one can hold the key")
        return self


class SharedTier(Section):
    """Answers in a Redis, Valkey or Memcached server, for all who use it.

    A lookup may take `deadline_ms`; what takes longer is a miss.
    """

    url: Annotated[
        str, AfterValidator(check), PlainSerializer(masked, when_used="json"), Field(repr=False)
    ]
    deadline_ms: Annotated[float, Field(ge=1, le=1000)] = 20


class Tiers(Section):
    """The tiers, nearest first, `null` leaving one out, and how entries move between them.

    `write` says whether answers reach the disk at once (`on_insert`), or when memory evicts them
    (`on_evict`). A hit is promoted once it was asked for `promote_after` times lately.
    """

    write: Write = Write.ON_INSERT
    promote_after: Annotated[int, Field(ge=1, le=15)] = 2
    memory: MemoryTier | None = MemoryTier()
    disk: DiskTier | None = DiskTier()
    shared: SharedTier | None = None


class Admin(Section):
    """Where the tiers are administered.

    This user's `tierserve cache` reaches the server at the Unix socket `socket`, by default
    `admin-PORT.sock` in the cache folder, PORT being `server.port`; `null` is nowhere. Who has the
    `key`, which may be given as its hash, reaches the same at `port`, if there is one.
    """

    socket: FilePath | None = None
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    key: KeyOrHash | None = None

    @model_validator(mode="after")
    def _has_a_lock(self) -> Self:
        if self.port is not None and self.key is None:
            raise ValueError("port: needs a key, since anybody on this machine could connect")
        return self


def _is_json_lines(path: Path) -> Path:
    if path.suffix != ".jsonl":
        raise ValueError("should end in .jsonl")
    return path


class Log(Section):
    """What is logged to standard error. `auto` is text on a terminal and JSON elsewhere.

    `trace` is a file for what `tierserve simulate` replays: time, key, size, tokens, model, tier
    and outcome of each request that may be cached. At `trace_max_bytes` it is renamed, `x.jsonl`
    to `x.1.jsonl` in place of what had that name, and begun anew.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"
    trace: Annotated[FilePath, AfterValidator(_is_json_lines)] | None = None
    trace_max_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = ByteSize(256 * 1024**2)


class Config(Section):
    """Everything that can be configured."""

    server: Listener = Listener()
    tenants: Tenants = Tenants()
    models: dict[Name, Model] = Field(default_factory=embedded, min_length=1)
    cache: Cache = Cache()
    tiers: Tiers = Tiers()
    admin: Admin = Admin()
    log: Log = Log()
    tracing: Tracing | None = None


class Given(NamedTuple):
    """A configuration as it was given."""

    config: Config
    """What is right of it."""
    mistakes: list[str]
    left_out: list[str]
    """The paths of what is wrong, and so isn't in `config`."""


def load(file: Path) -> Config:
    """Read the configuration.

    Raises:
        ConfigError: the file can't be read, or fields are wrong; it names every one of them.
    """
    given = read(file)
    if given.mistakes:
        raise ConfigError(given.mistakes)
    return given.config


def read(file: Path) -> Given:
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
    data, mistakes = overridden(data, Config, os.environ)
    config, wrong, left_out = _right_of(data)
    config = _with_paths(config, _folder_of(file))
    mistakes += wrong + clashes(config.models)
    if (socket := config.admin.socket) is not None and not is_socket_path(socket):
        should = f"should have at most {_SOCKET_PATH_BYTES} bytes, as any socket"
        mistakes.append(f"admin.socket: {should}, not {str(socket)!r}")
        left_out.append("admin.socket")
    return Given(config, mistakes, left_out)


def _folder_of(file: Path) -> Path:
    """Return the folder of a file, following links to files but not those to folders.

    Files in the folder may be read again: when a ConfigMap or a Secret changes, Kubernetes lets
    such a link lead to another folder, and removes the one before.
    """
    file = file.absolute()
    while file.is_symlink():
        file = file.parent / file.readlink()
    return file.parent


def _right_of(data: dict[str, Any]) -> Given:
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
            return Given(config, mistakes, [".".join(map(str, path)) for path in left_out])


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
    given = masked(error["input"]) if isinstance(error["input"], str) else error["input"]
    is_secret = _names_secret(str(last)) or (_IN_ENGINE & {*parents[2:], last})
    is_shown = isinstance(given, str | int | float | bool) and not is_secret
    shown = f", not {given!r}" if is_shown else ""
    if error["type"] == "model_type":
        return f"{path}: should hold keys of {', '.join(_fields(error['loc']))}{shown}"
    return f"{path}: {should(error)}{shown}"


def without_secrets(value: Any, name: str = "") -> Any:
    """Return what may be pasted into an issue, of the value of a field."""
    if isinstance(value, dict):
        is_secret = _names_secret(name)
        return {n: without_secrets(each, name if is_secret else n) for n, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each, name) for each in value]
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
            return orjson.dumps(without_secrets(orjson.loads(value), name)).decode()
    if _holds_credentials(value):
        return MASK
    return masked(value) if "://" in value else value


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
