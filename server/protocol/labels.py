"""The labels of an answer, by which it may be purged: its model, its tenant, its request's tags."""

import re
from collections.abc import Iterable

from server.auth.tenant import A_TENANT, TENANT
from tiers.key import is_key
from tiers.purges.table import KEY, label

KINDS = (KEY, "model", "tenant", "tag")
"""The kinds of labels by which clients of the admin API purge."""
MAX_TAGS = 16
MAX_TAG_CHARACTERS = 128

A_TAG = f"1 to {MAX_TAG_CHARACTERS} printable characters"
"""What a tag should be."""
_is_tenant = re.compile(TENANT).fullmatch


def labels_of(model: str, tenant: str, tags: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of an answer to a request of the tenant with this name."""
    tagged = (label("tag", tag) for tag in tags)
    return tuple(dict.fromkeys((label("model", model), label("tenant", tenant), *tagged)))


def label_problem(kind: str, name: str) -> str | None:
    """Return what a name of that kind should be, if no entry can ever have the label."""
    if kind == KEY and not is_key(name):
        return "as `tierserve cache ls` prints it: 64 hexadecimal digits, after a tenant's scope"
    if kind == "tenant" and not _is_tenant(name):
        return A_TENANT
    if kind == "tag" and not _is_tag(name):
        return A_TAG
    return None


def require_tag(text: str) -> str:
    """Return a tag.

    Raises:
        ValueError: the text can't be one.
    """
    if not _is_tag(text):
        raise ValueError(f"should be {A_TAG}")
    return text


def _is_tag(text: str) -> bool:
    return 0 < len(text) <= MAX_TAG_CHARACTERS and text.isprintable()
