"""Access control: which tenant a request is of, whether it is allowed, and who sends it.

An access check is given a request, notes its tenant on it, and returns the response that refuses
it, or `None` if it is allowed. `server.web.middleware` calls it before the handler.
"""

import socket
import struct
from collections.abc import Callable
from hmac import compare_digest

from aiohttp import web

from server.audit.actor import Actor, key_name
from server.audit.acts import Audit
from server.auth.credentials import bearer_key, presented_credentials
from server.auth.tenants import Tenants
from server.config.secrets import hash_key
from server.protocol.routes import is_tenant_allowed
from server.web.request import HttpRequest
from server.web.responses import error_response

# The kernel's `struct ucred` (unix(7)): process, user and group.
_CREDENTIALS = struct.Struct("3i")
_READS = ("GET", "HEAD", "OPTIONS")
AccessCheck = Callable[[HttpRequest], web.Response | None]


class AccessControl:
    """The access checks of all routes.

    Args:
        tenants: who is allowed.
        audit: records who isn't, and what operators ask of an engine.
    """

    def __init__(self, tenants: Tenants, audit: Audit) -> None:
        self._tenants, self._audit = tenants, audit
        self.unauthorized = 0
        """How many requests had no valid key."""

    def require_tenant(self, http: HttpRequest) -> web.Response | None:
        """Allow a tenant within its rate limits."""
        # As `identify_tenant` does; every hit would pay for the call.
        tenant = self._tenants.find(http.headers)
        if tenant is None:
            return self._unauthorized(http)
        http.tenant = tenant
        limiter = tenant.limiter
        if limiter is None:
            return None
        limited = limiter.acquire()
        http.more_headers = limiter.headers
        if limited is None:
            http.limiter = limiter
            return None
        return error_response(
            429,
            limited.text,
            kind="requests",
            code="rate_limit_exceeded",
            retry_after_s=limited.retry_after_s,
        )

    def identify_tenant(self, http: HttpRequest) -> web.Response | None:
        """Allow any tenant without counting the request, for routes that cost no engine time."""
        tenant = self._tenants.find(http.headers)
        if tenant is None:
            return self._unauthorized(http)
        http.tenant = tenant
        return None

    def require_operator(self, http: HttpRequest) -> web.Response | None:
        """Allow operators, within their rate limits."""
        if (refused := self.require_tenant(http)) is not None:
            return refused
        if http.tenant.operator:
            return None
        _record(self._audit, "refused_route", http, http.tenant.name)
        return _forbidden()

    def for_engine_path(self, path: str) -> AccessCheck:
        """Return the check for requests that ask an engine for `path`."""
        return self.require_tenant if is_tenant_allowed(path) else self.require_operator

    def for_request_path(self, http: HttpRequest) -> web.Response | None:
        """Allow tenants that may request this path of an engine."""
        refused = self.for_engine_path(http.path)(http)
        if refused is None and http.method not in _READS and not is_tenant_allowed(http.path):
            _record(self._audit, "operator_route", http, http.tenant.name)
        return refused

    def _unauthorized(self, http: HttpRequest) -> web.Response:
        self.unauthorized += 1
        return unauthorized(http, self._audit)


def allow_anyone(_: HttpRequest) -> None:
    """Allow every request."""


def require_key(key_hash: str, audit: Audit) -> AccessCheck:
    """Return the check that allows the key with this hash, and no other, and records others."""

    def check(http: HttpRequest) -> web.Response | None:
        key = bearer_key(presented_credentials(http.headers))
        # An empty key never authenticates, also where an empty text was hashed by mistake.
        is_valid = bool(key) and compare_digest(hash_key(key), key_hash)
        return None if is_valid else unauthorized(http, audit)

    return check


def unauthorized(http: HttpRequest, audit: Audit) -> web.Response:
    """Return the response to a request without a valid key; it doesn't repeat the key."""
    _record(audit, "refused_key", http)
    if presented_credentials(http.headers):
        text = "Incorrect API key provided."
    else:
        text = (
            "You didn't provide an API key. You need to provide your API key in an Authorization "
            "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    refused = error_response(401, text, kind="invalid_request_error", code="invalid_api_key")
    refused.headers["WWW-Authenticate"] = "Bearer"
    return refused


def actor_of(http: HttpRequest, who: str) -> Actor:
    """Return who sends a request and from where, as the audit log has it."""
    peer = None if http.transport is None else http.transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        key = bearer_key(presented_credentials(http.headers))
        return Actor(who, key_name(key), str(peer[0]), http.id)
    return Actor(who, source=_unix_peer(http), request_id=http.id)


def _unix_peer(http: HttpRequest) -> str:
    """Return the process and the user at the other end of a Unix socket."""
    connection = None if http.transport is None else http.transport.get_extra_info("socket")
    if connection is None:
        return ""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return f"unix:uid={uid},pid={pid}"


def _record(audit: Audit, act: str, http: HttpRequest, who: str = "") -> None:
    if audit.is_on:
        audit.count(act, actor_of(http, who), http.path)


def _forbidden() -> web.Response:
    text = "This key does not allow that; it takes an operator's."
    return error_response(403, text, kind="invalid_request_error", code="insufficient_permissions")
