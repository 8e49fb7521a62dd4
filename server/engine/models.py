"""The models: each one's engine or upstreams, its identity, and the names that clients ask for.

The process that runs the engines has `Models`. Workers have `FollowedModels`
(`server.engine.followed`), which say what that process tells them; requests need no more.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache, partial
from typing import Any, NamedTuple

from server.auth.limits import LimitUsage, LocalUsage
from server.config.base import ConfigError
from server.config.changes import take_over
from server.config.models import ModelConfig
from server.engine.dtype import with_dtype
from server.engine.identity import adapter_identity, depends_on_date, identity
from server.engine.prefix_options import PrefixOptions, adapters_in
from server.engine.routing.addresses import Addresses, UpstreamAddress
from server.engine.routing.held import HeldRequests
from server.engine.routing.upstreams import Upstreams
from server.engine.supervisor import Engine, EngineState
from server.engine.turns import Turns
from server.engine.upstream import ENGINE_URL, Upstream
from server.engine.vllm_options import always_counts_tokens, encodings_agree
from server.engine.warm_start import IndexReading, WarmStart
from server.engine.weights import Weights, locate
from server.protocol.model_names import ModelNames, ResolvedModel
from tiers import digest

UsageOf = Callable[[str], LimitUsage]
"""Returns what counts the requests at an engine or an upstream, by its name."""


class Identities(NamedTuple):
    """The identities of a model and its adapters, by the files at the engine's last start."""

    by_name: Mapping[str, str]
    depends_on_date: bool


def join_upstreams(
    name: str,
    config: ModelConfig,
    identities: Identities,
    addresses: Addresses,
    make: Callable[[UpstreamAddress], Upstream],
    usage_of: UsageOf,
    turns: Turns,
) -> Upstreams:
    """Return the upstreams of a model as one.

    Args:
        name: the model's name.
        config: its configuration.
        identities: of the model; digests of prompts are keyed by it, so that all processes and
            replicas agree.
        addresses: of each.
        make: returns the upstream at an address.
        usage_of: returns what counts the requests at each.
        turns: of the event loop.
    """
    return Upstreams(
        addresses,
        make,
        max_requests=config.max_requests,
        turns=turns,
        usage_of=lambda upstream: usage_of(f"{name} {upstream}"),
        reads_queues=config.vllm is not None,
        routing=config.routing or "prefix",
        key=digest(identities.by_name[name].encode()).encode(),
        held=HeldRequests(config.wait_for_engine_s, config.max_requests, usage_of(f"{name} held")),
    )


class ServedModel:
    """One model, as requests need it.

    Args:
        name: its name at the engine.
        config: its configuration.
        upstreams: its engine's HTTP server, or those that the user runs.
        identities: of itself and its adapters.
        root: the hub's name of its weights, or its own name, so that clients see no folder.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        upstreams: Upstreams,
        identities: Identities,
        root: str,
    ) -> None:
        self.name, self.config, self.upstreams, self.root = name, config, upstreams, root
        self._identities = identities

    def use(self, config: ModelConfig) -> None:
        """Put into effect what can change while it runs."""
        self.config, _ = take_over(self.config, config)
        self.upstreams.set_limits(self.config.max_requests, self.config.timeout_s)

    @property
    def identities(self) -> Identities:
        """The identities that are part of keys now."""
        return self._identities

    @property
    def state(self) -> EngineState:
        """The state of its engine, or of its upstreams together."""
        if self.upstreams.ready:
            return EngineState.READY
        return EngineState.STARTING if self.upstreams.loading else EngineState.DOWN

    @property
    def restarts(self) -> int:
        """How often its engine was restarted."""
        return 0

    def served_names(self) -> Iterator[tuple[str, str]]:
        """Yield each name that clients may use for it or an adapter, with the engine's name."""
        return self.config.asked_as(self.name)

    def resolved_names(self, day: date | None) -> Iterator[tuple[str, ResolvedModel]]:
        """Yield each name that clients may use, with what it resolves to on that day."""
        suffix = f" {day}" if self._identities.depends_on_date else ""
        options = self.config.engine_options
        resolved = partial(
            ResolvedModel,
            # A middleware may read any field, and answer in vLLM's place.
            is_vllm=options is not None and not options.get("middleware"),
            encodings_agree=options is not None and encodings_agree(options),
            always_counts_tokens=options is not None and always_counts_tokens(options),
        )
        for served_name, name in self.served_names():
            yield served_name, resolved(name, self._identities.by_name[name] + suffix)


class Model(ServedModel):
    """One model with its engine or upstreams.

    Args:
        name: its name at the engine.
        config: its configuration.
        weights: the weights that our engine loads; `None` for upstreams that the user runs.
        loading: the lock that an engine holds while it loads.
        on_change: called when its identity has changed.
        usage_of: returns what counts the requests at the engine or upstream of that name.
        turns: of the event loop.
        prefix: how its engine uses the prefix tier, if there is one.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        weights: Weights | None,
        loading: asyncio.Lock,
        on_change: Callable[[], None],
        usage_of: UsageOf,
        turns: Turns,
        prefix: PrefixOptions | None = None,
    ) -> None:
        if weights is not None:
            config = with_dtype(name, config, weights.folder)
        self.weights = weights
        self.engine = (
            None
            if weights is None
            else Engine(
                name,
                config,
                weights,
                loading,
                before_start=partial(self._read_files, weights),
                secrets={} if prefix is None else prefix.environment(),
            )
        )
        # Upstreams are also made later, when it may have changed.
        self.config = config

        def make(address: UpstreamAddress) -> Upstream:
            if self.engine is not None:
                return self.engine.upstream
            (url, ip), now = address, self.config
            return Upstream(url, ip=ip, timeout_s=now.timeout_s, api_key=now.api_key, model=name)

        is_from_hub = weights is not None and weights.folder is None
        root = config.source or name if is_from_hub else name
        identities = _identify(name, config, weights)
        urls = config.upstreams if self.engine is None else (ENGINE_URL,)
        upstreams = join_upstreams(name, config, identities, Addresses(urls), make, usage_of, turns)
        super().__init__(name, config, upstreams, identities, root)
        self._on_change, self._prefix = on_change, prefix
        self._connector: Mapping[str, Any] = {}

    def use(self, config: ModelConfig) -> None:
        before = self.config.upstreams
        super().use(config)
        if self.config.upstreams != before:
            self.upstreams.replace(self.config.upstreams)

    async def _read_files(self, weights: Weights) -> Mapping[str, Any]:
        """Read the files anew with which its engine starts; returns what it is told of them."""
        # Files that its options name, such as a chat template, may have changed.
        identities = await asyncio.to_thread(_identify, self.name, self.config, weights)
        if identities != self._identities:
            self._identities = identities
            self._on_change()
        # Not in the identity: stored answers stay when the prefix tier is turned on or off.
        if self._prefix is not None:
            self._connector = await asyncio.to_thread(self._prefix.read, self.name, weights)
        return self._connector

    def warm_start(self, reading: IndexReading) -> WarmStart | None:
        """Return what warms its engine from the prefix tier, if it has one and is to be warmed.

        Args:
            reading: opens the tier's index for reading, in a thread.
        """
        prefix = self._prefix
        if prefix is None or self.engine is None or not prefix.config.warm_share:
            return None
        return WarmStart(
            reading,
            self.name,
            lambda: adapters_in(self._connector),
            self.upstreams,
            share=prefix.config.warm_share,
            min_tokens=prefix.config.min_tokens,
        )

    @property
    def state(self) -> EngineState:
        return super().state if self.engine is None else self.engine.state

    @property
    def restarts(self) -> int:
        return 0 if self.engine is None else self.engine.restarts


def _identify(name: str, config: ModelConfig, weights: Weights | None) -> Identities:
    base = identity(config, weights)
    adapters = {
        adapter: adapter_identity(base, adapter, config, weights) for adapter in config.adapters
    }
    return Identities({name: base} | adapters, depends_on_date(config, weights))


class ServedModels:
    """All models, in the order of the configuration.

    Args:
        models: all of them.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.all: tuple[ServedModel, ...] = tuple(models)
        self._by_name = {name: model for model in self.all for _, name in model.served_names()}
        self._names_of_day = lru_cache(2)(self._resolve_names)
        self._clear_names()

    def use(self, configs: Mapping[str, ModelConfig]) -> None:
        """Put into effect what can change of the models while they run.

        `names` returns another object then, so that nobody goes on with what was known before.
        """
        for model in self.all:
            model.use(configs[model.name])
        self._clear_names()

    def _clear_names(self) -> None:
        self._depends_on_date = any(model.identities.depends_on_date for model in self.all)
        self._names_of_day.cache_clear()

    def names(self) -> ModelNames:
        """Return the names that clients may use now; the same object until something changes."""
        # The local date, as in the engines' templates.
        return self._names_of_day(date.today() if self._depends_on_date else None)  # noqa: DTZ011

    def _resolve_names(self, day: date | None) -> ModelNames:
        return ModelNames(
            {name: resolved for model in self.all for name, resolved in model.resolved_names(day)}
        )

    def get(self, name: str) -> ServedModel:
        """Return the model that has that name at its engine, or an adapter of that name."""
        return self._by_name[name]

    def upstreams(self, name: str) -> Upstreams:
        """Return the upstreams of the model, or of the adapter's model."""
        return self._by_name[name].upstreams

    def end_waits(self) -> None:
        """Let no request wait for an engine any more."""
        for model in self.all:
            model.upstreams.held.end()

    def fallback_of(self, name: str) -> str | None:
        """Return the name of what answers where the model, or the adapter's model, can't."""
        return self._by_name[name].config.fallback

    def fallbacks(self) -> Iterator[tuple[str, str]]:
        """Yield the names of models that have a fallback, each with the fallback's."""
        for model in self.all:
            if (fallback := model.config.fallback) is not None:
                yield model.name, self.names().resolve(fallback).name

    async def close(self) -> None:
        """Close all connections."""
        for model in self.all:
            await model.upstreams.close()


class Models(ServedModels):
    """All models, with the engines that this process runs.

    Args:
        configs: their configurations by name.
        prefix: how engines of ours use the prefix tier, if there is one.
        usage_of: returns what counts the requests at the engine or upstream of that name.

    Raises:
        ConfigError: weights or an engine of the configuration don't exist; it lists all of them.
    """

    all: tuple[Model, ...]

    def __init__(
        self,
        configs: Mapping[str, ModelConfig],
        prefix: PrefixOptions | None = None,
        usage_of: UsageOf = lambda _: LocalUsage(),
    ) -> None:
        weights, loading, turns = _locate_all(configs), asyncio.Lock(), Turns()
        super().__init__(
            [
                Model(
                    name,
                    each,
                    weights[name],
                    loading,
                    self._clear_names,
                    usage_of,
                    turns,
                    prefix,
                )
                for name, each in configs.items()
            ]
        )

    def watches(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the tasks that probe the upstreams; each runs until cancelled."""
        return (model.upstreams.watch() for model in self.all)

    def runs(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the tasks that keep the engines running; each runs until cancelled."""
        return (model.engine.run() for model in self.all if model.engine is not None)


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
