"""Requests as agents send them, in shape; what they say is made up, and shorter.

Each is made for a call by its number: what an agent changes from call to call is changed, though it
asks for the same.
"""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.e2e.conftest import MODEL

from .requests import CHAT, CLAUDE_TOOL, COUNT, FLAT_TOOL, MESSAGES, RESPONSES, TOOL


class Call(NamedTuple):
    """One request of an agent."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str] = MappingProxyType({})


def _marked(block: dict[str, Any], number: int) -> dict[str, Any]:
    """Mark a block where a prompt may be cached; the marks move as a conversation goes on."""
    return block | ({"cache_control": {"type": "ephemeral"}} if number % 2 else {})


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _claudes_prompt(number: int) -> dict[str, Any]:
    billing = (
        f"x-anthropic-billing-header: cc_version=2.1.{number}; cc_entrypoint=cli; cch=0{number};"
    )
    thought = {"type": "thinking", "thinking": "I look it up.", "signature": f"c2ln{number}"}
    use = {"type": "tool_use", "id": "toolu_01", "name": "weather", "input": {"city": "Bonn"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_01", "content": [_text("Rain.")]}
    return {
        "model": MODEL,
        "system": [
            _text(billing),
            _marked(_text("You are a coding agent."), number),
            _marked(_text("Answer in a few words."), number + 1),
        ],
        "tools": [CLAUDE_TOOL, _marked(CLAUDE_TOOL | {"name": "forecast"}, number)],
        "messages": [
            {
                "role": "user",
                "content": [_text("<system-reminder>Be kind.</system-reminder>"), _text("Bonn?")],
            },
            {"role": "assistant", "content": [thought, _text("Let me see."), use]},
            {"role": "user", "content": [_marked(result | {"is_error": False}, number)]},
            {"role": "assistant", "content": [_text("It rains.")]},
            {"role": "user", "content": [_marked(_text("And tomorrow?"), number + 1)]},
        ],
    }


def _claudes_headers(number: int) -> dict[str, str]:
    return {
        "anthropic-beta": f"claude-code-20250219,interleaved-thinking-2025-05-14,x-{number}",
        "anthropic-version": "2023-06-01",
        "user-agent": f"claude-cli/2.1.{number} (external, cli)",
        "x-app": "cli",
        "x-stainless-retry-count": str(number),
    }


def claude_code(number: int) -> Call:
    body = _claudes_prompt(number) | {
        "max_tokens": 8,
        "metadata": {"user_id": f"user_0_account__session_{number}"},
        "stream": True,
        "temperature": 1,
    }
    return Call(f"{MESSAGES}?beta=true", body, _claudes_headers(number))


def claude_code_thinks(number: int) -> Call:
    call = claude_code(number)
    more = {
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    body = {name: value for name, value in call.body.items() if name != "temperature"} | more
    return call._replace(body=body)


def claude_code_counts(number: int) -> Call:
    return Call(f"{COUNT}?beta=true", _claudes_prompt(number), _claudes_headers(number))


def codex(number: int) -> Call:
    def said(role: str, text: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}

    called = {"type": "function_call", "name": "weather", "call_id": "call_1"}
    body = {
        "model": MODEL,
        "instructions": "You are a coding agent.",
        "input": [
            said("user", "<environment_context>cwd: /work</environment_context>"),
            said("user", "Bonn?"),
            called | {"arguments": json.dumps({"city": "Bonn"})},
            {"type": "function_call_output", "call_id": "call_1", "output": "Rain."},
            said("assistant", "It rains."),
            said("user", "And tomorrow?"),
        ],
        "tools": [FLAT_TOOL | {"strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": f"0199-{number}",
        "max_output_tokens": 8,
    }
    headers = {
        "openai-beta": "responses=experimental",
        "originator": "codex_cli_rs",
        "session_id": f"0199-{number}",
        "user-agent": "codex_cli_rs/0.9 (Debian)",
    }
    return Call(RESPONSES, body, headers)


def agents_sdk(number: int) -> Call:
    body = {
        "model": MODEL,
        "instructions": "You tell the weather.",
        "input": [{"role": "user", "content": "Bonn?"}],
        "include": [],
        "tools": [FLAT_TOOL | {"strict": True}],
        "stream": False,
        "prompt_cache_key": f"agents-sdk:run:{number}",
        "prompt_cache_retention": "24h",
        "safety_identifier": f"user-{number}",
        "max_output_tokens": 8,
    }
    return Call(RESPONSES, body, {"user-agent": "Agents/Python 0.4"})


def agents_sdk_chats(number: int) -> Call:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You tell the weather."},
            {"role": "user", "content": "Bonn?"},
        ],
        "tools": [TOOL],
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": bool(number % 2),
        "metadata": {"run": str(number)},
        "prompt_cache_key": f"agents-sdk:run:{number}",
        "safety_identifier": f"user-{number}",
        "service_tier": "auto" if number % 2 else "flex",
        "max_tokens": 8,
    }
    return Call(CHAT, body, {"user-agent": "Agents/Python 0.4"})


def cline(number: int) -> Call:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a coding agent."},
            {"role": "user", "content": [_text("<task>\nBonn?\n</task>"), _text("# Time\nNoon.")]},
        ],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8,
    }
    return Call(CHAT, body, {"x-title": "Cline", "x-stainless-retry-count": str(number)})


def aider(number: int) -> Call:
    call = cline(number)
    turns = [{"role": "user", "content": "I will answer in Markdown."}]
    turns += [{"role": "assistant", "content": "Ok."}, {"role": "user", "content": "Bonn?"}]
    body = call.body | {"messages": [call.body["messages"][0], *turns], "user": f"u{number}"}
    del body["stream_options"]
    return call._replace(body=body, headers={"user-agent": f"litellm/1.{number}"})


AGENTS: list[Callable[[int], Call]] = [
    agents_sdk,
    agents_sdk_chats,
    aider,
    claude_code,
    claude_code_counts,
    claude_code_thinks,
    cline,
    codex,
]
