"""Models whose engines another process runs, and whose upstreams it probes: those of a worker.

That process reports what changes. Invariants: a worker probes nothing; an answer is kept only if
the process that could have stopped its engine says that it has not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from server.config.models import ModelConfig
from server.engine.models import (
    Identities,
    Models,
    ServedModel,
    ServedModels,
    UsageOf,
    join_upstreams,
)
from server.engine.routing.addresses import Addresses, UpstreamAddress
from server.engine.supervisor import EngineState
from server.engine.turns import Turns
from server.engine.upstream import Upstream


@dataclass(frozen=True, slots=True)
class UpstreamReport:
    """The state of an upstream."""

    url: str
    ip: str | None
    """Its address: see `UpstreamAddress`."""
    ready_since: float | None
    """In monotonic seconds, which all processes of a machine share."""
    loading: bool
    foreign: int
    """Its requests that no process of ours has sent."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What the process that runs the engines says of a model."""

    name: str
    root: str
    identities: Mapping[str, str]
    depends_on_date: bool
    state: EngineState
    restarts: int
    socket: str | None
    """The Unix socket of its engine; `None` where the user runs its upstreams."""
    upstreams: Sequence[UpstreamReport]

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the report that orjson wrote."""
        upstreams = [UpstreamReport(**each) for each in fields["upstreams"]]
        state = EngineState(fields["state"])
        return cls(**{**fields, "upstreams": upstreams, "state": state})


def report_on(models: Models) -> Iterator[ModelReport]:
    """Yield the reports on all models."""
    for model in models.all:
        yield ModelReport(
            model.name,
            model.root,
            model.identities.by_name,
            model.identities.depends_on_date,
            model.state,
            model.restarts,
            None if model.engine is None else model.engine.socket,
            [
                UpstreamReport(
                    *each.address,
                    each.upstream.ready_since,
                    each.upstream.loading,
                    each.load.foreign,
                )
                for each in model.upstreams.members
            ],
        )


class EngineProcess(Protocol):
    """The process that runs the engines, and probes the upstreams."""

    def note_unreachable(self, model: str, upstream: str, exc: Exception) -> None:
        """Tell it that an upstream of a model, by its label, took no connection."""

    async def has_run_since(self, model: str, since: float) -> bool:
        """Ask it whether a model's engine has not begun to stop since then (monotonic s).

        It is false where the process doesn't answer.
        """


class _FollowedUpstream(Upstream):
    """An upstream that another process probes."""

    def __init__(self, url: str, process: EngineProcess, *, model: str, **options: Any) -> None:
        super().__init__(url, model=model, **options)
        self._process, self._model = process, model
        self._is_engine = options["socket"] is not None

    def mark_unreachable(self, exc: Exception) -> None:
        super().mark_unreachable(exc)
        self._process.note_unreachable(self._model, self.label, exc)

    async def keeps_generating(
        self, *, since: float, model: str, headers: Mapping[str, str]
    ) -> bool:
        if self._is_engine:
            return await self._process.has_run_since(self._model, since)
        return await super().keeps_generating(since=since, model=model, headers=headers)


class _FollowedModel(ServedModel):
    """A model of which another process reports."""

    def __init__(
        self,
        config: ModelConfig,
        report: ModelReport,
        process: EngineProcess,
        usage_of: UsageOf,
        turns: Turns,
    ) -> None:
        name, socket = report.name, report.socket
        # Upstreams are also made later, when it may have changed.
        self.config = config

        def make(address: UpstreamAddress) -> Upstream:
            return _FollowedUpstream(
                address.url,
                process=process,
                ip=address.ip,
                timeout_s=self.config.timeout_s,
                model=name,
                socket=socket,
                name="" if socket is None else f"the engine of {name}",
                api_key=self.config.api_key,
            )

        identities = Identities(report.identities, report.depends_on_date)
        upstreams = join_upstreams(
            name,
            config,
            identities,
            Addresses(()),
            make,
            usage_of,
            turns,
        )
        super().__init__(name, config, upstreams, identities, report.root)
        self._report = report
        self.follow(report)

    @property
    def state(self) -> EngineState:
        return self._report.state

    @property
    def restarts(self) -> int:
        return self._report.restarts

    def follow(self, report: ModelReport) -> None:
        """Take over a report."""
        self._report = report
        self._identities = Identities(report.identities, report.depends_on_date)
        self.upstreams.follow(UpstreamAddress(each.url, each.ip) for each in report.upstreams)
        for member, each in zip(self.upstreams.members, report.upstreams, strict=True):
            member.upstream.follow(each.ready_since, loading=each.loading)
            member.load.foreign = each.foreign


class FollowedModels(ServedModels):
    """All models of a worker.

    Args:
        configs: their configurations by name, as the engines' process has them.
        reports: the state of each at first.
        process: the process that runs the engines.
        usage_of: returns what counts the requests at the engine or upstream of that name, in all
            processes.
    """

    all: tuple[_FollowedModel, ...]

    def __init__(
        self,
        configs: Mapping[str, ModelConfig],
        reports: Sequence[ModelReport],
        process: EngineProcess,
        usage_of: UsageOf,
    ) -> None:
        turns = Turns()
        super().__init__(
            [_FollowedModel(configs[each.name], each, process, usage_of, turns) for each in reports]
        )

    def follow(self, reports: Sequence[ModelReport]) -> None:
        """Take over what has changed; requests see it at once."""
        before = [model.identities for model in self.all]
        for model, report in zip(self.all, reports, strict=True):
            model.follow(report)
        if before != [model.identities for model in self.all]:
            self._clear_names()
