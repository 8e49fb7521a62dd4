"""The models: what gives each one's answers, and which one a request is for."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import date
from functools import lru_cache, partial
from typing import Any, NamedTuple

from server.config.base import ConfigError
from server.config.models import ModelConfig as Described
from server.engine.dtype import with_dtype
from server.engine.identity import adapted, identity, tells_time
from server.engine.supervisor import Engine, EngineState
from server.engine.upstream import Upstream, Upstreams
from server.engine.weights import Weights, locate
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.routes import always_counts_tokens, encodings_agree


class _Identity(NamedTuple):
    """What gives answers, by the files as they were when the engine was last started."""

    by_name: Mapping[str, str]
    """Of the model and of its adapters."""
    is_dated: bool


class Model:
    """One model with its engine or upstreams.

    Args:
        name: by which they know it.
        described: how it is configured.
        weights: what an engine of ours is to load; `None` where somebody else runs it.
        loading: held by the one engine that loads.
        changed: called when its names mean something else from now on.
    """

    def __init__(
        self,
        name: str,
        described: Described,
        weights: Weights | None,
        loading: asyncio.Lock,
        changed: Callable[[], None],
    ) -> None:
        if weights is not None:
            described = with_dtype(name, described, weights.folder)
        self.name, self.described, self.weights = name, described, weights
        self.engine = (
            None
            if weights is None
            else Engine(name, described, weights, loading, before_start=self._identify_anew)
        )
        self.upstreams = Upstreams(
            [self.engine.upstream]
            if self.engine is not None
            else [
                Upstream(url, timeout_s=described.timeout_s, api_key=described.api_key, model=name)
                for url in described.upstreams
            ],
            max_requests=described.max_requests,
        )
        self._identity, self._changed = self._identify(), changed

    def _identify(self) -> _Identity:
        base = identity(self.described, self.weights)
        adapters = {
            adapter: adapted(base, adapter, self.described, self.weights)
            for adapter in self.described.adapters
        }
        return _Identity({self.name: base} | adapters, tells_time(self.described, self.weights))

    async def _identify_anew(self) -> None:
        # Files that its options name, such as a chat template, may have changed meanwhile.
        found = await asyncio.to_thread(self._identify)
        if found != self._identity:
            self._identity = found
            self._changed()

    @property
    def is_dated(self) -> bool:
        """Whether its answers are good for one day alone."""
        return self._identity.is_dated

    @property
    def state(self) -> EngineState:
        """What can be expected of it."""
        if self.engine is not None:
            return self.engine.state
        if self.upstreams.ready:
            return EngineState.READY
        return EngineState.STARTING if self.upstreams.loading else EngineState.DOWN

    @property
    def restarts(self) -> int:
        """How often its engine was started again."""
        return 0 if self.engine is None else self.engine.restarts

    @property
    def root(self) -> str:
        """What its weights are called; a folder of this machine is nobody's business."""
        is_hubs = self.weights is not None and self.weights.folder is None
        return self.described.source or self.name if is_hubs else self.name

    def asked_as(self) -> Iterator[tuple[str, str]]:
        """Yield each name by which clients may ask for it or an adapter, and the engine's own."""
        return self.described.asked_as(self.name)

    def meanings(self, day: date | None) -> Iterator[tuple[str, ResolvedModel]]:
        """Yield the names by which clients may ask for it, and what they mean that day."""
        suffix = f" {day}" if self.is_dated else ""
        options = self.described.engine_options
        named = partial(
            ResolvedModel,
            # A middleware may read and answer anything.
            is_vllm=options is not None and not options.get("middleware"),
            encodings_agree=options is not None and encodings_agree(options),
            always_counts_tokens=options is not None and always_counts_tokens(options),
        )
        for asked, name in self.asked_as():
            yield asked, named(name, self._identity.by_name[name] + suffix)


class Models:
    """All models, in the order in which they are configured.

    Raises:
        ConfigError: the weights or the engine that the configuration names aren't there; it names
            all of them.
    """

    def __init__(self, described: Mapping[str, Described]) -> None:
        located, loading = _located(described), asyncio.Lock()
        self.all = tuple(
            Model(name, each, located[name], loading, self._forget)
            for name, each in described.items()
        )
        self._by_name = {name: model for model in self.all for _, name in model.asked_as()}
        self._names_on = lru_cache(2)(self._names)
        self._forget()

    def _forget(self) -> None:
        self._are_dated = any(model.is_dated for model in self.all)
        self._names_on.cache_clear()

    def names(self) -> ModelNames:
        """Return what clients may ask for now; the same object as long as nothing changes."""
        # The engines' templates tell the local date, as this does.
        return self._names_on(date.today() if self._are_dated else None)  # noqa: DTZ011

    def _names(self, day: date | None) -> ModelNames:
        return ModelNames(
            {name: named for model in self.all for name, named in model.meanings(day)}
        )

    def of(self, name: str) -> Model:
        """Return the model that its engine knows by that name, or one of whose adapters it is."""
        return self._by_name[name]

    def upstreams(self, name: str) -> Upstreams:
        """Return who answers for it."""
        return self._by_name[name].upstreams

    def watches(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what keeps known which upstreams answer; each goes on until cancelled."""
        return (upstream.watch() for model in self.all for upstream in model.upstreams.all)

    def runs(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what keeps the engines running; each goes on until cancelled."""
        return (model.engine.run() for model in self.all if model.engine is not None)

    async def close(self) -> None:
        """Close all connections."""
        for model in self.all:
            await model.upstreams.close()


def _located(described: Mapping[str, Described]) -> dict[str, Weights | None]:
    """Find the weights of all models that are ours to run."""
    located: dict[str, Weights | None] = {}
    mistakes: list[str] = []
    for name, model in described.items():
        located[name] = None
        if model.upstreams:
            continue
        try:
            located[name] = locate(name, model)
        except ConfigError as exc:
            mistakes += exc.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return located
