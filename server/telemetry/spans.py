"""Spans: the steps of a request's road, as a trace shows them.

Who traces a request is known by a context variable and not by argument, since a flight serves many
requests: its steps belong to the one that has launched it. Where nothing is traced, a step costs
less than half a microsecond.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol, Self

from server.telemetry.served import Served


class Step:
    """A step that isn't traced: the base of those that are. A context manager."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def set_attributes(self, **attributes: str | int | bool) -> None:
        """Say more about it, as `tierserve.NAME`."""

    def end(self) -> None:
        """End it before its context does."""


class EngineSpan(Step):
    """The step of asking an engine."""

    __slots__ = ()

    def inject(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers by which the engine's own spans become a part of the trace."""
        return headers

    def set_reply(self, status: int, host: str | None, port: int | None) -> None:
        """Say which server has answered, and how."""


class RequestTrace(Protocol):
    """The trace of one request."""

    def step(self, name: str) -> Step:
        """Begin a step."""

    def engine_request(self, method: str) -> EngineSpan:
        """Begin the step of asking an engine."""

    def set_served(self, served: Served) -> None:
        """Note what the request was served."""


current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)
"""The trace of the request that is served, if it is traced."""

UNTRACED = Step()
_UNTRACED_REQUEST = EngineSpan()


def step(name: str) -> Step:
    """Begin a step of the request that is served."""
    trace = current.get()
    return UNTRACED if trace is None else trace.step(name)


def engine_request(method: str) -> EngineSpan:
    """Begin the step of asking an engine for the request that is served."""
    trace = current.get()
    return _UNTRACED_REQUEST if trace is None else trace.engine_request(method)
