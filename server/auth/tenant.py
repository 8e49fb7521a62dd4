"""A tenant: who asks, whose answers it shares, and what it may do."""

from hashlib import blake2b

from server.auth.limits import Limits, RateLimiter
from tiers.key import digest, scoped

TENANT = "[A-Za-z0-9._-]{1,64}"
"""The pattern of a tenant's name."""
A_TENANT = "1 to 64 letters, digits, dots, dashes or underscores"
"""What a tenant's name should be."""
ANONYMOUS = "anonymous"
"""The tenant of requests without credentials, where none are needed."""


class Tenant:
    """A client or a group of clients. Two tenants are equal only if they are the same object.

    Args:
        name: its name in metrics and purges.
        scope: tenants with the same scope share answers.
        share_scope: the scope in its keys, to which the tiers grant a share of their bytes; none if
            empty.
        salt: keeps its prompts apart in an engine's prefix cache; `None` to share the cache.
        operator: whether it may use every route.
        limiter: counts and limits its requests; `None` where no keys are configured.
        revision: which reading of the tenants' file the tenant comes from.
    """

    __slots__ = ("limiter", "name", "operator", "revision", "salt", "scope", "share_scope")

    def __init__(
        self,
        name: str,
        scope: bytes,
        *,
        share_scope: str = "",
        salt: str | None = None,
        operator: bool = False,
        limiter: RateLimiter | None = None,
        revision: int = 0,
    ) -> None:
        self.name, self.scope, self.share_scope, self.salt = name, scope, share_scope, salt
        self.operator, self.limiter, self.revision = operator, limiter, revision

    @property
    def has_key(self) -> bool:
        """Whether its key is one of ours, which no engine gets."""
        return self.limiter is not None


def salt_of(share_scope: str, *parts: bytes) -> str:
    """Return a salt of prompts: the scope whose prompts it salts, and a digest of the parts."""
    return scoped(share_scope, digest(*parts))


NOBODY = Tenant("nobody", b"\0nobody", limiter=RateLimiter(Limits()))
"""The tenant of requests that need no key."""


def open_tenant(credentials: str) -> Tenant:
    """Return the tenant with these credentials where no keys are configured.

    Its name doesn't reveal them.
    """
    # A header may hold bytes that aren't text.
    scope = credentials.encode(errors="surrogateescape")
    name = blake2b(scope).hexdigest()[:16] if scope else ANONYMOUS
    return Tenant(name, scope, operator=True)
