"""Salts that keep tenants apart in an engine that serves all of them.

vLLM reuses the beginning of a prompt only under the same `cache_salt`, so no tenant can learn from
an answer's timing, or from its `cached_tokens`, what another tenant has asked. vLLM finds media by
the `uuid` that a client gives them, for all tenants alike, so these get a tenant's salt as well.
A client's own salt or `uuid` is hashed together with its tenant's salt, so it can't name another
tenant's. A salt begins with its tenant's scope, by which stored prefixes are purged. Transfers of
KV or encoder caches name another request's data, and are for operators.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.auth.tenant import Tenant, salt_of
from server.protocol.bodies import write_leniently
from server.protocol.errors import BadRequestError
from tiers import digest

_SALT = "cache_salt"
_TRANSFERS = ("ec_transfer_params", "kv_transfer_params")


def with_cache_salt(
    raw: bytes, body: dict[str, Any], tenant: Tenant
) -> tuple[bytes, dict[str, Any]]:
    """Return a request's body with the salt of its tenant, written and parsed.

    Args:
        raw: the body, a JSON object, for a route that takes a salt.
        body: the same, parsed; it isn't changed.
        tenant: who asks.

    Raises:
        BadRequestError: the body has what only an operator may send, or is nested too deeply.
    """
    if (salt := tenant.salt) is None:
        return raw, body
    for name in _TRANSFERS:
        if body.get(name) is not None and not tenant.operator:
            raise BadRequestError(f"{name} takes an operator's key", name)
    own_salt = body.get(_SALT)
    if own_salt is None:
        salted = body | {_SALT: salt}
    elif isinstance(own_salt, str) and own_salt:
        own = own_salt.encode(errors="surrogatepass")
        salted = body | {_SALT: salt_of(tenant.share_scope, salt.encode(), own)}
    else:
        # The engine refuses it.
        return raw, body
    # The name of the field may be written with escapes.
    names_media = (b"uuid" in raw or b"\\u" in raw) and any(_media_in(body))
    if names_media:
        salted = json.loads(write_leniently(salted))
        for part in _media_in(salted):
            # vLLM, too, makes text of any value.
            part["uuid"] = _hash(salt, str(part["uuid"]))
    if names_media or _SALT in body:
        return write_leniently(salted), salted
    # Appending the salt leaves the rest as the client wrote it.
    comma = b"," if body else b""
    return raw.rstrip()[:-1] + comma + b'"%s":"%s"}' % (_SALT.encode(), salt.encode()), salted


def _hash(salt: str, text: str) -> str:
    return digest(salt.encode(), text.encode(errors="surrogatepass"))


def _media_in(body: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of contents that name their media by a `uuid`."""
    rest = [body]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            # Lists of tokens may be long, so only what can hold media is visited.
            rest += [each for each in value if isinstance(each, list | dict)]
        elif isinstance(value, Mapping):
            if isinstance(content := value.get("content"), list):
                yield from filter(_has_uuid, content)
            rest += value.values()


def _has_uuid(part: Any) -> bool:
    return isinstance(part, dict) and part.get("uuid") is not None
