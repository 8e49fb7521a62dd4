"""What vLLM's options and environment change in its answers."""

from collections.abc import Iterable, Mapping
from typing import Any

_KEEPS_RESPONSES = "VLLM_ENABLE_RESPONSES_API_STORE"
# With one of these options an engine may put something into one encoding only: `metrics` and
# experts, which a stream has only where the client asked for token counts, or reasoning, for which
# each encoding has its own parser.
_MAKES_ENCODINGS_DIFFER = (
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
"""vLLM's parsers of tool calls that leave a text unchanged where there are no tools."""


def encodings_agree(options: Mapping[str, Any]) -> bool:
    """Whether a vLLM with these options gives the same text in a JSON body and in a stream."""
    parser = options.get("tool_call_parser")
    return not any(options.get(name) for name in _MAKES_ENCODINGS_DIFFER) and (
        not parser or parser in PLAIN_PARSERS
    )


def always_counts_tokens(options: Mapping[str, Any]) -> bool:
    """Whether a vLLM with these options puts token counts into each stream, asked for or not."""
    return bool(options.get("enable_force_include_usage"))


def engine_keeps_responses(environments: Iterable[Mapping[str, str]]) -> bool:
    """Whether a vLLM with one of these environments keeps what `/v1/responses` answers."""
    return any(env.get(_KEEPS_RESPONSES, "0") not in ("", "0") for env in environments)
