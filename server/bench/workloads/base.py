"""What all workloads share: options, the seed, and the digest that tells equal ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from hashlib import blake2b
from typing import Generic, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict

from server.bench.workload import Session, Step
from server.bench.workloads.requests import Common, Message, make_step

_VERSION = 1
"""Of texts and bodies: another one means that equal options give other requests."""


class Options(BaseModel):
    """Options of a workload; subclasses name them, with their bounds and defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


OptionsT = TypeVar("OptionsT", bound=Options)


class BuiltWorkload(ABC, Generic[OptionsT]):
    """A workload (`server.bench.workload.Workload`) with options.

    Args:
        name: as it is given on the command line.
        kind: the name of its kind, which the digest has.
        options, common: what decides the requests.
    """

    count: int | None = None
    answer_tokens = 128
    """The longest answer where no option has another."""

    def __init__(self, name: str, kind: str, options: OptionsT, common: Common) -> None:
        self.name, self.kind, self.options, self.common = name, kind, options, common

    def with_common(self, common: Common) -> Self:
        """Return the workload with requests that have something else in common.

        Only what `digest` leaves out may differ: what was read is kept.
        """
        # Copies as pickle does, so without the requests that were kept.
        other = copy(self)
        other.common = common
        return other

    @abstractmethod
    def session(self, number: int) -> Session:
        """Return the session of this number."""

    @abstractmethod
    def repeated(self) -> Iterator[Step]:
        """Yield the different requests that a warm cache knows, the most frequent first.

        They are those that come again by themselves, or one with each beginning where requests
        share no more than these. What should be unseen isn't among them. A file's are all of its
        requests, in their order.
        """

    def times(self, count: int) -> list[float] | None:  # noqa: ARG002
        """Return when the first `count` sessions begin; by default a workload has no times."""
        return None

    def content(self) -> str:
        """Return the digest of the file that the workload reads; empty without one."""
        return ""

    def digest(self) -> str:
        """Return what tells equal workloads; tag, nonce and first session are left out."""
        common = self.common
        fields = {
            "version": _VERSION,
            "kind": self.kind,
            "options": self.options.model_dump(),
            "content": self.content(),
            "model": common.model,
            "route": common.route,
            "stream": common.stream,
            "max_tokens": common.max_tokens,
            "temperature": common.temperature,
            "seed": common.seed,
            "ignore_eos": common.ignore_eos,
        }
        return blake2b(orjson.dumps(fields), digest_size=16).hexdigest()

    def _step(self, messages: Sequence[Message], think_s: float = 0.0) -> Step:
        """Return a request whose answer is as long as the options say."""
        limit = self.common.max_tokens or self.answer_tokens
        return make_step(self.common, messages, limit, think_s=think_s)


class EndlessWorkload(BuiltWorkload[OptionsT]):
    """A workload without an end, whose sessions are made from their numbers."""

    def session(self, number: int) -> Session:
        return self._made(self.common.first_session + number)

    @abstractmethod
    def _made(self, number: int) -> Session:
        """Return the session of this number."""
