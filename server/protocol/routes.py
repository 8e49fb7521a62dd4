"""The routes whose answers are kept, and what each takes and gives.

A row says what is particular to a route of vLLM's server (0.32; the classes of the requests are in
`protocol.py` of `vllm/entrypoints/*`). All else is the same for every route.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.protocol import messages
from server.protocol.formats import CHOICES, MESSAGE, OPAQUE, RESPONSE, AnswerFormat

Equal = dict[str, tuple[Any, ...]]
"""Fields with the values that mean the same as leaving them out."""
Ignored = dict[str, type | tuple[type, ...]]
"""Fields that change no answer as long as they are of these types; else they are refused."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRoute:
    """One route, by whatever path it is asked."""

    paths: tuple[str, ...]
    """The first one stands for all of them in keys and rules."""
    format: AnswerFormat
    streams: bool = False
    """Whether `stream` asks for events."""
    id_prefix: str = ""
    deterministic: bool = False
    """Whether the same request gets the same answer without a temperature or a seed."""
    same_in_both_encodings: frozenset[str] = frozenset()
    """What is answered alike in a body and in a stream; of anything else vLLM may leave out or
    refuse something in one of them, or read it by another parser, so there the form is part of the
    key. None where no form can be made of the other."""
    ignored: Ignored
    normalize: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Returns the fields of a body without what vLLM ignores within them."""
    defaults: Equal
    """As vLLM itself takes them: where `generation_config`, a chat template, or another field may
    have a say, a default isn't equal to absence, and isn't here."""
    media: tuple[str, ...] = ()
    """Fields that may name media."""
    unrepeatable: tuple[str, ...] = ()
    """Fields that name what exists at one moment only, or in one server."""
    engine_may_keep: bool = False
    """Whether the engine itself may keep answers, under the ids that it gives."""
    needs_model: bool = False
    """Whether a body without a model is refused."""

    @property
    def path(self) -> str:
        """What it is known by."""
        return self.paths[0]


_TEXT = (str, type(None))
_OBJECT = (dict, type(None))
_ID: Ignored = {"request_id": str}
_RANK: Ignored = {"priority": int}
# Classes that don't know a field take any value of it. These fields say who asks, where an engine
# keeps things, and by what it finds them; a field that asks for another answer stays in the key.
_UNKNOWN: Ignored = dict.fromkeys(
    (
        "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store",
    ),
    object,
)  # fmt: skip
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")


def _null(*names: str) -> Equal:
    return dict.fromkeys(names, (None,))


_SAMPLING = _null(
    "cache_salt", "frequency_penalty", "logit_bias", "min_p", "presence_penalty",
    "repetition_penalty", "return_mm_kwargs", "seed", "structured_outputs", "temperature",
    "top_k", "top_p", "vllm_xargs", "watermarking",
) | {
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "mm_payload": ("tensors",),
    "skip_special_tokens": (True,),
    "stop": ([], None),
    "stop_token_ids": ([], None),
}  # fmt: skip
_COMPLETING = _SAMPLING | _null(
    "allowed_token_ids", "logprob_token_ids", "prompt_logprobs", "repetition_detection",
    "response_format", "return_token_ids", "return_tokens_as_token_ids", "stream_interval",
    "stream_options", "thinking_token_budget", "truncate_prompt_tokens", "truncation_side",
) | {
    "bad_words": ([],),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "return_token_offsets": (False, None),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}  # fmt: skip
# `add_generation_prompt` is refused where a message is continued, but only if it is written out,
# and a `tool_choice` is chosen where there are tools and none is written out.
_CHAT = _COMPLETING | _null(
    "chat_template", "chat_template_kwargs", "documents", "max_completion_tokens", "max_tokens",
    "media_io_kwargs", "mm_processor_kwargs", "reasoning_effort", "return_prompt_text", "tools",
) | {
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "echo": (False,),
    "include_reasoning": (True,),
    "logprobs": (False, None),
    "n": (1, None),
    "parallel_tool_calls": (True,),
    "top_logprobs": (0, None),
}  # fmt: skip
_COMPLETION = (
    _COMPLETING
    | _null("logprobs", "prompt", "prompt_embeds", "suffix")
    | {
        "add_special_tokens": (True,),
        "echo": (False, None),
        "max_tokens": (16, None),
        "n": (1,),
    }
)
_RESPONSE = _SAMPLING | _null(
    "chat_template_kwargs", "include", "instructions", "max_output_tokens", "max_tool_calls",
    "media_io_kwargs", "metadata", "mm_processor_kwargs", "previous_input_messages",
    "previous_response_id", "prompt", "reasoning", "text", "user", *_TRANSFERS,
) | {
    "background": (False,),
    "enable_response_messages": (False,),
    "include_reasoning": (True,),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto",),
    "tool_choice": ("auto",),
    "tools": ([],),
    "top_logprobs": (0, None),
    "truncation": ("disabled",),
}  # fmt: skip
_MESSAGE = _null(
    "cache_salt", "chat_template_kwargs", "output_config", "return_mm_kwargs", "stop_sequences",
    "system", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p", "vllm_xargs",
    "watermarking", *_TRANSFERS,
) | {"mm_payload": ("tensors",)}  # fmt: skip
# What a prompt of either kind takes; which kind it is, is told by the other fields.
_POOLING = _null(
    "cache_salt", "mm_processor_kwargs", "padding", "truncate_prompt_tokens", "truncation_side",
    "use_activation",
)  # fmt: skip
_ENCODING = _null("dimensions") | {
    "embed_dtype": ("float32",),
    "encoding_format": ("float",),
    "endianness": ("native",),
}
_SCORING = (
    _POOLING
    | _null("chat_template_kwargs", "instruction")
    | {
        "max_tokens_per_doc": (0,),
        "max_tokens_per_query": (0,),
    }
)

_ALIKE = frozenset(
    {
        "cache_salt", "chat_template_kwargs", "frequency_penalty", "ignore_eos", "logit_bias",
        "logprobs", "max_completion_tokens", "max_tokens", "messages", "min_p", "min_tokens",
        "model", "n", "presence_penalty", "prompt", "reasoning_effort", "repetition_penalty",
        "response_format", "seed", "skip_special_tokens", "stop", "stop_token_ids",
        "structured_outputs", "temperature", "top_k", "top_logprobs", "top_p",
    }
)  # fmt: skip
_ASKED_BY: Ignored = _ID | _RANK | {"user": _TEXT}
_MARKED: Ignored = {"cache_control": object, "service_tier": object}

_TABLE = (
    CachedRoute(
        paths=("/v1/chat/completions",),
        format=CHOICES,
        streams=True,
        id_prefix="chatcmpl-",
        same_in_both_encodings=_ALIKE,
        ignored=_ASKED_BY | _UNKNOWN | {"session_id": _TEXT},
        defaults=_CHAT | _null(*_TRANSFERS),
        media=("messages",),
        unrepeatable=_TRANSFERS,
    ),
    CachedRoute(
        paths=("/v1/completions",),
        format=CHOICES,
        streams=True,
        id_prefix="cmpl-",
        same_in_both_encodings=_ALIKE,
        ignored=_ASKED_BY | _UNKNOWN | {"session_id": _TEXT},
        defaults=_COMPLETION | _null(*_TRANSFERS),
        unrepeatable=_TRANSFERS,
    ),
    CachedRoute(
        paths=("/v1/responses",),
        format=RESPONSE,
        streams=True,
        id_prefix="resp_",
        # `metadata`, `service_tier` and `user` come back in the answer.
        ignored=_RANK
        | {
            "prompt_cache_key": _TEXT,
            "prompt_cache_retention": object,
            "safety_identifier": object,
            "session_id": _TEXT,
            "store": (bool, type(None)),
        },
        defaults=_RESPONSE,
        media=("input", "previous_input_messages"),
        # The answer's id would be the one asked for.
        unrepeatable=(
            *_TRANSFERS,
            "background",
            "conversation",
            "previous_response_id",
            "prompt",
            "request_id",
            "store",
        ),
        engine_may_keep=True,
    ),
    CachedRoute(
        paths=("/v1/messages",),
        format=MESSAGE,
        streams=True,
        id_prefix="chatcmpl-",
        ignored=_MARKED | {"metadata": _OBJECT},
        normalize=messages.without_ignored_fields,
        needs_model=True,
        defaults=_MESSAGE,
        media=("messages", "system"),
        unrepeatable=(*_TRANSFERS, "container", "mcp_servers"),
    ),
    CachedRoute(
        paths=("/v1/messages/count_tokens",),
        format=OPAQUE,
        deterministic=True,
        ignored=_MARKED | {"metadata": object},
        normalize=messages.without_ignored_fields,
        needs_model=True,
        defaults=_null(
            "chat_template_kwargs", "output_config", "system", "thinking", "tool_choice", "tools"
        ),
        media=("messages", "system"),
        unrepeatable=("container", "mcp_servers"),
    ),
    CachedRoute(
        paths=("/v1/embeddings",),
        format=OPAQUE,
        id_prefix="embd-",
        deterministic=True,
        ignored=_ASKED_BY,
        defaults=_POOLING | _ENCODING,
        media=("input", "messages"),
    ),
    CachedRoute(
        paths=("/v2/embed",),
        format=OPAQUE,
        id_prefix="embd-",
        deterministic=True,
        ignored=_RANK,
        defaults=_null("embedding_types", "input_type", "max_tokens", "output_dimension")
        | {"truncate": ("END",)},
        media=("inputs",),
        # They may be anywhere.
        unrepeatable=("images",),
    ),
    CachedRoute(
        paths=("/score", "/v1/score"),
        format=OPAQUE,
        id_prefix="score-",
        deterministic=True,
        ignored=_ASKED_BY,
        defaults=_SCORING,
        media=("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2"),
    ),
    CachedRoute(
        paths=("/rerank", "/v1/rerank", "/v2/rerank"),
        format=OPAQUE,
        id_prefix="score-",
        deterministic=True,
        ignored=_ASKED_BY,
        defaults=_SCORING | {"top_n": (0,)},
        media=("query", "documents"),
    ),
    CachedRoute(
        paths=("/pooling",),
        format=OPAQUE,
        id_prefix="pooling-",
        deterministic=True,
        ignored=_ASKED_BY,
        defaults=_POOLING | _ENCODING | _null("task"),
        media=("input", "messages"),
        # It is for plugins, which may take it for anything.
        unrepeatable=("data",),
    ),
    CachedRoute(
        paths=("/classify",),
        format=OPAQUE,
        id_prefix="classify-",
        deterministic=True,
        ignored=_ASKED_BY,
        defaults=_POOLING,
        media=("input", "messages"),
    ),
    CachedRoute(
        paths=("/tokenize",),
        format=OPAQUE,
        deterministic=True,
        ignored={},
        defaults={"return_token_strs": (False, None)},
        media=("messages",),
    ),
    CachedRoute(paths=("/detokenize",), format=OPAQUE, deterministic=True, ignored={}, defaults={}),
)

CACHED_ROUTES: Mapping[str, CachedRoute] = {path: route for route in _TABLE for path in route.paths}
"""The routes by each of their paths; all are asked by POST."""

_STORES = "VLLM_ENABLE_RESPONSES_API_STORE"
# With one of these options an engine may put something into one form alone: `metrics` and experts,
# which a stream has only if it was asked for token counts, or reasoning, for which each form has a
# parser of its own.
_APART = (
    "aux_output_config", "config", "enable_force_include_usage", "enable_per_request_metrics",
    "enable_return_routed_experts", "reasoning_parser", "structured_outputs_config",
    "tool_parser_plugin",
)  # fmt: skip
PLAIN_PARSERS = frozenset(
    {
        "deepseek_v3", "deepseek_v31", "hermes", "llama3_json", "llama4_json", "llama4_pythonic",
        "phi4_mini_json", "pythonic", "qwen3_json",
    }
)  # fmt: skip
"""Those of vLLM's parsers of tool calls that leave a text as it is where there are no tools."""


def encodings_agree(options: Mapping[str, Any]) -> bool:
    """Whether a vLLM with these options gives the same text in a body and in a stream."""
    parser = options.get("tool_call_parser")
    return not any(options.get(name) for name in _APART) and (not parser or parser in PLAIN_PARSERS)


def always_counts_tokens(options: Mapping[str, Any]) -> bool:
    """Whether a vLLM with these options puts token counts into each stream, asked for or not."""
    return bool(options.get("enable_force_include_usage"))


def engine_keeps_responses(environments: Iterable[Mapping[str, str]]) -> bool:
    """Whether a vLLM with one of these environments keeps what `/v1/responses` answers."""
    return any(env.get(_STORES, "0") not in ("", "0") for env in environments)
