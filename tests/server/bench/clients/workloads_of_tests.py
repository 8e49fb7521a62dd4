"""Workloads whose requests say which they are."""

import os
from collections.abc import Sequence

import orjson

from server.bench.workload import Session, Step

CHAT = "/v1/chat/completions"


class Numbered:
    """Sessions that are told apart by their bodies; `thinks` are the pauses before later steps."""

    name = "numbered"

    def __init__(
        self,
        *,
        stream: bool = False,
        count: int | None = None,
        at: Sequence[float] | None = None,
        thinks: Sequence[float] = (),
        path: str = CHAT,
    ) -> None:
        self.stream, self.count, self.path = stream, count, path
        self.at, self.thinks = at, thinks

    def session(self, number: int) -> Session:
        return Session(
            tuple(
                Step(self.path, orjson.dumps({"session": number, "step": step}), self.stream, think)
                for step, think in enumerate((0.0, *self.thinks))
            )
        )

    def times(self, count: int) -> list[float] | None:
        return None if self.at is None else list(self.at[:count])

    def digest(self) -> str:
        return "numbered"


class Failing(Numbered):
    """Its third session can't be made; or making it ends the process."""

    def __init__(self, *, ends: bool) -> None:
        super().__init__()
        self.ends = ends

    def session(self, number: int) -> Session:
        if number == 2:
            if self.ends:
                os._exit(7)
            raise ValueError("no session 2")
        return super().session(number)
