"""Whether a target is there, which model it has, and whether it is ready; asked before a run."""

import http.client
import socket
import ssl
from contextlib import closing
from urllib.parse import urlsplit

import orjson

from server.bench.load import Target
from server.config.base import ConfigError

_TIMEOUT_S = 10.0
_LIMIT = 4 * 1024 * 1024


def find_model(target: Target, wanted: str | None) -> str:
    """Return the model to ask: the wanted one, or else the target's first.

    Raises:
        ConfigError: the target can't be reached, refuses the key, or names no model where none is
            wanted.
    """
    status, body = _get(target, "/v1/models")
    if status in (401, 403):
        raise ConfigError(
            [f"URL: {target.url} refuses the key (status {status}): give --api-key or --header"]
        )
    if wanted is not None:
        # Servers with aliases and adapters may not list all names: the run itself shows errors.
        return wanted
    if not (names := _names(body) if status == 200 else []):
        raise ConfigError(
            [f"--model: should be given, since {target.url}/v1/models names none (status {status})"]
        )
    return names[0]


def is_ready(target: Target) -> bool:
    """Return whether an engine is there, as far as the target tells (`/ready` of tierserve)."""
    return _get(target, "/ready")[0] != 503


def _names(body: bytes) -> list[str]:
    try:
        found = orjson.loads(body)
        return [str(model["id"]) for model in found["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _get(target: Target, path: str) -> tuple[int, bytes]:
    parts = urlsplit(target.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host = parts.hostname or ""
    try:
        with closing(kind(host, parts.port, timeout=_TIMEOUT_S)) as connection:
            connection.request("GET", parts.path + path, headers=dict(target.headers))
            response = connection.getresponse()
            return response.status, response.read(_LIMIT)
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        raise ConfigError([f"URL: {target.url} can't be reached: {_reason(exc)}"]) from exc


def _reason(exc: Exception) -> str:
    match exc:
        case TimeoutError():
            return f"it gave no answer within {_TIMEOUT_S:.0f} s"
        case socket.gaierror() | UnicodeError():
            return "its name isn't known"
        case ssl.SSLError():
            return f"TLS failed: {exc.reason or exc}"
        case OSError():
            return exc.strerror or str(exc)
        case _:
            return "its answer isn't HTTP"
