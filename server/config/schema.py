"""The fields of the configuration, section by section.

The text below a field is what `tierserve config` prints of it. A field without a default value has
an example.
"""

import re
from ipaddress import IPv6Address, ip_address
from socket import has_dualstack_ipv6
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    model_validator,
)

from server.config.audit import AuditConfig
from server.config.base import (
    RELOADED,
    FilePath,
    JsonLinesPath,
    PositiveSeconds,
    Seconds,
    Section,
    conflict,
)
from server.config.models import ModelConfig, Name, embedded
from server.config.prefix_tier import PrefixTierConfig
from server.config.secrets import CipherKey, KeyOrHash
from server.config.shared_url import mask_url, validate_url
from server.config.tracing import TracingConfig
from tiers.disk import MIN_BYTES, Durability
from tiers.movement.demotion import WritePolicy
from tiers.policies import DEFAULT_POLICY, POLICIES

Ready = Literal["all", "any", "tiers"]
MAX_TIER_BYTES = 64 * 1024**4
"""Largest size of a tier: half of what a process can map. LMDB doesn't survive a map that fails."""
MAX_VARIANTS = 64
"""Largest number of answers that are kept for one request."""
MAX_WORKERS = 256
"""Largest number of worker processes."""
_has_shape_of_origin = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+").fullmatch


def is_dual(host: str) -> bool:
    """Return whether a host is IPv6's any address and stands for IPv4's too on this machine."""
    try:
        return ip_address(host) == IPv6Address("::") and has_dualstack_ipv6()
    except ValueError:
        return False


def _check_origin(text: str) -> str:
    if text != "*" and not _has_shape_of_origin(text):
        raise ValueError("should be as https://app.example:8443, in lower case, or *")
    return text


def _check_workers(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if not 1 <= number <= MAX_WORKERS or number != float(value):
        raise ValueError(f"should be a number from 1 to {MAX_WORKERS}, or auto")
    return number


class TlsConfig(Section):
    """The certificate that the server shows, on `admin.port` too.

    The files are read again when they change; new connections get the new certificate.
    """

    certificate_file: Annotated[FilePath, Field(examples=["cert.pem"])]
    """PEM file of the certificate, followed by those that lead to its root."""
    key_file: Annotated[FilePath, Field(examples=["key.pem"])]
    """PEM file of the certificate's private key."""


class ServerConfig(Section):
    """Where clients connect, and what a request may take."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Name or address to listen at. `::` is every address of this machine, IPv6 and IPv4."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen at; 0 takes a free one."""
    workers: Annotated[int | Literal["auto"], BeforeValidator(_check_workers)] = 1
    """Processes that answer clients, from 1 to 256; `auto` is the number of CPUs less what engines
    on this machine need. With more than one, a master process has the engines and the admin API,
    and each worker an equal part of the memory tier."""
    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(10 * 1024**2)
    """Size limit of a request's body; a larger one gets 413."""
    max_prompts: Annotated[int, Field(ge=1)] = 2048
    """How many prompts one request may have, on any route."""
    client_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 60
    """Seconds a client may take to send a request's head, or a body that is read whole; and
    seconds it may pause in a body that is passed through, or in reading its response."""
    allowed_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_check_origin)], ...],
        Field(examples=[["https://app.example"]]),
    ] = ()
    """Origins, such as `https://app.example`, whose pages may send requests from a browser (CORS);
    `*` stands for all."""
    known_requests: bool = True
    """Whether requests that came a few times before, byte for byte, on kept connections without TLS
    are answered without parsing them again; if not, such hits take longer, and are the same."""
    ready: Ready = "all"
    """When `/ready` says 200: with `all` once each model's engine or an upstream of it can answer,
    with `any` once that of one model can, with `tiers` once the tiers can, so that hits are served
    while engines load or are scaled to zero. `/ready?model=NAME` tells of a model by itself."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 0
    """Seconds for which new connections are still taken after SIGTERM, until load balancers know
    that `/ready` says 503; each answer closes its connection meanwhile. SIGINT doesn't wait."""
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 30
    """Seconds that requests under way get to end after that."""
    tls: TlsConfig | None = None


class TenantsConfig(Section):
    """Who may send requests.

    Without `file` and `key` everybody who can connect; at most one of them can be set.
    """

    file: Annotated[FilePath | None, Field(examples=["tenants.yaml"])] = None
    """File of the tenants, their keys' hashes and their limits; it is read again when it changes.
    `tierserve keys new NAME` makes a key and prints its lines."""
    key: Annotated[KeyOrHash | None, Field(examples=["sha256:" + 64 * "0"])] = None
    """Key of the only tenant, an operator, or the key's hash."""
    open_metrics: bool = False
    """Whether `/metrics` needs no key."""
    cache_salt: bool = True
    """Whether engines get a `cache_salt` with each request, which keeps the tenants' prompt
    prefixes apart; some engines other than vLLM refuse it."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.file is not None and self.key is not None:
            raise conflict("file and key: only one of them can be set")
        return self


class FreshnessRule(Section):
    """How long the answers of some models and routes stay fresh.

    A duration that a rule leaves out is that of section `cache`.
    """

    model: str = "*"
    """Name of the model; `*` in it stands for any text."""
    route: str = "*"
    """Path of the route, such as `/v1/chat/completions`; `*` in it stands for any text."""
    ttl_s: Annotated[PositiveSeconds | None, Field(examples=[3600])] = None
    """As `cache.ttl_s`, in seconds."""
    stale_while_revalidate_s: Annotated[Seconds | None, Field(examples=[60])] = None
    """As `cache.stale_while_revalidate_s`, in seconds."""
    stale_if_error_s: Annotated[Seconds | None, Field(examples=[86400])] = None
    """As `cache.stale_if_error_s`, in seconds."""


class CacheConfig(Section):
    """Which answers are cached, and for how long they stay fresh."""

    ttl_s: Annotated[PositiveSeconds, RELOADED] = 7 * 24 * 3600
    """Seconds that an answer stays fresh."""
    stale_while_revalidate_s: Annotated[Seconds, RELOADED] = 0
    """Seconds after `ttl_s` in which a stale answer is served while a new one is generated in the
    background."""
    stale_if_error_s: Annotated[Seconds, RELOADED] = 0
    """Seconds after `ttl_s` in which a stale answer is served where the engine fails or is down."""
    rules: Annotated[tuple[FreshnessRule, ...], RELOADED] = ()
    """Other durations for some models and routes. The first rule that matches counts; there is
    none by default."""
    ttl_jitter: Annotated[float, Field(ge=0, le=0.5), RELOADED] = 0.1
    """Largest part of `ttl_s` that is taken off at random, so that answers stored together don't
    expire together."""
    nondeterministic: Annotated[Literal["never", "per_request", "always"], RELOADED] = "per_request"
    """Whether to cache answers to requests with neither `temperature: 0` nor a `seed`: never, only
    where the request's field `cache.mode` is `use` (`per_request`), or always."""
    variants: Annotated[int, Field(ge=1, le=MAX_VARIANTS), RELOADED] = 1
    """How many answers to one nondeterministic request are kept, and served in turn."""
    wait_for_others_s: Annotated[float, Field(ge=0, le=3600), RELOADED] = 10
    """Seconds to wait for an answer that another process is generating; 0 never waits."""
    obey_upstreams: Annotated[bool, RELOADED] = True
    """Whether `Cache-Control` of an upstream's response can forbid to cache it, and shorten
    `ttl_s`."""
    max_answer_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(4 * 1024**2)
    """Size limit of an answer that is cached."""


def _check_policy(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"should be one of {', '.join(POLICIES)}")
    return name


class MemoryTierConfig(Section):
    """The memory tier: answers in the server's processes. `null` leaves it out."""

    max_bytes: Annotated[ByteSize, Field(ge=64 * 1024, le=MAX_TIER_BYTES), RELOADED] = ByteSize(
        256 * 1024**2
    )
    """Size limit of all its answers, in all workers together."""
    policy: Annotated[
        str, AfterValidator(_check_policy), Field(json_schema_extra={"enum": [*POLICIES]})
    ] = DEFAULT_POLICY
    """Eviction policy: which answers leave when it is full."""


class DiskTierConfig(Section):
    """The disk tier: answers in an LMDB file, which survive a restart. `null` leaves it out."""

    path: Annotated[FilePath | None, Field(examples=["~/.cache/tierserve/disk"])] = None
    """Folder of the file, by default `tierserve/disk` in the cache folder (`XDG_CACHE_HOME`, or
    `~/.cache`). Servers of one machine may share it."""
    max_bytes: Annotated[ByteSize, Field(ge=MIN_BYTES, le=MAX_TIER_BYTES), RELOADED] = ByteSize(
        4 * 1024**3
    )
    """Size limit of the file. With a smaller one answers are evicted at once; the file gets smaller
    at the next start."""
    durability: Durability = Durability.COMMIT
    """When an answer counts as stored: once it is synced (`commit`), once it waits to be synced
    within `interval_ms` (`interval`), or once the operating system has it (`os`)."""
    interval_ms: Annotated[float, Field(ge=1, le=60_000)] = 50
    """Milliseconds between two syncs, with durability `interval`."""
    compression: Literal["none", "zstd"] = "none"
    """With `zstd` about twice as many answers fit, and hits are a tenth slower."""
    encryption_key: Annotated[
        CipherKey | None,
        Field(repr=False, examples=["0123456789abcdef" * 4]),
    ] = None
    """Key that encrypts a new file: 32 bytes in hexadecimal or base64, as
    `openssl rand -base64 32` prints them. A file that exists keeps the key that it was made with.
    There is none by default."""
    encryption_key_file: Annotated[FilePath | None, Field(examples=["disk.key"])] = None
    """File that holds the key, in place of `encryption_key`."""

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if self.encryption_key is not None and self.encryption_key_file is not None:
            raise conflict("encryption_key and encryption_key_file: only one can hold the key")
        return self


class SharedTierConfig(Section):
    """The shared tier: answers in a Redis, Valkey or Memcached server, for several machines.

    It needs the extra `redis` or `memcached`. There is none by default.
    """

    url: Annotated[
        str,
        AfterValidator(validate_url),
        PlainSerializer(mask_url, when_used="json"),
        Field(repr=False, examples=["redis://127.0.0.1:6379/0"]),
    ]
    """Address of the server: `redis://user:password@host:6379/0`, `rediss://` for TLS,
    `unix:///path/to/socket?db=0`, or `memcached://host:11211`."""
    deadline_ms: Annotated[float, Field(ge=1, le=1000)] = 20
    """Milliseconds that a lookup may take; one that takes longer is a miss."""
    when_unreachable: Literal["serve", "miss"] = "serve"
    """While the server can't be reached, nobody here learns what others purge. `serve` goes on with
    what the memory and the disk hold, so a purge may reach them late; with `miss` they serve
    nothing."""


class TiersConfig(Section):
    """The tiers, nearest first, and how entries move between them."""

    write: WritePolicy = WritePolicy.ON_INSERT
    """When an answer is written to the disk tier: at once (`on_insert`), or when the memory tier
    evicts it (`on_evict`)."""
    promote_after: Annotated[int, Field(ge=1, le=15)] = 2
    """How often a key must have been asked for lately until a hit is promoted to nearer tiers."""
    memory: MemoryTierConfig | None = MemoryTierConfig()
    disk: DiskTierConfig | None = DiskTierConfig()
    shared: SharedTierConfig | None = None
    prefix: PrefixTierConfig | None = None


class AdminConfig(Section):
    """Where the admin API listens, with which `tierserve cache` and `/admin` manage the tiers."""

    socket: Annotated[FilePath | None, Field(examples=["~/.cache/tierserve/admin-8000.sock"])] = (
        None
    )
    """Unix socket, which only this user can open; by default `tierserve/admin-PORT.sock` in the
    cache folder, PORT being `server.port`. `null` makes none."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Name or address to listen at with `port`."""
    port: Annotated[int | None, Field(ge=0, le=65535, examples=[8001])] = None
    """TCP port for clients that have the `key`; there is none by default."""
    key: Annotated[KeyOrHash | None, Field(examples=["sha256:" + 64 * "0"])] = None
    """Key of the admin API at `port`, of 16 characters or more, or the key's hash."""

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if self.port is not None and self.key is None:
            raise ValueError(
                "should have a key beside its port, which anybody on this machine can use"
            )
        return self


class LogConfig(Section):
    """What is logged to standard error, the trace of requests, and the audit log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], RELOADED] = "info"
    """Least severe level that is logged."""
    format: Literal["auto", "json", "text"] = "auto"
    """Format of the lines; `auto` is text on a terminal and JSON elsewhere."""
    trace: Annotated[JsonLinesPath | None, Field(examples=["requests.jsonl"])] = None
    """File for the trace that `tierserve simulate` replays: time, key, size, tokens, model, tier
    and outcome of each request that may be cached, and keyed digests of the beginnings of prompts
    that an engine answered. The key is in `x.key` beside `x.jsonl`. There is none by default."""
    trace_max_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = ByteSize(256 * 1024**2)
    """Size at which the trace is renamed, `x.jsonl` to `x.1.jsonl` in place of the file of that
    name, and begun anew."""
    audit: AuditConfig | None = None

    @model_validator(mode="after")
    def _has_two_files(self) -> Self:
        if self.audit is not None and self.audit.file == self.trace:
            raise conflict("trace and audit.file: should be two files")
        return self


class Config(Section):
    """The configuration of tierserve."""

    server: ServerConfig = ServerConfig()
    tenants: TenantsConfig = TenantsConfig()
    models: dict[Name, ModelConfig] = Field(default_factory=embedded, min_length=1)
    """The models by the names that clients use. A request that names none is for the first."""
    cache: CacheConfig = CacheConfig()
    tiers: TiersConfig = TiersConfig()
    admin: AdminConfig = AdminConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig | None = None
