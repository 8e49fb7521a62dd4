"""The models: each one's engine or upstreams, its identity, and the names that clients ask for."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import date
from functools import lru_cache, partial
from typing import Any, NamedTuple

from server.config.base import ConfigError
from server.config.models import ModelConfig
from server.engine.dtype import with_dtype
from server.engine.identity import adapter_identity, depends_on_date, identity
from server.engine.supervisor import Engine, EngineState
from server.engine.upstream import Upstream, Upstreams
from server.engine.vllm_options import always_counts_tokens, encodings_agree
from server.engine.weights import Weights, locate
from server.protocol.model_names import ModelNames, ResolvedModel


class _Identity(NamedTuple):
    """The identities of a model and its adapters, by the files at the engine's last start."""

    by_name: Mapping[str, str]
    depends_on_date: bool


class Model:
    """One model with its engine or upstreams.

    Args:
        name: its name at the engine.
        config: its configuration.
        weights: the weights that our engine loads; `None` for upstreams that the user runs.
        loading: the lock that an engine holds while it loads.
        on_change: called when its identity has changed.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        weights: Weights | None,
        loading: asyncio.Lock,
        on_change: Callable[[], None],
    ) -> None:
        if weights is not None:
            config = with_dtype(name, config, weights.folder)
        self.name, self.config, self.weights = name, config, weights
        self.engine = (
            None
            if weights is None
            else Engine(name, config, weights, loading, before_start=self._refresh_identity)
        )
        self.upstreams = Upstreams(
            [self.engine.upstream]
            if self.engine is not None
            else [
                Upstream(url, timeout_s=config.timeout_s, api_key=config.api_key, model=name)
                for url in config.upstreams
            ],
            max_requests=config.max_requests,
        )
        self._identity, self._on_change = self._identify(), on_change

    def _identify(self) -> _Identity:
        base = identity(self.config, self.weights)
        adapters = {
            adapter: adapter_identity(base, adapter, self.config, self.weights)
            for adapter in self.config.adapters
        }
        return _Identity({self.name: base} | adapters, depends_on_date(self.config, self.weights))

    async def _refresh_identity(self) -> None:
        # Files that its options name, such as a chat template, may have changed.
        identity = await asyncio.to_thread(self._identify)
        if identity != self._identity:
            self._identity = identity
            self._on_change()

    @property
    def depends_on_date(self) -> bool:
        """Whether its prompts hold the date, so that its answers hold for one day only."""
        return self._identity.depends_on_date

    @property
    def state(self) -> EngineState:
        """The state of its engine, or of its upstreams together."""
        if self.engine is not None:
            return self.engine.state
        if self.upstreams.ready:
            return EngineState.READY
        return EngineState.STARTING if self.upstreams.loading else EngineState.DOWN

    @property
    def restarts(self) -> int:
        """How often its engine was restarted."""
        return 0 if self.engine is None else self.engine.restarts

    @property
    def root(self) -> str:
        """The hub's name of its weights, or its own name, so that clients see no folder."""
        is_from_hub = self.weights is not None and self.weights.folder is None
        return self.config.source or self.name if is_from_hub else self.name

    def served_names(self) -> Iterator[tuple[str, str]]:
        """Yield each name that clients may use for it or an adapter, with the engine's name."""
        return self.config.asked_as(self.name)

    def resolved_names(self, day: date | None) -> Iterator[tuple[str, ResolvedModel]]:
        """Yield each name that clients may use, with what it resolves to on that day."""
        suffix = f" {day}" if self.depends_on_date else ""
        options = self.config.engine_options
        resolved = partial(
            ResolvedModel,
            # A middleware may read any field, and answer in vLLM's place.
            is_vllm=options is not None and not options.get("middleware"),
            encodings_agree=options is not None and encodings_agree(options),
            always_counts_tokens=options is not None and always_counts_tokens(options),
        )
        for served_name, name in self.served_names():
            yield served_name, resolved(name, self._identity.by_name[name] + suffix)


class Models:
    """All models, in the order of the configuration.

    Raises:
        ConfigError: weights or an engine of the configuration don't exist; it lists all of them.
    """

    def __init__(self, configs: Mapping[str, ModelConfig]) -> None:
        weights, loading = _locate_all(configs), asyncio.Lock()
        self.all = tuple(
            Model(name, each, weights[name], loading, self._clear_names)
            for name, each in configs.items()
        )
        self._by_name = {name: model for model in self.all for _, name in model.served_names()}
        self._names_of_day = lru_cache(2)(self._resolve_names)
        self._clear_names()

    def _clear_names(self) -> None:
        self._depends_on_date = any(model.depends_on_date for model in self.all)
        self._names_of_day.cache_clear()

    def names(self) -> ModelNames:
        """Return the names that clients may use now; the same object until something changes."""
        # The local date, as in the engines' templates.
        return self._names_of_day(date.today() if self._depends_on_date else None)  # noqa: DTZ011

    def _resolve_names(self, day: date | None) -> ModelNames:
        return ModelNames(
            {name: resolved for model in self.all for name, resolved in model.resolved_names(day)}
        )

    def get(self, name: str) -> Model:
        """Return the model that has that name at its engine, or an adapter of that name."""
        return self._by_name[name]

    def upstreams(self, name: str) -> Upstreams:
        """Return the upstreams of the model, or of the adapter's model."""
        return self._by_name[name].upstreams

    def watches(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the tasks that probe the upstreams; each runs until cancelled."""
        return (upstream.watch() for model in self.all for upstream in model.upstreams.all)

    def runs(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the tasks that keep the engines running; each runs until cancelled."""
        return (model.engine.run() for model in self.all if model.engine is not None)

    async def close(self) -> None:
        """Close all connections."""
        for model in self.all:
            await model.upstreams.close()


def _locate_all(described: Mapping[str, ModelConfig]) -> dict[str, Weights | None]:
    """Find the weights of all models whose engines we run."""
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
