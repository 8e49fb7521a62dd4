"""Spans: the steps of a request in its trace, without a dependency on OpenTelemetry.

The trace is in a context variable, not an argument, since a flight serves many requests: its steps
belong to the request that started it. A step that isn't traced costs less than half a microsecond.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol, Self

from server.telemetry.served import Served


class TracedStep:
    """A step that isn't traced, and the base class of traced ones; a context manager."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def set_attributes(self, **attributes: str | int | bool) -> None:
        """Set attributes `tierserve.NAME` of its span."""

    def end(self) -> None:
        """End it before its context exits."""


class EngineSpan(TracedStep):
    """The step of an engine's request."""

    __slots__ = ()

    def inject(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with the trace's context, so that the engine's spans join it."""
        return headers

    def set_reply(self, status: int, host: str | None, port: int | None) -> None:
        """Set the status of the reply, and the address of the server."""


class RequestTrace(Protocol):
    """The trace of one request."""

    def step(self, name: str) -> TracedStep:
        """Begin a step."""

    def engine_request(self, method: str) -> EngineSpan:
        """Begin the step of an engine's request."""

    def set_served(self, served: Served) -> None:
        """Record how the request was served."""


current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)
"""The trace of the current request, if it is traced."""

UNTRACED = TracedStep()
_UNTRACED_REQUEST = EngineSpan()


def step(name: str) -> TracedStep:
    """Begin a step of the current request."""
    trace = current.get()
    return UNTRACED if trace is None else trace.step(name)


def engine_request(method: str) -> EngineSpan:
    """Begin the step of an engine's request for the current request."""
    trace = current.get()
    return _UNTRACED_REQUEST if trace is None else trace.engine_request(method)
