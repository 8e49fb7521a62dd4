"""The shared tier's server, as a URL names it.

Redis's schemes are those of redis-py; `memcached://host:port` is after their fashion.
"""

import re
from importlib.util import find_spec
from urllib.parse import SplitResult, parse_qsl, urlsplit

_MEMCACHED_PORT = 11211
_PACKAGES = {"redis": "redis", "rediss": "redis", "unix": "redis", "memcached": "aiomcache"}
_EXTRAS = {"redis": "redis", "aiomcache": "memcached"}
_TLS_OPTIONS = frozenset(
    {"ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname",
     "ssl_keyfile"}
)  # fmt: skip
_SHAPE = (
    "redis://user:password@host:6379/0, rediss://host:6379/0, unix:///path/to/socket?db=0, or "
    "memcached://host:11211"
)


def validate_url(url: str) -> str:
    """Return `url` if there is a backend for it.

    Raises:
        ValueError: it is of another shape, or a package is missing.
    """
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in _PACKAGES and _is_right(parts)
    except ValueError:
        is_right = False
    if not is_right:
        raise ValueError(f"should be as {_SHAPE}")
    package = _PACKAGES[parts.scheme]
    if find_spec(package) is None:
        extra = _EXTRAS[package]
        raise ValueError(f"needs the extra {extra}, as scripts/setup {extra} installs it")
    return url


def mask_url(url: str) -> str:
    """Return `url` without what may be secret in it, to be shown; any other text as it is."""
    # Somebody may have forgotten the scheme.
    without_user = re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"(://[^?]*)\?.*", r"\1?***", without_user, flags=re.DOTALL)


def _is_right(parts: SplitResult) -> bool:
    """Whether what follows the scheme is right.

    Raises:
        ValueError: a port isn't a port.
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
