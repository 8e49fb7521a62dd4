"""The table of an engine's routes: the fields and the format of each, and who may use it.

The routes are those of vLLM's server (0.32). Paths that the table doesn't name, such as those that
stop an engine, change its weights or show what others ask, are for operators only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from server.protocol import vllm_fields
from server.protocol.formats import CHOICES, MESSAGE, OPAQUE, RESPONSE, AnswerFormat
from server.protocol.vllm_fields import RequestFields


class Dialect(Enum):
    """Whose API a route belongs to, which decides the shape of errors."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """One route of an engine, under all of its paths."""

    paths: tuple[str, ...]
    """The first one stands for all of them in keys and rules. `{id}` is one segment of a path, and
    `{rest}` one or more; `{any}` may be empty, too."""
    dialect: Dialect = Dialect.OPENAI
    tenant_allowed: bool = False
    """Whether every tenant may use it, or operators only."""
    salted: bool = False
    """Whether vLLM takes a `cache_salt` here, which keeps tenants apart in its prefix cache."""
    counts_prompts: bool = False
    """Whether bodies may hold several prompts, and so are read where they are passed through, as
    those of all salted routes have to be."""
    is_conversation: bool = False
    """Whether `documents` belong to the one prompt that `messages` are."""
    is_refused: bool = False
    """Whether nobody may use it."""
    operation: str | None = None
    """Its name in OpenTelemetry's conventions (`gen_ai.operation.name`)."""

    @property
    def path(self) -> str:
        """The path by which the route is known."""
        return self.paths[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRoute(Route):
    """A route whose answers tiers keep."""

    format: AnswerFormat
    fields: RequestFields
    streams: bool = False
    """Whether `stream` asks for server-sent events."""
    id_prefix: str = ""
    """What the ids of its answers begin with."""
    deterministic: bool = False
    """Whether the same request gets the same answer without a temperature or a seed."""
    engine_may_keep: bool = False
    """Whether the engine itself may keep answers, under the ids that it gives."""
    needs_model: bool = False
    """Whether vLLM refuses a body without a model."""


_TABLE: tuple[Route, ...] = (
    CachedRoute(
        paths=("/v1/chat/completions",),
        format=CHOICES,
        fields=vllm_fields.CHAT,
        streams=True,
        id_prefix="chatcmpl-",
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        is_conversation=True,
        operation="chat",
    ),
    CachedRoute(
        paths=("/v1/completions",),
        format=CHOICES,
        fields=vllm_fields.COMPLETION,
        streams=True,
        id_prefix="cmpl-",
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        operation="text_completion",
    ),
    CachedRoute(
        paths=("/v1/responses",),
        format=RESPONSE,
        fields=vllm_fields.RESPONSE,
        streams=True,
        id_prefix="resp_",
        engine_may_keep=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        operation="chat",
    ),
    CachedRoute(
        paths=("/v1/messages",),
        dialect=Dialect.ANTHROPIC,
        format=MESSAGE,
        fields=vllm_fields.MESSAGE,
        streams=True,
        id_prefix="chatcmpl-",
        needs_model=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        operation="chat",
    ),
    CachedRoute(
        paths=("/v1/messages/count_tokens",),
        dialect=Dialect.ANTHROPIC,
        format=OPAQUE,
        fields=vllm_fields.MESSAGE_COUNT,
        deterministic=True,
        needs_model=True,
        tenant_allowed=True,
    ),
    CachedRoute(
        paths=("/v1/embeddings",),
        format=OPAQUE,
        fields=vllm_fields.EMBEDDING,
        id_prefix="embd-",
        deterministic=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        operation="embeddings",
    ),
    # Cohere's route uses the prefix cache without a cache salt, so it isn't for tenants.
    CachedRoute(
        paths=("/v2/embed",),
        format=OPAQUE,
        fields=vllm_fields.COHERE_EMBEDDING,
        id_prefix="embd-",
        deterministic=True,
    ),
    CachedRoute(
        paths=("/score", "/v1/score"),
        format=OPAQUE,
        fields=vllm_fields.SCORE,
        id_prefix="score-",
        deterministic=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
    ),
    CachedRoute(
        paths=("/rerank", "/v1/rerank", "/v2/rerank"),
        format=OPAQUE,
        fields=vllm_fields.RERANK,
        id_prefix="score-",
        deterministic=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
    ),
    CachedRoute(
        paths=("/pooling",),
        format=OPAQUE,
        fields=vllm_fields.POOLING,
        id_prefix="pooling-",
        deterministic=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
    ),
    CachedRoute(
        paths=("/classify",),
        format=OPAQUE,
        fields=vllm_fields.CLASSIFICATION,
        id_prefix="classify-",
        deterministic=True,
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
    ),
    CachedRoute(
        paths=("/tokenize",),
        format=OPAQUE,
        fields=vllm_fields.TOKENIZATION,
        deterministic=True,
        tenant_allowed=True,
    ),
    CachedRoute(
        paths=("/detokenize",),
        format=OPAQUE,
        fields=vllm_fields.DETOKENIZATION,
        deterministic=True,
        tenant_allowed=True,
    ),
    Route(
        paths=("/v1/chat/completions/batch",),
        tenant_allowed=True,
        salted=True,
        counts_prompts=True,
        is_conversation=True,
    ),
    *(
        Route(paths=(path,), tenant_allowed=True, salted=True, counts_prompts=True)
        for path in ("/generative_scoring", "/invocations", "/v1/systemone")
    ),
    Route(paths=("/v1/completions/render",), tenant_allowed=True, counts_prompts=True),
    Route(paths=("/v1/messages/render",), dialect=Dialect.ANTHROPIC, tenant_allowed=True),
    *(
        Route(paths=(path,), tenant_allowed=True)
        for path in (
            "/ping", "/tokenizer_info", "/v1/audio/transcriptions", "/v1/audio/translations",
            "/v1/chat/completions/derender", "/v1/chat/completions/render",
            "/v1/completions/derender", "/v1/models", "/v1/realtime", "/v1/responses/render",
            "/version",
        )
    ),
    # The ids of what an engine keeps can't be guessed, and models are no secret.
    Route(paths=("/v1/models/{rest}",), tenant_allowed=True),
    Route(paths=("/v1/responses/{id}", "/v1/responses/{id}/cancel"), tenant_allowed=True),
    Route(paths=("/v1/messages/{any}",), dialect=Dialect.ANTHROPIC),
    # These would change a running engine, so that its identity in keys would be wrong.
    Route(paths=("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), is_refused=True),
)  # fmt: skip
_ELSE = Route(paths=("/{any}",))

CACHED_ROUTES: Mapping[str, CachedRoute] = {
    path: route for route in _TABLE if isinstance(route, CachedRoute) for path in route.paths
}
"""The routes whose answers tiers keep, by each of their paths. Clients ask them by POST."""
REFUSED_PATHS = tuple(path for route in _TABLE if route.is_refused for path in route.paths)

_PARAMETERS = {r"\{id\}": "[^/]+", r"\{rest\}": "[^/].*", r"\{any\}": ".*"}


def _matcher(path: str) -> Callable[[str], Any]:
    pattern = re.escape(path)
    for name, matches in _PARAMETERS.items():
        pattern = pattern.replace(name, matches)
    return re.compile(pattern, re.DOTALL).fullmatch


_PLAIN = {path: route for route in _TABLE for path in route.paths if "{" not in path}
_PATTERNS = tuple(
    (_matcher(path), route) for route in _TABLE for path in route.paths if "{" in path
)


def route_of(path: str) -> Route:
    """Return the route of a decoded path; for a path that isn't known, one for operators only."""
    if (route := _PLAIN.get(path)) is not None:
        return route
    return next((route for matches, route in _PATTERNS if matches(path)), _ELSE)


def is_tenant_allowed(path: str) -> bool:
    """Whether every tenant may ask an engine for a decoded path.

    Of a path with dot segments another server may make another path.
    """
    return route_of(path).tenant_allowed and not {".", ".."} & set(path.split("/"))
