"""The labels of an answer, by which it may be purged: its model, its tenant, its request's tags."""

import re
from collections.abc import Iterable
from typing import Any

from tiers.key import is_key
from tiers.purges.table import KEY, label

KINDS = (KEY, "model", "tenant", "tag")
"""The kinds of labels by which clients of the admin API purge."""
TENANT = "[A-Za-z0-9._-]{1,64}"
"""The names of tenants."""
MAX_TAGS = 16
MAX_TAG_CHARACTERS = 128

A_TAG = f"1 to {MAX_TAG_CHARACTERS} printable characters"
"""What a tag should be."""
_is_tenant = re.compile(TENANT).fullmatch


def labels_of(model: str, tenant: str, tags: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of a request's answer; `tenant` is the name of who asks."""
    tagged = (label("tag", tag) for tag in tags)
    return tuple(dict.fromkeys((label("model", model), label("tenant", tenant), *tagged)))


def label_problem(kind: str, name: str) -> str | None:
    """Return what a name of that kind should be, if no entry can ever have the label."""
    if kind == KEY and not is_key(name):
        return "as `tierserve cache ls` prints it: 64 hexadecimal digits, after a tenant's scope"
    if kind == "tenant" and not _is_tenant(name):
        return "1 to 64 letters, digits, dots, dashes or underscores"
    if kind == "tag" and not is_tag(name):
        return A_TAG
    return None


def is_tag(tag: Any) -> bool:
    """Whether a value may be a tag."""
    return isinstance(tag, str) and 0 < len(tag) <= MAX_TAG_CHARACTERS and tag.isprintable()
