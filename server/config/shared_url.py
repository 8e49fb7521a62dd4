"""The URL of the shared tier's server.

The schemes for Redis are redis-py's; `memcached://host:port` is made alike.
"""

import re
from importlib.util import find_spec
from urllib.parse import SplitResult, parse_qsl, urlsplit

from server.config.base import conflict

MEMCACHED_PORT = 11211
"""Port of a `memcached://` URL without one."""
_PACKAGES = {"redis": "redis", "rediss": "redis", "unix": "redis", "memcached": "aiomcache"}
_EXTRAS = {"redis": "redis", "aiomcache": "memcached"}
_TLS_OPTIONS = frozenset(
    {"ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname",
     "ssl_keyfile"}
)  # fmt: skip
_FORMS = (
    "redis://user:password@host:6379/0, rediss://host:6379/0, unix:///path/to/socket?db=0, or "
    "memcached://host:11211"
)


def validate_url(url: str) -> str:
    """Return `url` if a backend takes it.

    Raises:
        ValueError: the URL has another form, or the backend's package is missing.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in _PACKAGES and _is_valid(parts)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"should be as {_FORMS}")
    package = _PACKAGES[parts.scheme]
    if find_spec(package) is None:
        extra = _EXTRAS[package]
        raise conflict(f"needs the extra {extra}: install tierserve[{extra}]")
    return url


def mask_url(url: str) -> str:
    """Return `url` with its secrets masked; a text that is no URL stays as it is."""
    # The scheme may be missing by mistake.
    without_user = re.sub(r"^([\w+]+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"(://[^?]*)\?.*", r"\1?***", without_user, flags=re.DOTALL)


def _is_valid(parts: SplitResult) -> bool:
    """Return whether the parts after the scheme are valid.

    Raises:
        ValueError: the port is no port's number.
    """
    options = [name for name, _ in parse_qsl(parts.query, strict_parsing=bool(parts.query))]
    if parts.fragment:
        return False
    if parts.scheme == "unix":
        return parts.path.startswith("/") and not parts.hostname and set(options) <= {"db"}
    if not parts.hostname or parts.port == 0:
        return False
    if parts.scheme == "memcached":
        return "@" not in parts.netloc and parts.path in {"", "/"} and not parts.query
    known = _TLS_OPTIONS if parts.scheme == "rediss" else frozenset()
    return set(options) <= known and re.fullmatch(r"(/\d*)?", parts.path) is not None
