"""Tenants: who asks, which answers they share, and what they may.

Where no keys are configured, everybody may ask, and each `Authorization` header (and Anthropic's
`x-api-key`) is a tenant of its own, whom an engine may know. Else a file maps tenants to hashed
keys:

    acme:
      keys:
        - sha256:5a1e…        # as `tierserve keys new acme` prints it
      scope: partners         # whose answers it shares; by default its own
      requests_per_minute: 600
      max_requests: 32        # under way at once
    grafana:
      keys: [sha256:9b02…]
      operator: true          # may read metrics, and reach all of the engine's routes
"""

from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import yaml
from multidict import MultiMapping
from pydantic import Field, TypeAdapter, ValidationError

from server.auth.credentials import bearer_key, credentials_in, presented_credentials
from server.auth.limits import Limits, RateLimiter
from server.config.base import ConfigError, Section, expected
from server.config.schema import TenantsConfig as Configured
from server.config.secrets import Hash, hash_key
from server.config.yaml_loader import Loader
from server.protocol.labels import TENANT
from tiers.key import digest, scope_named

ANONYMOUS = "anonymous"
"""The tenant of requests without credentials, where none are needed."""
_ALONE = "default"
"""The tenant of `tenants.key`."""
# Of headers that were seen already, each of which would have to be hashed again.
_REMEMBERED = 1024


class Tenant:
    """Who asks. Each object stands for itself: it is looked up and compared for each request.

    Args:
        name: what it is purged by, and named in metrics.
        scope: who may share its answers.
        share: the scope of its keys, that of which a part of the tiers is for sure; none if empty.
        salt: keeps apart what an engine's prefix cache holds; `None` where nothing is to.
        operator: whether it may do all that can be done.
        account: what it has asked; `None` where that isn't counted.
    """

    __slots__ = ("limiter", "name", "operator", "salt", "scope", "share_scope")

    def __init__(
        self,
        name: str,
        scope: bytes,
        *,
        share: str = "",
        salt: str | None = None,
        operator: bool = False,
        account: RateLimiter | None = None,
    ) -> None:
        self.name, self.scope, self.share_scope, self.salt = name, scope, share, salt
        self.operator, self.limiter = operator, account

    @property
    def has_key(self) -> bool:
        """Whether its key is one of ours, and no engine's business."""
        return self.limiter is not None


NOBODY = Tenant("nobody", b"\0nobody", account=RateLimiter(Limits()))
"""Whoever asks where no door is."""


class TenantRecord(Section):
    """A tenant as the file describes it."""

    keys: tuple[Hash, ...] = ()
    scope: Annotated[str, Field(min_length=1)] | None = None
    operator: bool = False
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_requests: Annotated[int, Field(ge=1)] | None = None


_Name = Annotated[str, Field(pattern=f"^{TENANT}$")]
_records = TypeAdapter(Annotated[dict[_Name, TenantRecord], Field(min_length=1)])


class Tenants:
    """All tenants, found by what a request presents.

    Args:
        section: where they are configured.
        new_account: returns what counts a tenant's requests.

    Raises:
        ConfigError: the file can't be read, or is wrong.
    """

    def __init__(
        self, section: Configured, new_account: Callable[[Limits], RateLimiter] = RateLimiter
    ) -> None:
        self._section, self._new_account = section, new_account
        self._by_header: dict[str, Tenant] = {}
        self._by_hash: dict[str, Tenant] = {}
        self.limiters: dict[str, RateLimiter] = {}
        self.is_open = section.file is None and section.key is None
        self.use(self.read())

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read again when it changes."""
        return () if self._section.file is None else (self._section.file,)

    def read(self) -> Mapping[str, TenantRecord]:
        """Return the tenants that are configured now. May take long, and be called in a thread.

        Raises:
            ConfigError: the file can't be read, or is wrong.
        """
        if (file := self._section.file) is not None:
            return _read(file)
        if (key := self._section.key) is not None:
            # There is nobody else whom it could harm.
            return {_ALONE: TenantRecord(keys=(key,), operator=True)}
        return {}

    def use(self, records: Mapping[str, TenantRecord]) -> None:
        """Let these in from now on. What is under way goes on."""
        accounts: dict[str, RateLimiter] = {}
        by_hash: dict[str, Tenant] = {}
        salts = self._salts(records)
        for name, record in records.items():
            limits = Limits(record.requests_per_minute, record.max_requests)
            account = self.limiters.get(name)
            if account is None:
                account = self._new_account(limits)
            account.set_limits(limits)
            accounts[name] = account
            scope = _scope(name, record)
            tenant = Tenant(
                name,
                scope,
                share=scope_named(scope),
                salt=salts.get(scope),
                operator=record.operator,
                account=account,
            )
            by_hash |= dict.fromkeys(record.keys, tenant)
        self.limiters, self._by_hash = accounts, by_hash
        self._by_header.clear()

    def _salts(self, records: Mapping[str, TenantRecord]) -> dict[bytes, str]:
        """Return the salt of each scope, which only who knows the hashes of its keys could guess.

        So it is the same in all servers with one file, and another once the scope's keys change.
        """
        if not self._section.cache_salt:
            return {}
        hashes: dict[bytes, list[str]] = {}
        for name, record in records.items():
            hashes.setdefault(_scope(name, record), []).extend(record.keys)
        return {
            scope: digest(b"cache_salt", scope, *(each.encode() for each in sorted(known)))
            for scope, known in hashes.items()
        }

    def find(self, headers: MultiMapping[str]) -> Tenant | None:
        """Return whose request these headers come with; `None` without a key that is known.

        Raises:
            BadRequestError: a header with credentials stands twice.
        """
        if self.is_open:
            # Whatever an engine may know a client by; no header holds an end of line.
            token, key = credentials_in(headers)
            given = f"{token or ''}\n{key}" if key is not None else token or ""
        else:
            given = presented_credentials(headers)
        tenant = self._by_header.get(given)
        if tenant is None and (tenant := self._find(given)) is not None:
            if len(self._by_header) >= _REMEMBERED:
                self._by_header.clear()
            self._by_header[given] = tenant
        return tenant

    def _find(self, given: str) -> Tenant | None:
        if self.is_open:
            return open_tenant(given)
        key = bearer_key(given)
        # Looked up by its hash, how long it takes tells nothing of the keys that there are.
        return self._by_hash.get(hash_key(key)) if key else None


def open_tenant(credentials: str) -> Tenant:
    """Return who presents these credentials where no keys are configured.

    Its name does not reveal them.
    """
    # A header may hold bytes that are no text.
    scope = credentials.encode(errors="surrogateescape")
    name = blake2b(scope).hexdigest()[:16] if scope else ANONYMOUS
    return Tenant(name, scope, operator=True)


def _scope(name: str, record: TenantRecord) -> bytes:
    # No header holds a zero, so nobody has been in this scope without a key.
    kind, shared = ("tenant", name) if record.scope is None else ("scope", record.scope)
    return f"\0{kind}\0{shared}".encode()


def _read(file: Path) -> Mapping[str, TenantRecord]:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506
    except OSError as exc:
        raise ConfigError([f"tenants.file: {file} can't be read: {exc.strerror}"]) from exc
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        # What it says of it may show a key.
        mark = getattr(exc, "problem_mark", None)
        where = "" if mark is None else f", at line {mark.line + 1}"
        raise ConfigError([f"tenants.file: {file} is no YAML{where}"]) from exc
    try:
        records = _records.validate_python(data)
    except ValidationError as exc:
        # What was given isn't shown: it may be a key.
        raise ConfigError([_explain(error) for error in exc.errors()]) from None
    hashes = [each for record in records.values() for each in record.keys]
    if len(hashes) > len(set(hashes)):
        raise ConfigError(["tenants.file: a key stands twice in it"])
    return records


def _explain(error: Any) -> str:
    path = ".".join(("tenants.file", *(str(part) for part in error["loc"])))
    return f"{path}: {expected(error)}"
