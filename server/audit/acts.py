"""What is recorded in the audit log: acts, what changes without a request, counted requests.

An act has two lines: one that it begins, on disk before anything is done, and one with its result,
on disk before it is answered. If the first can't be written, the act isn't done: who may not see
what administrators do must not be served by a full disk. If the second can't, the first stands.
What isn't asked for by a request, such as a reload that revokes a key, is done in any case.

Requests that are refused, that an operator sends to an engine, or with which a page shows prompts
are counted, and written up to half a minute later, since there may be any number of them.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.audit.actor import HOST, Actor
from server.audit.counted import CountedRequests
from server.audit.log import AuditLog
from server.config.audit import AuditConfig

_WAIT_S = 10.0
_COUNTS_EVERY_S = 30.0
_FIRST_COUNTS_S = 1.0
_WHY_CHARACTERS = 200
_BEGUN, _DONE, _FAILED, _REFUSED = "begun", "done", "failed", "refused"
_ALLOWED = "allowed"
_RESULTS = {
    "refused_key": _REFUSED,
    "refused_route": _REFUSED,
    "operator_route": _ALLOWED,
    "show_prompts": _ALLOWED,
}


class AuditError(OSError):
    """An act can't be recorded, and so isn't done."""


class Act:
    """An act under way; `count` is set by who does it."""

    def __init__(self) -> None:
        self.count: int | Mapping[str, int] | None = None
        """How many things it has changed or given away."""


class Audit:
    """Records acts.

    Args:
        log: of this process; without one, nothing is recorded.
        clock: Unix s.
    """

    def __init__(self, log: AuditLog | None, clock: Callable[[], float] = time.time) -> None:
        self._log, self._clock = log, clock
        self._counted = CountedRequests()
        self._flush_at: asyncio.TimerHandle | None = None
        self._flushed_at = -_COUNTS_EVERY_S

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self._log is not None

    @asynccontextmanager
    async def act(self, name: str, actor: Actor, what: Mapping[str, Any]) -> AsyncIterator[Act]:
        """Record that an act begins, and at the end of the context its result.

        Raises:
            AuditError: the beginning can't be recorded.
        """
        act = Act()
        if self._log is None:
            yield act
            return
        await self._write(self._entry(name, actor, what, _BEGUN))
        ended: dict[str, Any] = {"result": _FAILED}
        try:
            yield act
            ended = {"result": _DONE}
        except BaseException as exc:
            ended["why"] = _why(exc)
            raise
        finally:
            if act.count is not None:
                ended["count"] = act.count
            # The log says that it failed; what is done can't be undone.
            with suppress(AuditError):
                await self._write(self._entry(name, actor, what, **ended))

    @asynccontextmanager
    async def lifetime(self, **what: Any) -> AsyncIterator[None]:
        """Record that the server starts and, at the end of the context, that it stops.

        Raises:
            AuditError: the start can't be recorded.
        """
        pid = {"pid": os.getpid()}
        if self._log is not None:
            await self._write(self._entry("start", HOST, pid | what, _DONE))
        try:
            yield
        finally:
            await self._note("stop", pid, _DONE)

    async def reloaded(self, files: Sequence[Path], cause: str, mistakes: Sequence[str]) -> None:
        """Record that files were read again, and what is wrong with them."""
        what = {"files": [*map(str, files)], "cause": cause}
        if mistakes:
            await self._note("reload", what, _FAILED, why="; ".join(mistakes)[:_WHY_CHARACTERS])
        else:
            await self._note("reload", what, _DONE)

    def count(self, act: str, actor: Actor, path: str) -> None:
        """Count a request, by its path; needs an event loop, and never waits.

        Args:
            act: `refused_key`, `refused_route`, `operator_route` or `show_prompts`.
            actor: who sent it.
            path: without its query.
        """
        if self._log is None:
            return
        self._counted.add(act, _RESULTS[act], actor, path, self._now())
        if self._flush_at is None:
            loop = asyncio.get_running_loop()
            now = loop.time()
            at = max(now + _FIRST_COUNTS_S, self._flushed_at + _COUNTS_EVERY_S)
            self._flush_at = loop.call_at(at, self._flush)

    def close(self) -> None:
        """Write what is pending, in a bounded time."""
        if self._log is not None:
            if self._flush_at is not None:
                self._flush_at.cancel()
            self._write_counts(self._log)
            self._log.close()

    def _flush(self) -> None:
        self._flush_at = None
        self._flushed_at = asyncio.get_running_loop().time()
        if self._log is not None:
            self._write_counts(self._log)

    def _write_counts(self, log: AuditLog) -> None:
        for act, result, actor, what, count in self._counted.take():
            log.submit(self._entry(act, actor, what, result, count=count), _forget)

    async def _note(self, name: str, what: Mapping[str, Any], result: str, **more: Any) -> None:
        if self._log is not None:
            with suppress(AuditError):
                await self._write(self._entry(name, HOST, what, result, **more))

    def _entry(
        self, act: str, actor: Actor, what: Mapping[str, Any], result: str, **more: Any
    ) -> dict[str, Any]:
        known = {name: value for name, value in actor._asdict().items() if value}
        entry: dict[str, Any] = {"time": self._now(), "act": act, **known, "what": what}
        return entry | more | {"result": result}

    def _now(self) -> str:
        at = datetime.fromtimestamp(self._clock(), UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    async def _write(self, entry: Mapping[str, Any]) -> None:
        """Wait until an entry is on disk.

        Raises:
            AuditError: it isn't.
        """
        if self._log is None:
            return
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()

        def done(error: OSError | None) -> None:
            # The loop is closed where nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_resolve, written, error)

        self._log.submit(entry, done)
        text = "The audit log can't be written, so nothing was done"
        try:
            async with asyncio.timeout(_WAIT_S):
                await written
        except TimeoutError as exc:
            raise AuditError(f"{text}: the disk does not answer.") from exc
        except OSError as exc:
            raise AuditError(f"{text}: {exc.strerror or exc}.") from exc


@contextmanager
def open_audit(config: AuditConfig | None, *, checks: bool = False) -> Iterator[Audit]:
    """Open the audit log of this process, if one is configured.

    Args:
        config: describes it.
        checks: whether its file is opened at once, not with the first line.

    Raises:
        ConfigError: its key can't be read, or its file can't be written.
    """
    if config is None:
        yield Audit(None)
        return
    audit = Audit(log := AuditLog(config))
    try:
        if checks:
            log.check()
        yield audit
    finally:
        audit.close()


def _resolve(written: "asyncio.Future[None]", error: OSError | None) -> None:
    if written.done():
        return
    if error is None:
        written.set_result(None)
    else:
        written.set_exception(error)


def _forget(_: OSError | None) -> None:
    """The log counts what isn't written."""


def _why(exc: BaseException) -> str:
    if not isinstance(exc, Exception):
        return "it was interrupted"
    return (str(exc) or type(exc).__name__)[:_WHY_CHARACTERS]
