"""Tenants: the clients of the server, the answers they share, and the routes they may use.

Where no keys are configured, every client is allowed, and each `Authorization` header (and
Anthropic's `x-api-key`) is a tenant of its own, whose key an engine may know. Otherwise a file maps
tenants to hashed keys:

    acme:
      keys:
        - sha256:5a1e…        # as `tierserve keys new acme` prints it
      scope: partners         # whose answers it shares; by default its own
      requests_per_minute: 600
      max_requests: 32        # under way at once
    grafana:
      keys: [sha256:9b02…]
      operator: true          # may read metrics, and use all of the engine's routes

A fast hash without salt suffices, unlike for passwords: our keys have 256 random bits, so nobody
finds one by trying.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from multidict import MultiMapping
from pydantic import Field, TypeAdapter, ValidationError

from server.auth.credentials import bearer_key, credentials_in, presented_credentials
from server.auth.limits import NO_LIMITS, Limits, RateLimiter
from server.auth.tenant import A_TENANT, TENANT, Tenant, open_tenant, salt_of
from server.config.base import ConfigError, Section, expected
from server.config.environment import hint
from server.config.schema import TenantsConfig
from server.config.secrets import Hash, hash_key
from server.config.yaml_loader import Loader
from tiers.key import scope_named

_ALONE = "default"
"""The tenant of `tenants.key`."""
# Tenants found by their headers, each of which would have to be hashed again.
_MEMO_HEADERS = 1024


class TenantRecord(Section):
    """A tenant as the file describes it."""

    keys: tuple[Hash, ...] = ()
    scope: Annotated[str, Field(min_length=1)] | None = None
    operator: bool = False
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_requests: Annotated[int, Field(ge=1)] | None = None


_Name = Annotated[str, Field(pattern=f"^{TENANT}$")]
_records = TypeAdapter(Annotated[dict[_Name, TenantRecord], Field(min_length=1)])


def new_limiter(_: str, limits: Limits) -> RateLimiter:
    """Return the rate limiter of a tenant that only this process serves."""
    return RateLimiter(limits)


class Tenants:
    """All tenants, found by what a request presents.

    Args:
        section: their configuration.
        new_limiter: makes the rate limiter of a tenant of its name and limits.
        records: what `read` has returned to another process; without them, it is called here.

    Raises:
        ConfigError: the file can't be read, or is wrong.
    """

    def __init__(
        self,
        section: TenantsConfig,
        new_limiter: Callable[[str, Limits], RateLimiter] = new_limiter,
        records: Mapping[str, TenantRecord] | None = None,
    ) -> None:
        self._section, self._new_limiter, self._revision = section, new_limiter, 0
        self._by_header: dict[str, Tenant] = {}
        self._by_hash: dict[str, Tenant] = {}
        self._scopes: Mapping[str, bytes] = {}
        self.limiters: dict[str, RateLimiter] = {}
        self.is_open = section.file is None and section.key is None
        self.use(self.read() if records is None else records)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are to be read again when they change."""
        return () if self._section.file is None else (self._section.file,)

    def read(self) -> Mapping[str, TenantRecord]:
        """Return the tenants that are configured now. It may block, and may run in a thread.

        Raises:
            ConfigError: the file can't be read, or is wrong.
        """
        if (file := self._section.file) is not None:
            return _read(file)
        if (key := self._section.key) is not None:
            # It is the only tenant, so it can harm no other.
            return {_ALONE: TenantRecord(keys=(key,), operator=True)}
        return {}

    def use(self, records: Mapping[str, TenantRecord]) -> None:
        """Accept the keys of these tenants from now on. Requests under way go on."""
        self.records = records
        self._revision += 1
        limiters: dict[str, RateLimiter] = {}
        by_hash: dict[str, Tenant] = {}
        salts = self._salts(records)
        for name, record in records.items():
            limits = Limits(record.requests_per_minute, record.max_requests)
            limiter = self.limiters.get(name)
            if limiter is None:
                limiter = self._new_limiter(name, limits)
            limiter.set_limits(limits)
            limiters[name] = limiter
            scope = _scope(name, record)
            tenant = Tenant(
                name,
                scope,
                share_scope=scope_named(scope),
                salt=salts.get(scope),
                operator=record.operator,
                limiter=limiter,
                revision=self._revision,
            )
            by_hash |= dict.fromkeys(record.keys, tenant)
        for name in self.limiters.keys() - limiters:
            self.limiters[name].set_limits(NO_LIMITS)
        self.limiters, self._by_hash = limiters, by_hash
        self._scopes = {name: _scope(name, record) for name, record in records.items()}
        self._by_header.clear()

    def _salts(self, records: Mapping[str, TenantRecord]) -> dict[bytes, str]:
        """Return the salt of each scope: its name, and a digest of the hashes of its keys.

        So all servers with one file have the same salts, nobody can guess one without the hashes,
        and a scope's salt changes with its keys. By the name, blocks of prefixes are purged.
        """
        if not self._section.cache_salt:
            return {}
        hashes: dict[bytes, list[str]] = {}
        for name, record in records.items():
            hashes.setdefault(_scope(name, record), []).extend(record.keys)
        return {
            scope: salt_of(
                scope_named(scope), b"cache_salt", scope, *map(str.encode, sorted(of_scope))
            )
            for scope, of_scope in hashes.items()
        }

    def is_current(self, tenant: Tenant) -> bool:
        """Return whether a tenant that was found earlier would be found again."""
        return self.is_open or tenant.revision == self._revision

    def salted_scopes(self, name: str) -> list[str]:
        """Return the scopes with which salts of this tenant's prompts begin, or once began.

        A tenant that isn't configured any more had one of its own. There are none where engines get
        no salts.
        """
        if self.is_open or not self._section.cache_salt:
            return []
        own = _scope(name, TenantRecord())
        return sorted({scope_named(scope) for scope in (own, self._scopes.get(name, own))})

    def names_in(self, share_scope: str) -> list[str]:
        """Return the names of the tenants that have this scope now."""
        return [name for name, scope in self._scopes.items() if scope_named(scope) == share_scope]

    def find(self, headers: MultiMapping[str]) -> Tenant | None:
        """Return the tenant whose key these headers hold; `None` without a known key.

        Raises:
            DuplicateHeaderError: a header with credentials stands more than once.
        """
        if self.is_open:
            # An engine may know a client by either header. No header holds an end of line.
            token, key = credentials_in(headers)
            credentials = f"{token or ''}\n{key}" if key is not None else token or ""
        else:
            credentials = presented_credentials(headers)
        tenant = self._by_header.get(credentials)
        if tenant is None and (tenant := self._find(credentials)) is not None:
            if len(self._by_header) >= _MEMO_HEADERS:
                self._by_header.clear()
            self._by_header[credentials] = tenant
        return tenant

    def _find(self, credentials: str) -> Tenant | None:
        if self.is_open:
            return open_tenant(credentials)
        key = bearer_key(credentials)
        # The time that a lookup by hash takes reveals nothing about the existing keys.
        return self._by_hash.get(hash_key(key)) if key else None


def _scope(name: str, record: TenantRecord) -> bytes:
    # No header holds a zero byte, so a tenant without a configured key never has this scope.
    kind, scope = ("tenant", name) if record.scope is None else ("scope", record.scope)
    return f"\0{kind}\0{scope}".encode()


def _read(file: Path) -> Mapping[str, TenantRecord]:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506
    except OSError as exc:
        raise ConfigError([f"tenants.file: {file} can't be read: {exc.strerror}"]) from exc
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        # The error's text may show a key.
        mark = getattr(exc, "problem_mark", None)
        where = "" if mark is None else f", at line {mark.line + 1}"
        raise ConfigError([f"tenants.file: {file} is no YAML{where}"]) from exc
    try:
        records = _records.validate_python(data)
    except ValidationError as exc:
        # The value isn't shown, since it may be a key.
        raise ConfigError([_explain(error) for error in exc.errors()]) from None
    hashes = [each for record in records.values() for each in record.keys]
    if len(hashes) > len(set(hashes)):
        raise ConfigError(["tenants.file: a key stands twice in it"])
    return records


def _explain(error: Any) -> str:
    *parents, last = ("tenants.file", *(str(part) for part in error["loc"] if part != "[key]"))
    path = ".".join((*parents, last))
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key; {hint(last, TenantRecord.model_fields)}"
    if error["type"] == "string_pattern_mismatch":
        return f"{path}: a tenant's name should be {A_TENANT}"
    return f"{path}: {expected(error)}"
