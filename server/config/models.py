"""Section `models` of the configuration."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, model_validator
from yarl import URL

from server.config.base import (
    MASK,
    RELOADED,
    PositiveSeconds,
    Section,
    conflict,
    expand_home,
    is_http_url,
)
from server.config.yaml_loader import empty_in

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_TOKEN = re.compile(r"[!-~]+").fullmatch
MAX_NAME_CHARACTERS = 128
"""Longest name of a model; longer ones would be cut in labels."""
_OUR_ARGS = frozenset(
    {
        "allow_credentials", "allowed_headers", "allowed_methods", "allowed_origins", "config",
        "host", "lora_modules", "model", "port", "revision", "served_model_name", "uds",
    }
)  # fmt: skip
RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""vLLM's variable that would let clients change adapters, and so answers, under the same key."""
# vLLM applies an adapter with such a name to every chat message with a part of this type.
_PART_KINDS = frozenset(
    {
        "audio", "image", "input", "output", "prompt", "refusal", "text", "thinking", "tool",
        "video",
    }
)  # fmt: skip


def _check_options(args: dict[str, Any]) -> dict[str, Any]:
    odd = [name for name in args if not name.replace("_", "").isalnum()]
    if odd:
        raise ValueError(
            f"{', '.join(odd)} should be written as vLLM's options with underscores: max_model_len"
        )
    if empty := [*empty_in(args)]:
        raise ValueError(f"{', '.join(empty)}: has no value; an option without one is true")
    return args


def _check_not_ours(args: dict[str, Any]) -> dict[str, Any]:
    if ours := sorted(_OUR_ARGS & args.keys()):
        raise ValueError(
            f"{', '.join(ours)}: set by tierserve; use section server, and the model's own fields"
        )
    return args


def _check_environment(env: dict[str, str]) -> dict[str, str]:
    if RUNTIME_LORA in env:
        raise ValueError(f"should be without {RUNTIME_LORA}: `adapters` alone names adapters")
    return env


def _masked(env: dict[str, str]) -> dict[str, str]:
    """Return variables without their values, any of which may be a secret."""
    return dict.fromkeys(env, MASK)


class EngineConfig(Section):
    """vLLM, which tierserve runs as a child process."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    args: Annotated[
        dict[str, Any],
        AfterValidator(_check_options),
        AfterValidator(_check_not_ours),
        Field(repr=False, examples=[{"max_model_len": 4096}]),
    ] = Field(default_factory=dict)
    """vLLM's own options, with underscores: `max_model_len: 4096`. `dtype` is by default vLLM's
    choice; with vLLM's CPU build, bfloat16 where the CPU has instructions for it, and float32
    elsewhere."""
    env: Annotated[
        dict[str, str],
        AfterValidator(_check_environment),
        PlainSerializer(_masked, when_used="json"),
        Field(
            repr=False,
            examples=[{"VLLM_CPU_KVCACHE_SPACE": "2"}],
            json_schema_extra={"additionalProperties": {"type": ["string", "number"]}},
        ),
    ] = Field(default_factory=dict)
    """Environment variables for vLLM, beside those of tierserve."""
    restart_max_delay_s: Annotated[float, Field(ge=1, le=3600)] = 60
    """Longest delay before an engine that has ended is started again, in seconds. The delay is 1 at
    first, and doubles each time."""


EACH_ADDRESS = "dns+"
"""Stands before the URL of an upstream where each address of its host is one."""


def _check_base_url(url: str) -> str:
    if not is_http_url(url.removeprefix(EACH_ADDRESS)) or url.rstrip("/").endswith("/v1"):
        raise ValueError("should be as http://host:8000, without /v1 at its end")
    return url


def _server_of(url: str) -> str:
    """Return a base address without credentials, as metrics name it."""
    return str(URL(url).with_user(None)).rstrip("/")


def _check_home(source: str) -> str:
    expand_home(Path(source))
    return source


def _check_token(key: str) -> str:
    if not _TOKEN(key):
        raise ValueError("should be ASCII without spaces, as it is sent in a header")
    return key


def _check_name(name: str) -> str:
    if not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
        raise ValueError(f"should have 1 to {MAX_NAME_CHARACTERS} printable characters")
    return name


def _check_no_part_kind(name: str) -> str:
    if name in _PART_KINDS:
        raise ValueError(
            f"vLLM would apply it to all messages with {name} in them, whatever model they ask for;"
            " should have another name, or be in vLLM's option default_mm_loras"
        )
    return name


Name = Annotated[str, AfterValidator(_check_name)]
_Source = Annotated[str, Field(min_length=1), AfterValidator(_check_home)]
_Token = Annotated[str, AfterValidator(_check_token)]


Routing = Literal["prefix", "least", "round_robin"]
# Where a source with such a beginning is a folder, as for `server.engine.weights`.
_IS_FOLDER = ("/", "~", ".")


class ModelConfig(Section):
    """A model: `source` and `engine` for one that tierserve runs, or `upstreams`."""

    source: Annotated[_Source | None, Field(examples=["Org/Model"])] = None
    """What the engine loads: `embedded`, a folder, or a Hugging Face name."""
    revision: Annotated[str | None, Field(examples=["main"])] = None
    """Branch, tag or commit of a Hugging Face model, by default its main branch."""
    version: str = ""
    """A label of yours that becomes part of every key. Change it when weights change where
    tierserve can't see it, as those of upstreams."""
    aliases: Annotated[tuple[Name, ...], Field(examples=[["small"]])] = ()
    """Other names by which clients may ask for the model."""
    adapters: Annotated[
        dict[Annotated[Name, AfterValidator(_check_no_part_kind)], _Source],
        Field(examples=[{"poet": "~/adapters/poet"}]),
    ] = Field(default_factory=dict)
    """LoRA adapters, each a folder or a Hugging Face name, by the names that clients use."""
    engine: EngineConfig = EngineConfig()
    upstreams: Annotated[
        tuple[Annotated[str, AfterValidator(_check_base_url)], ...],
        Field(examples=[["http://host:8000"]]),
        RELOADED,
    ] = ()
    """Servers that answer in place of an engine of ours, and that you run yourself. They know the
    model by the name that it has here. `dns+http://host:8000` is one server at each address that
    the name has by IPv4, or else by IPv6; they are looked up every 5 s."""
    routing: Annotated[Routing | None, Field(examples=["prefix"])] = None
    """Which upstream gets a request: with `prefix`, the default, one that knows the beginning of
    its prompt, as long as that has not much more to do than others; with `least` the one that has
    least to do; with `round_robin` each in turn."""
    vllm: Annotated[
        Annotated[dict[str, Any], AfterValidator(_check_options)] | None,
        Field(repr=False, examples=[{"max_model_len": 4096}]),
    ] = None
    """Options that the upstreams were started with, `{}` for none, where they are vLLM 0.32. By
    default they may be any engine: each field of a request is then part of its key, and streams
    and bodies are kept apart. So they are with a `middleware` among the options."""
    api_key: Annotated[_Token | None, Field(repr=False, examples=["secret"])] = None
    """Key that the upstreams get in place of what clients send; there is none by default."""
    max_requests: Annotated[int, Field(ge=1), RELOADED] = 1024
    """How many requests one engine or upstream may have at once, those included that wait there;
    one more goes to another upstream, or gets 503."""
    wait_for_engine_s: Annotated[float, Field(ge=0, le=3600)] = 0
    """Seconds that a request which no tier can answer is held while the engine loads or restarts,
    or no upstream is ready, such as where all are scaled to zero; then it gets the answer of its
    `fallback`, or 503, as do those beyond `max_requests`. With 0 it does at once. A stale answer
    that may be given is given at once."""
    timeout_s: Annotated[PositiveSeconds, RELOADED] = 600
    """Seconds that an engine may send nothing, before or within an answer."""
    fallback: Annotated[Name | None, Field(examples=["other"])] = None
    """Another model, which answers requests for text where the engine or all upstreams of this one
    can't. The answer says so, and is kept as the other's."""

    @property
    def engine_options(self) -> Mapping[str, Any] | None:
        """The options of the vLLM that answers; `None` where another engine may answer."""
        return self.vllm if self.upstreams else self.engine.args

    def asked_as(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield each name that clients may use, and the engine's name for the same.

        Args:
            name: the engine's name for the model.
        """
        yield name, name
        yield from ((alias, name) for alias in self.aliases)
        yield from ((adapter, adapter) for adapter in self.adapters)

    @property
    def _is_of_hub(self) -> bool:
        """Whether the source may be a Hugging Face name."""
        return self.source not in (None, EMBEDDED) and not str(self.source).startswith(_IS_FOLDER)

    @model_validator(mode="after")
    def _has_engine_or_upstreams(self) -> Self:
        if self.upstreams and (self.source is not None or self.engine != EngineConfig()):
            raise conflict("should have an engine of ours or upstreams, and not both")
        if self.api_key is not None and not self.upstreams:
            raise ValueError("api_key is for upstreams; an engine of ours needs no key")
        if self.vllm is not None and not self.upstreams:
            raise ValueError(
                "vllm is for upstreams; the options of an engine of ours are engine.args"
            )
        if self.routing is not None and not self.upstreams:
            raise ValueError("routing is among upstreams; an engine of ours is one only")
        if self.revision is not None and not self._is_of_hub:
            raise ValueError(
                "revision is of a source at Hugging Face; version tells other weights apart"
            )
        servers = Counter(map(_server_of, self.upstreams))
        if several := [server for server, times in servers.items() if times > 1]:
            raise ValueError(f"upstreams should name each server once; {several[0]} is there twice")
        if self.api_key is not None and any("@" in url for url in self.upstreams):
            raise conflict("should have an api_key or a password in upstreams, and not both")
        if not (self.upstreams or self.source):
            raise ValueError(
                f"should have a source ({EMBEDDED}, a folder, or a Hugging Face name), or upstreams"
            )
        return self


def embedded() -> dict[str, ModelConfig]:
    """Return the models of a configuration that names none."""
    return {EMBEDDED_NAME.lower(): ModelConfig(source=EMBEDDED)}


def clashes(models: Mapping[str, ModelConfig]) -> list[str]:
    """Return a line if a name has several meanings."""
    meanings: dict[str, list[str]] = {}
    for name, model in models.items():
        meanings.setdefault(name, []).append("a model")
        for kind, names in (("alias", model.aliases), ("adapter", model.adapters)):
            for each in names:
                meanings.setdefault(each, []).append(f"an {kind} of {name}")
    several = [f"{n} is {' and '.join(of)}" for n, of in meanings.items() if len(of) > 1]
    return [f"models: each name should mean one thing; {'; '.join(several)}"] if several else []


def misplaced_fallbacks(models: Mapping[str, ModelConfig]) -> list[str]:
    """Return a line for each model whose fallback isn't a model, or leads back to it."""
    owners = {asked: name for name, model in models.items() for asked, _ in model.asked_as(name)}
    mistakes = []
    for name, model in models.items():
        if model.fallback is None:
            continue
        at = f"models.{name}.fallback"
        if model.fallback not in owners:
            known = ", ".join(each for each, owner in owners.items() if owner != name)
            should = f"one of {known}" if known else "another model, and there is none"
            mistakes.append(f"{at}: should be {should}, not {model.fallback!r}")
            continue
        path = [name]
        while (then := models[path[-1]].fallback) is not None and then in owners:
            path.append(owners[then])
            if path[-1] in path[:-1]:
                break
        if path[-1] == name:
            ways = " to ".join(path)
            mistakes.append(f"{at}: should lead to another model, and not back: {ways}")
    return mistakes
