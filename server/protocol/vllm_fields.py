"""The fields of vLLM's requests: which of their values change no answer.

Taken from vLLM 0.32: the classes of the requests are in `protocol.py` of `vllm/entrypoints/*`.
`server.protocol.routes` maps routes to these fields.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Types = type | tuple[type, ...]
Defaults = dict[str, tuple[Any, ...]]
"""Fields with the values that mean the same as leaving the field out."""
Ignored = dict[str, Types]
"""Fields that change no answer while their value has one of these types. vLLM refuses others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestFields:
    """The fields of one class of requests that a key treats specially. It keeps all others."""

    ignored: Ignored
    defaults: Defaults
    """vLLM's own. Where `generation_config`, a chat template or another field may decide, a default
    differs from absence and isn't listed."""
    normalize: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Returns the fields of a body without what vLLM ignores within them."""
    same_in_both_encodings: frozenset[str] = frozenset()
    """Fields that get the same answer in a JSON body and in a stream. With any other field vLLM may
    drop or refuse something in one of them, or use another parser, so the encoding becomes part of
    the key. Empty where neither encoding can be made of the other."""
    media: tuple[str, ...] = ()
    """Fields that may name media."""
    unrepeatable: tuple[str, ...] = ()
    """Fields that name what exists at one moment only, or in one server."""


def _null(*names: str) -> Defaults:
    return dict.fromkeys(names, (None,))


_TEXT = (str, type(None))
_OBJECT = (dict, type(None))
_PRIORITY: Ignored = {"priority": int}
_ASKED_BY: Ignored = _PRIORITY | {"request_id": str, "user": _TEXT}
# vLLM's classes don't know these fields and take any value. Each identifies the client, or controls
# what an engine stores; an unknown field that might change the answer stays in the key.
_UNKNOWN: Ignored = dict.fromkeys(
    (
        "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store",
    ),
    object,
)  # fmt: skip
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")

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
    *_TRANSFERS,
) | {
    "bad_words": ([],),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "return_token_offsets": (False, None),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}  # fmt: skip
_SAME_IN_BOTH_ENCODINGS = frozenset(
    {
        "cache_salt", "chat_template_kwargs", "frequency_penalty", "ignore_eos", "logit_bias",
        "logprobs", "max_completion_tokens", "max_tokens", "messages", "min_p", "min_tokens",
        "model", "n", "presence_penalty", "prompt", "reasoning_effort", "repetition_penalty",
        "response_format", "seed", "skip_special_tokens", "stop", "stop_token_ids",
        "structured_outputs", "temperature", "top_k", "top_logprobs", "top_p",
    }
)  # fmt: skip
CHAT = RequestFields(
    ignored=_ASKED_BY | _UNKNOWN | {"session_id": _TEXT},
    # `add_generation_prompt` isn't listed: vLLM refuses it, if given, where a message is continued.
    # Nor is `tool_choice`: with tools, its absence means another value than `null`.
    defaults=_COMPLETING | _null(
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
    },
    same_in_both_encodings=_SAME_IN_BOTH_ENCODINGS,
    media=("messages",),
    unrepeatable=_TRANSFERS,
)  # fmt: skip
COMPLETION = RequestFields(
    ignored=_ASKED_BY | _UNKNOWN | {"session_id": _TEXT},
    defaults=_COMPLETING | _null("logprobs", "prompt", "prompt_embeds", "suffix") | {
        "add_special_tokens": (True,),
        "echo": (False, None),
        "max_tokens": (16, None),
        "n": (1,),
    },
    same_in_both_encodings=_SAME_IN_BOTH_ENCODINGS,
    unrepeatable=_TRANSFERS,
)  # fmt: skip
RESPONSE = RequestFields(
    # Answers repeat `metadata`, `service_tier` and `user`, so these stay in the key.
    ignored=_PRIORITY | {
        "prompt_cache_key": _TEXT,
        "prompt_cache_retention": object,
        "safety_identifier": object,
        "session_id": _TEXT,
        "store": (bool, type(None)),
    },
    defaults=_SAMPLING | _null(
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
    },
    media=("input", "previous_input_messages"),
    # `request_id` becomes the id of the answer.
    unrepeatable=(
        *_TRANSFERS, "background", "conversation", "previous_response_id", "prompt", "request_id",
        "store",
    ),
)  # fmt: skip

_CACHE_CONTROL = "cache_control"
# What vLLM ignores within the blocks of Anthropic's Messages. It drops fields that its classes
# don't know, such as `cache_control`. They know the other two, but nothing reads those.
_IGNORED_IN_BLOCKS: tuple[tuple[str, Types], ...] = (
    (_CACHE_CONTROL, object),
    ("is_error", (bool, type(None))),
    ("signature", (str, type(None))),
)
_NAMES_IGNORED_IN_BLOCKS = frozenset(name for name, _ in _IGNORED_IN_BLOCKS)
_BILLING_HEADER = "x-anthropic-billing-header"
_FIELDS_OF_TEXT_BLOCKS = frozenset({"type", "text", _CACHE_CONTROL})


def without_ignored_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Anthropic's Messages without what vLLM ignores within them.

    That is `cache_control`, `is_error`, `signature`, and a system block that begins as Claude
    Code's billing header does; clients change these from call to call. Values that a class may
    refuse stay, and so do the schemas and the arguments of tools, whose names are the client's own.
    `body` isn't changed.
    """
    fields = dict(body)
    if isinstance(system := fields.get("system"), list):
        fields["system"] = _clean_blocks(system, "system")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            message | {"content": _clean_blocks(content, message.get("role"))}
            if isinstance(message, dict) and isinstance(content := message.get("content"), list)
            else message
            for message in messages
        ]
    if isinstance(tools := fields.get("tools"), list):
        fields["tools"] = _without_cache_control(tools)
    return fields


def _clean_blocks(blocks: list[Any], role: Any) -> list[Any]:
    # A conversation has hundreds of blocks, so this loop avoids calls and copies.
    cleaned = []
    for block in blocks:
        clean = block
        if isinstance(block, dict):
            if role == "system" and _is_billing_header(block):
                continue
            if not _NAMES_IGNORED_IN_BLOCKS.isdisjoint(block):
                clean = _clean_block(block)
            # In messages of other roles vLLM reads every field of a tool's result.
            if role == "user" and isinstance(parts := block.get("content"), list):
                clean = clean | {"content": _without_cache_control(parts)}
        cleaned.append(clean)
    return cleaned


def _clean_block(block: dict[str, Any]) -> dict[str, Any]:
    clean = block.copy()
    for name, types in _IGNORED_IN_BLOCKS:
        if name in clean and isinstance(clean[name], types):
            del clean[name]
    return clean


def _without_cache_control(parts: list[Any]) -> list[Any]:
    return [
        {name: value for name, value in part.items() if name != _CACHE_CONTROL}
        if isinstance(part, dict) and _CACHE_CONTROL in part
        else part
        for part in parts
    ]


def _is_billing_header(block: dict[str, Any]) -> bool:
    text = block.get("text")
    return (
        isinstance(text, str)
        and text.startswith(_BILLING_HEADER)
        and block.get("type") == "text"
        and block.keys() <= _FIELDS_OF_TEXT_BLOCKS
    )


_UNKNOWN_TO_MESSAGES: Ignored = {_CACHE_CONTROL: object, "service_tier": object}
_IN_BOTH_MESSAGES = _null(
    "chat_template_kwargs", "output_config", "system", "thinking", "tool_choice", "tools"
)
_REMOTE = ("container", "mcp_servers")
MESSAGE = RequestFields(
    ignored=_UNKNOWN_TO_MESSAGES | {"metadata": _OBJECT},
    defaults=_IN_BOTH_MESSAGES | _null(
        "cache_salt", "return_mm_kwargs", "stop_sequences", "temperature", "top_k", "top_p",
        "vllm_xargs", "watermarking", *_TRANSFERS,
    ) | {"mm_payload": ("tensors",)},
    normalize=without_ignored_fields,
    media=("messages", "system"),
    unrepeatable=(*_TRANSFERS, *_REMOTE),
)  # fmt: skip
MESSAGE_COUNT = RequestFields(
    ignored=_UNKNOWN_TO_MESSAGES | {"metadata": object},
    defaults=_IN_BOTH_MESSAGES,
    normalize=without_ignored_fields,
    media=("messages", "system"),
    unrepeatable=_REMOTE,
)

# Of the classes for texts, tokens and conversations; vLLM chooses one by the fields that hold the
# prompt.
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
EMBEDDING = RequestFields(
    ignored=_ASKED_BY, defaults=_POOLING | _ENCODING, media=("input", "messages")
)
COHERE_EMBEDDING = RequestFields(
    ignored=_PRIORITY,
    defaults=_null("embedding_types", "input_type", "max_tokens", "output_dimension")
    | {"truncate": ("END",)},
    media=("inputs",),
    # They may be anywhere.
    unrepeatable=("images",),
)
SCORE = RequestFields(
    ignored=_ASKED_BY,
    defaults=_SCORING,
    media=("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2"),
)
RERANK = RequestFields(
    ignored=_ASKED_BY, defaults=_SCORING | {"top_n": (0,)}, media=("query", "documents")
)
POOLING = RequestFields(
    ignored=_ASKED_BY,
    defaults=_POOLING | _ENCODING | _null("task"),
    media=("input", "messages"),
    # It is for plugins, which may take it for anything.
    unrepeatable=("data",),
)
CLASSIFICATION = RequestFields(ignored=_ASKED_BY, defaults=_POOLING, media=("input", "messages"))
TOKENIZATION = RequestFields(
    ignored={}, defaults={"return_token_strs": (False, None)}, media=("messages",)
)
DETOKENIZATION = RequestFields(ignored={}, defaults={})
