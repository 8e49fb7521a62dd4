"""What of a configuration can change while the server runs: the fields marked `RELOADED`.

Of a file that is read again these are taken over. All others keep their values until the next
start, and are named, as PostgreSQL does; a file with a mistake changes nothing.
"""

from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from server.config.base import RELOAD_MARK, Section

_Section = TypeVar("_Section", bound=Section)


class Changes(NamedTuple):
    """What differs between the configuration that runs and the one that was read, by path."""

    taken: list[str]
    """Fields that have their new values now."""
    waiting: list[str]
    """Fields that have their new values at the next start."""


def take_over(running: _Section, read: _Section) -> tuple[_Section, Changes]:
    """Return `running` with the values of `read` that can change now, and what differs."""
    changes = Changes([], [])
    return _merged(running, read, (), changes), changes


def is_reloaded(section: type[Section], name: str) -> bool:
    """Return whether a field can change while the server runs."""
    extra = section.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and RELOAD_MARK in extra


def _merged(running: _Section, read: _Section, path: tuple[str, ...], changes: Changes) -> _Section:
    inner: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name in type(running).model_fields:
        old, new = getattr(running, name), getattr(read, name)
        if old == new:
            continue
        at = (*path, name)
        if is_reloaded(type(running), name):
            own[name] = new
        elif isinstance(old, Section) and isinstance(new, Section):
            inner[name] = _merged(old, new, at, changes)
        elif _holds_sections(old) and _holds_sections(new):
            inner[name] = _merged_items(old, new, at, changes)
        else:
            changes.waiting.append(".".join(at))
    merged = running.model_copy(update=inner | own)
    # What could change may fit only with what can't.
    fits = not own or _is_valid(merged)
    named = changes.taken if fits else changes.waiting
    named.extend(".".join((*path, name)) for name in own)
    return merged if fits else running.model_copy(update=inner)


def _merged_items(
    running: dict[str, Section], read: dict[str, Section], path: tuple[str, ...], changes: Changes
) -> dict[str, Section]:
    """Return the items of `running`, each with what can change now; none comes, goes or moves."""
    if [*running] != [*read]:
        # Where they are the same in another order, that is what waits.
        moved = [(*path, name) for name in sorted(running.keys() ^ read.keys())] or [path]
        changes.waiting.extend(map(".".join, moved))
    return {
        name: _merged(item, read[name], (*path, name), changes) if name in read else item
        for name, item in running.items()
    }


def _holds_sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, Section) for each in value.values())


def _is_valid(section: Section) -> bool:
    try:
        type(section)(**{name: getattr(section, name) for name in type(section).model_fields})
    except ValidationError:
        return False
    return True
