"""What keeps tenants apart in an engine that serves them all.

vLLM finds the beginning of a prompt again only under the same `cache_salt`, so nobody can tell by
an answer's timing, or by its `cached_tokens`, what another tenant has asked. It finds media again
by the `uuid` that a client gives them, whoever asks, so that is made the tenant's own, too. What a
client sends as either is combined with its tenant's salt, and can't name another's. A transfer of
KV or encoder caches names what is another request's, and is for operators, such as routers.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.auth.tenants import Tenant
from server.protocol.errors import BadRequestError
from tiers import digest

SALTED = frozenset(
    {
        "/classify", "/generative_scoring", "/invocations", "/pooling", "/rerank", "/score",
        "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/embeddings",
        "/v1/messages", "/v1/rerank", "/v1/responses", "/v1/score", "/v1/systemone", "/v2/rerank",
    }
)  # fmt: skip
"""vLLM's routes that take a salt, but for the one that is for other engines."""
_SALT = "cache_salt"
_TRANSFERS = ("ec_transfer_params", "kv_transfer_params")


def with_cache_salt(
    raw: bytes, body: dict[str, Any], tenant: Tenant
) -> tuple[bytes, dict[str, Any]]:
    """Return a request's body as the engine may be sent it for `tenant`, written and parsed.

    Args:
        raw: the body, a JSON object, for one of the routes in `SALTED`.
        body: the same, parsed; it isn't changed.
        tenant: who asks.

    Raises:
        BadRequestError: the body asks for what isn't a tenant's, or is nested too deeply.
    """
    if (salt := tenant.salt) is None:
        return raw, body
    for name in _TRANSFERS:
        if body.get(name) is not None and not tenant.operator:
            raise BadRequestError(f"{name} takes an operator's key", name)
    given = body.get(_SALT)
    if given is None:
        made = body | {_SALT: salt}
    elif isinstance(given, str) and given:
        made = body | {_SALT: _own(salt, given)}
    else:
        # The engine refuses it.
        return raw, body
    # The key may be written with escapes.
    names_media = (b"uuid" in raw or b"\\u" in raw) and any(_media_in(body))
    if names_media:
        made = json.loads(_dumps(made))
        for part in _media_in(made):
            # As vLLM does, which takes any value for text.
            part["uuid"] = _own(salt, str(part["uuid"]))
    if names_media or _SALT in body:
        return _dumps(made), made
    # All else stays as the client wrote it.
    comma = b"," if body else b""
    return raw.rstrip()[:-1] + comma + b'"%s":"%s"}' % (_SALT.encode(), salt.encode()), made


def _own(salt: str, given: str) -> str:
    return digest(salt.encode(), given.encode(errors="surrogatepass"))


def _media_in(body: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of contents that name their media by a `uuid`."""
    rest = [body]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            # Of tokens there may be many.
            rest += [each for each in value if isinstance(each, list | dict)]
        elif isinstance(value, Mapping):
            if isinstance(content := value.get("content"), list):
                yield from filter(_has_uuid, content)
            rest += value.values()


def _has_uuid(part: Any) -> bool:
    return isinstance(part, dict) and part.get("uuid") is not None


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError as exc:
        raise BadRequestError("the body is nested too deeply") from exc
