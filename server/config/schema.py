"""The configuration: one YAML file, whose single fields environment variables may override.

Unknown keys are mistakes. Units stand in the names; sizes may be written `256MiB`. Environment
variables are described in `server.config.environment`.
"""

import re
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from socket import has_dualstack_ipv6
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    PlainSerializer,
    model_validator,
)  # fmt: skip

from server.config.base import (
    FilePath,
    PositiveSeconds,
    Seconds,
    Section,
    conflict,
)  # fmt: skip
from server.config.models import ModelConfig, Name, embedded
from server.config.secrets import CipherKey, KeyOrHash
from server.config.shared_url import mask_url, validate_url
from server.config.tracing import TracingConfig
from tiers.disk import MIN_BYTES, Durability
from tiers.movement.demotion import WritePolicy
from tiers.policies import DEFAULT_POLICY, POLICIES

MAX_VARIANTS = 64
_has_shape_of_origin = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+").fullmatch


def is_dual(host: str) -> bool:
    """Whether it is IPv6's «any address», which stands for IPv4's, too, where there is IPv6."""
    try:
        return ip_address(host) == IPv6Address("::") and has_dualstack_ipv6()
    except ValueError:
        return False


def _is_origin(text: str) -> str:
    if text != "*" and not _has_shape_of_origin(text):
        raise ValueError("should be as https://app.example:8443, in lower case, or *")
    return text


class TlsConfig(Section):
    """PEM files of a certificate, with those that lead to its root, and of its private key."""

    certificate_file: FilePath
    key_file: FilePath


class ServerConfig(Section):
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
    tls: TlsConfig | None = None


class TenantsConfig(Section):
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


class FreshnessRule(Section):
    """Freshness for the models and routes that match; what it leaves out is as in `cache`.

    `*` stands for any text.
    """

    model: str = "*"
    route: str = "*"
    ttl_s: PositiveSeconds | None = None
    stale_while_revalidate_s: Seconds | None = None
    stale_if_error_s: Seconds | None = None


class CacheConfig(Section):
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
    rules: tuple[FreshnessRule, ...] = ()
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


class MemoryTierConfig(Section):
    """Answers in this process; `policy` says which leave for room."""

    max_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = ByteSize(256 * 1024**2)
    policy: Annotated[str, AfterValidator(_is_policy)] = DEFAULT_POLICY


class DiskTierConfig(Section):
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


class SharedTierConfig(Section):
    """Answers in a Redis, Valkey or Memcached server, for all who use it.

    A lookup may take `deadline_ms`; what takes longer is a miss.
    """

    url: Annotated[
        str,
        AfterValidator(validate_url),
        PlainSerializer(mask_url, when_used="json"),
        Field(repr=False),
    ]
    deadline_ms: Annotated[float, Field(ge=1, le=1000)] = 20


class TiersConfig(Section):
    """The tiers, nearest first, `null` leaving one out, and how entries move between them.

    `write` says whether answers reach the disk at once (`on_insert`), or when memory evicts them
    (`on_evict`). A hit is promoted once it was asked for `promote_after` times lately.
    """

    write: WritePolicy = WritePolicy.ON_INSERT
    promote_after: Annotated[int, Field(ge=1, le=15)] = 2
    memory: MemoryTierConfig | None = MemoryTierConfig()
    disk: DiskTierConfig | None = DiskTierConfig()
    shared: SharedTierConfig | None = None


class AdminConfig(Section):
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


class LogConfig(Section):
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

    server: ServerConfig = ServerConfig()
    tenants: TenantsConfig = TenantsConfig()
    models: dict[Name, ModelConfig] = Field(default_factory=embedded, min_length=1)
    cache: CacheConfig = CacheConfig()
    tiers: TiersConfig = TiersConfig()
    admin: AdminConfig = AdminConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig | None = None
