"""What the differential test asks: requests over vLLM's surface, good ones and bad ones."""

from typing import Any, NamedTuple

from server.protocol.routes import CACHED_ROUTES
from tests.e2e.conftest import MODEL

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


class Case(NamedTuple):
    """One request; a `body` of bytes is sent as it is."""

    path: str
    body: dict[str, Any] | bytes

    def __str__(self) -> str:
        return f"{self.path} {self.body!r}"[:160]


FUNCTION = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": FUNCTION}
FORCED = {"type": "function", "function": {"name": "weather"}}
FLAT_TOOL = {"type": "function", **FUNCTION}
CLAUDE_TOOL = {
    "name": "weather",
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(text: str = "Name a colour.", **more: Any) -> Case:
    body = {"model": MODEL, "messages": user(text), "temperature": 0, "max_tokens": 4}
    return Case(CHAT, body | more)


def text(prompt: Any = "One, two, three,", **more: Any) -> Case:
    return Case(TEXT, {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4} | more)


def responses(asked: Any = "Name a fruit.", **more: Any) -> Case:
    body = {"model": MODEL, "input": asked, "temperature": 0, "max_output_tokens": 4}
    return Case(RESPONSES, body | more)


def messages(asked: Any = "Name a tree.", **more: Any) -> Case:
    said = user(asked) if isinstance(asked, str) else asked
    body = {"model": MODEL, "messages": said, "temperature": 0, "max_tokens": 4}
    return Case(MESSAGES, body | more)


def count(asked: Any = "Name a tree.", **more: Any) -> Case:
    return Case(COUNT, {"model": MODEL, "messages": user(asked)} | more)


def tokenize(**more: Any) -> Case:
    return Case(TOKENIZE, {"model": MODEL} | more)


_BOTH: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.2},
    {"logit_bias": {"28": -100, "29": 1.5}},
    {"top_p": 0.5},
    {"top_k": 3},
    {"min_p": 0.1},
    {"seed": 7},
    {"seed": 7, "temperature": 0.8},
    {"stop": ","},
    {"stop": [",", "e"]},
    {"stop": ",", "include_stop_str_in_output": True},
    {"stop_token_ids": [28]},
    {"min_tokens": 3},
    {"ignore_eos": True},
    {"n": 2, "seed": 3, "temperature": 0.9, "max_tokens": 1},
    {"bad_words": ["the"]},
    {"skip_special_tokens": False},
    {"return_token_ids": True},
    {"user": "somebody", "metadata": {"a": "b"}, "stop": "zz"},
    {"structured_outputs": {"choice": ["red", "green"]}},
    {"structured_outputs": {"regex": "[a-c]{2}"}, "max_tokens": 6},
    {"response_format": {"type": "json_object"}, "max_tokens": 8},
    {"response_format": JSON_SCHEMA, "max_tokens": 12},
    {"allowed_token_ids": [28, 29, 30]},
    {"truncate_prompt_tokens": 3},
    {"cache_salt": "salt", "stop": "zzz"},
]
_CHAT: list[dict[str, Any]] = [
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    # What is computed side by side is rounded as chance has it, so no more than a token.
    {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1, "temperature": 0.7, "max_tokens": 1},
    {"logprobs": True, "return_tokens_as_token_ids": True},
    {"max_tokens": None, "max_completion_tokens": 3},
    {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 24},
    {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 16},
    # Cut, and told otherwise in either form.
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 8},
    {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 3},
    {"tools": [TOOL], "tool_choice": FORCED, "parallel_tool_calls": False, "max_tokens": 16},
    {"reasoning_effort": "low"},
    {"chat_template_kwargs": {"x": 1}},
    {"add_generation_prompt": False},
    {"messages": [{"role": "system", "content": "Be brief."}, *user("Hello?")]},
    {
        "messages": [*user("Say A."), {"role": "assistant", "content": "A"}, *user("And B?")],
        "max_tokens": 2,
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "A part."}]}]},
    {
        "messages": [*user("Say"), {"role": "assistant", "content": "Well"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    {
        "messages": [
            *user("Weather?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        ]
    },
    {"messages": user('Quotes " and \\ and \u2028 and 日本 and 🎈 and \x00.')},
    {"documents": [{"title": "t", "text": "x"}]},
    {"echo": True},
]
_TEXT: list[dict[str, Any]] = [
    {"logprobs": 1},
    {"logprobs": 0},
    {"logprobs": 2, "echo": True},
    {"echo": True},
    {"echo": True, "max_tokens": 0},
    {"prompt": ["One", "Two"]},
    {"prompt": ["One", "Two"], "n": 2, "seed": 5, "temperature": 0.9, "max_tokens": 1},
    {"prompt": [504, 314, 260]},
    {"prompt": [[504, 314], [260]]},
    {"prompt_logprobs": 1},
    {"add_special_tokens": False},
    {"max_tokens": None},
]
_RESPONSES: list[dict[str, Any]] = [
    {},
    {"instructions": "Be brief."},
    {"input": user("Name a bird.")},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Name a fish."}]}]},
    {
        "input": [
            *user("Say A."),
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "A", "annotations": []}],
            },
            *user("And B?"),
        ]
    },
    {"metadata": {"a": "b"}, "user": "somebody"},
    {"top_p": 0.5, "seed": 3},
    {"store": False, "top_k": 7},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {
        "text": {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}},
        "max_output_tokens": 12,
    },
    {"tools": [FLAT_TOOL], "tool_choice": "none"},
    {"tools": [FLAT_TOOL], "tool_choice": "required", "max_output_tokens": 24},
    {
        "tools": [FLAT_TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 16,
    },
    {"structured_outputs": {"choice": ["fig", "pear"]}, "max_output_tokens": 8},
    {"service_tier": "default", "truncation": "auto", "parallel_tool_calls": False},
]
_MESSAGES: list[dict[str, Any]] = [
    {},
    {"system": "Be brief."},
    {"system": [{"type": "text", "text": "Be brief."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a bird."}]}]},
    {"messages": [*user("Say A."), {"role": "assistant", "content": "A"}, *user("And B?")]},
    {"stop_sequences": [","], "max_tokens": 8},
    {"top_k": 5, "top_p": 0.5},
    {"metadata": {"user_id": "u"}, "top_k": 7},
    {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "none"}},
    {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "any"}, "max_tokens": 24},
    {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 16},
    {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "max_tokens": 12},
]
# Of these either form is made of the other.
ALIKE = [
    *(
        make(f"Either form, {number}?", **more)
        for make, cases in ((chat, (*_BOTH, *_CHAT)), (text, (*_BOTH[::5], *_TEXT)))
        for number, more in enumerate(cases)
        if more.keys() <= CACHED_ROUTES[CHAT].fields.same_in_both_encodings - {"messages", "prompt"}
    ),
    text(["One", "Two"]),
]
# Not there in a stream.
_BODIES_ONLY = ({"prompt_logprobs": 1},)


def _streamed(cases: list[Case]) -> list[Case]:
    """Return the cases, and each as a stream.

    But of tools a body makes none of it; there a salt sees to that.
    """
    return [
        Case(case.path, case.body | more)
        for case in cases
        if isinstance(case.body, dict)
        for salt in ({} if "tools" in case.body else {"cache_salt": "s"},)
        for more in ({}, {"stream": True} | salt)
    ]


GOOD = [
    *_streamed([chat(**more) for more in (*_BOTH, *_CHAT)]),
    *_streamed([text(**more) for more in (*_BOTH, *_TEXT) if more not in _BODIES_ONLY]),
    *(text(**more) for more in _BODIES_ONLY),
    *_streamed([responses(**more) for more in _RESPONSES]),
    *_streamed([messages(**more) for more in _MESSAGES]),
    chat("With counts?", **WITH_USAGE),
    chat("Counts all along?", stream=True, stream_options={"include_usage": True,
                                                           "continuous_usage_stats": True}),
    text("With counts,", **WITH_USAGE),
    Case(CHAT, {"messages": user("No model?"), "temperature": 0, "max_tokens": 2}),
    Case(TEXT, {"prompt": "No model", "temperature": 0}),
    Case(CHAT, b'{"messages":[{"role":"user","content":"x"}],"messages":[{"role":"user",'
               b'"content":"Twice?"}],"temperature":1,"temperature":0,"max_tokens":2}'),
    Case(TEXT, b' {"prompt" : "\\u0041nd so" , "temperature":0.0e1 , "max_tokens":2 }\n'),
    count(),
    count(system="Be brief.", tools=[CLAUDE_TOOL]),
    tokenize(prompt="Hello there."),
    tokenize(prompt="Hello there.", add_special_tokens=False),
    tokenize(prompt="Hello there.", return_token_strs=True),
    tokenize(messages=user("Hello?")),
    tokenize(messages=user("Hello?"), add_generation_prompt=False, tools=[TOOL]),
    Case(TOKENIZE, {"prompt": "No model"}),
    Case(DETOKENIZE, {"model": MODEL, "tokens": [504, 314, 260]}),
    Case(DETOKENIZE, {"tokens": []}),
]  # fmt: skip

BAD = [
    *(Case(path, b"{") for path in (CHAT, TEXT, RESPONSES, MESSAGES, COUNT, TOKENIZE, DETOKENIZE)),
    *(Case(path, b"[]") for path in (CHAT, RESPONSES, MESSAGES, TOKENIZE)),
    *(Case(path, b"") for path in (CHAT, TEXT)),
    *(Case(path, {}) for path in (CHAT, TEXT, RESPONSES, MESSAGES, COUNT, TOKENIZE, DETOKENIZE)),
    *(make(model="unknown") for make in (chat, text, responses, messages, count)),
    tokenize(model="unknown", prompt="x"),
    *(
        make(**{name: value})
        for make in (chat, text)
        for name, value in (
            ("temperature", -1),
            ("temperature", "hot"),
            ("temperature", [0]),
            ("top_p", 2),
            ("top_k", -5),
            ("max_tokens", -1),
            ("max_tokens", 100_000),
            ("n", 0),
            ("n", "two"),
            ("frequency_penalty", 3),
            ("seed", 2**64),
            ("stop", 5),
            ("logit_bias", {"x": 1}),
            ("stream_options", {"include_usage": True}),
            ("response_format", {"type": "json_schema"}),
            ("structured_outputs", {"regex": "a", "choice": ["a"]}),
            ("cache_salt", ""),
            ("stream", "perhaps"),
            ("user", 5),
            ("stream", True) if make is text else ("logprobs", "x"),
        )
        if (name, value) != ("stream", True)
    ),
    chat(messages=[]),
    chat(messages="hi"),
    chat(messages=[{"content": "hi"}]),
    chat(messages=[{"role": "user", "content": 5}]),
    chat(top_logprobs=2),
    chat(logprobs=True, top_logprobs=-3),
    chat(tools=[]),
    chat(tool_choice="auto"),
    chat(tools=[TOOL], tool_choice="sometimes"),
    chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "other"}}),
    chat(tools=[{"type": "function"}]),
    chat(continue_final_message=True, add_generation_prompt=True),
    chat(prompt_logprobs=1, stream=True),
    text(prompt=""),
    text(prompt=[]),
    text(prompt=[-1]),
    text(prompt=[10**9]),
    text(prompt={"a": 1}),
    text(logprobs=-2),
    text(logprobs="x"),
    responses(asked=5),
    responses(background=True),
    responses(previous_response_id="resp_unknown"),
    responses(prompt={"id": "p"}),
    responses(tool_choice="required"),
    responses(temperature="hot"),
    messages(max_tokens=0),
    messages(max_tokens=None),
    messages(asked=[{"role": "other", "content": "hi"}]),
    messages(tool_choice={"type": "tool"}),
    messages(temperature="hot"),
    tokenize(prompt=5),
    tokenize(messages=user("x"), add_generation_prompt=True, continue_final_message=True),
    Case(DETOKENIZE, {"tokens": [-1]}),
    Case(DETOKENIZE, {"tokens": "x"}),
]
