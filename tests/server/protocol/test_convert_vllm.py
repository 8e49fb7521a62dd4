"""Conversion against vLLM's own generators: either form is what vLLM says in it, to the byte.

They take a quarter of a minute to import, so this is left to the runs that have an engine.
"""

import warnings
from collections.abc import AsyncIterator, Iterator
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson
import pytest

from server.engine.vllm_options import PLAIN_PARSERS
from server.handlers.recording import record_answer
from server.protocol import convert
from server.protocol.formats import CHOICES, Encoding
from tiers import Answer

pytestmark = pytest.mark.engine

# What each choice says, piece by piece: its text and its tokens, of which some say nothing yet.
PIECES = (
    [("Hello", ["Hel", "lo"]), ("", [" wor"]), (" world\n\n", ["ld", "\n\n"]), ("", [])],
    [
        ("G\N{LATIN SMALL LETTER U WITH DIAERESIS}t", ["G\xfc", "t"]),
        ("\N{WAVING HAND SIGN}", ["x"]),
    ],
)


class Case(NamedTuple):
    """What a request asks for, and what its engine tells beside the text."""

    n: int = 1
    logprobs: bool = False
    cached: bool = False
    stop_reason: int | str | None = None
    fingerprint: str | None = "fp"


CASES = [
    Case(),
    Case(logprobs=True),
    Case(n=2, cached=True, stop_reason="\n"),
    Case(n=2, logprobs=True, stop_reason=7, fingerprint=None),
]


class Reply:
    """An upstream's reply, as far as it is recorded."""

    status = 200

    def __init__(self, raw: bytes, form: Encoding) -> None:
        self._raw, self.headers, self.content = raw, {}, self
        self.content_type = "text/event-stream" if form is Encoding.SSE else "application/json"

    async def read(self) -> bytes:
        return self._raw

    async def iter_any(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self._raw), 100):
            yield self._raw[at : at + 100]


async def recorded(raw: bytes, form: Encoding) -> Answer:
    async def publish(_: bytes) -> None:
        pass

    answer, finished, _ = await record_answer(
        reply := Reply(raw, form), reply.iter_any(), CHOICES, form, publish, 1_000_000
    )
    assert finished
    return answer


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """Return vLLM's modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import logprobs, outputs
        from vllm.entrypoints.generate.base import protocol as base
        from vllm.entrypoints.openai.chat_completion import protocol as chat
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion import protocol as text
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.serve.engine import protocol as engine
        from vllm.parser import abstract_parser, parser_manager
    return SimpleNamespace(
        base=base, chat=chat, text=text, engine=engine, outputs=outputs, logprobs=logprobs,
        servers={"chat": OpenAIServingChat, "text": OpenAIServingCompletion},
        delegating=abstract_parser.DelegatingParser, parsers=parser_manager.ParserManager,
    )  # fmt: skip


def server_of(vllm: SimpleNamespace, route: str, case: Case) -> Any:
    """Return vLLM's server of a route, without an engine and without parsers."""
    made = object.__new__(vllm.servers[route])
    off = (
        "enable_force_include_usage", "enable_log_outputs", "enable_per_request_metrics",
        "enable_auto_tools", "return_tokens_as_token_ids", "_include_reasoning_tokens_details",
    )  # fmt: skip
    made.__dict__ |= dict.fromkeys(off, False) | {
        "parser_cls": None,
        "request_logger": None,
        "response_role": "assistant",
        "enable_prompt_tokens_details": case.cached,
        "system_fingerprint": case.fingerprint,
    }
    return made


def request_of(vllm: SimpleNamespace, route: str, case: Case, *, stream: bool) -> Any:
    asked: dict[str, Any] = {"n": case.n}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    if route == "text":
        logprobs = {"logprobs": 1} if case.logprobs else {}
        return vllm.text.CompletionRequest(prompt="hi", **asked, **logprobs)
    logprobs = {"logprobs": True, "top_logprobs": 1} if case.logprobs else {}
    messages = [{"role": "user", "content": "hi"}]
    return vllm.chat.ChatCompletionRequest(messages=messages, **asked, **logprobs)


def output(vllm: SimpleNamespace, case: Case, index: int, pieces: list, *, ends: bool) -> Any:
    """Return what the engine gives of a choice for some of its pieces."""
    tokens = [token for _, of_piece in pieces for token in of_piece]
    return vllm.outputs.CompletionOutput(
        index=index,
        text="".join(text for text, _ in pieces),
        token_ids=[len(token) for token in tokens],
        cumulative_logprob=None,
        logprobs=[
            {
                len(token): vllm.logprobs.Logprob(-len(token) / 8, 1, token),
                99: vllm.logprobs.Logprob(float("-inf"), 2, "other"),
            }
            for token in tokens
        ]
        if case.logprobs
        else None,
        finish_reason="stop" if ends else None,
        stop_reason=case.stop_reason if ends else None,
    )


def outputs_of(vllm: SimpleNamespace, case: Case, *, at_once: bool) -> Iterator[Any]:
    """Yield what the engine gives, at once or piece by piece."""
    steps: list[list[Any]]
    if at_once:
        steps = [[output(vllm, case, i, PIECES[i], ends=True) for i in range(case.n)]]
    else:
        steps = [
            [
                output(vllm, case, i, [piece], ends=number == len(PIECES[i]) - 1)
                for i, piece in enumerate(pieces)
                if piece is not None
            ]
            for number, pieces in enumerate(zip_longest(*PIECES[: case.n]))
        ]
    for made in steps:
        yield vllm.outputs.RequestOutput(
            "id", "hi", [1, 2, 3], None, made, finished=True, num_cached_tokens=2
        )


async def stream_of(vllm: SimpleNamespace, route: str, case: Case, *, at_once: bool) -> bytes:
    async def chats() -> AsyncIterator[Any]:
        for each in outputs_of(vllm, case, at_once=at_once):
            yield each

    async def texts() -> AsyncIterator[Any]:
        async for each in chats():
            yield 0, each

    server, asked = server_of(vllm, route, case), request_of(vllm, route, case, stream=True)
    metadata = vllm.base.RequestResponseMetadata(request_id="x")
    if route == "chat":
        made = server.chat_completion_stream_generator(asked, chats(), "x", "m", [], None, metadata)
    else:
        made = server.completion_stream_generator(
            asked, [None], texts(), "x", 1, "m", 1, None, metadata
        )
    return "".join([event async for event in made]).encode()


async def body_of(vllm: SimpleNamespace, route: str, case: Case) -> bytes:
    async def chats() -> AsyncIterator[Any]:
        for each in outputs_of(vllm, case, at_once=True):
            yield each

    server, asked = server_of(vllm, route, case), request_of(vllm, route, case, stream=False)
    metadata = vllm.base.RequestResponseMetadata(request_id="x")
    if route == "chat":
        made = await server.chat_completion_full_generator(
            asked, chats(), "x", "m", [], None, metadata
        )
    else:
        whole = list(outputs_of(vllm, case, at_once=True))
        made = server.request_output_to_completion_response(
            whole, asked, "x", 1, "m", None, metadata
        )
    return orjson.dumps(made.model_dump())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("route", ["chat", "text"])
async def test_either_form_becomes_vllms_other(vllm, route: str, case: Case) -> None:
    body = await recorded(await body_of(vllm, route, case), Encoding.JSON)
    for at_once in (True, False):
        events = await recorded(await stream_of(vllm, route, case, at_once=at_once), Encoding.SSE)
        assert convert.convert(events, Encoding.JSON) == body
    events = await recorded(await stream_of(vllm, route, case, at_once=True), Encoding.SSE)
    assert convert.convert(body, Encoding.SSE) == events


def test_all_fields_of_vllms_are_known(vllm) -> None:
    chat, text, engine = vllm.chat, vllm.text, vllm.engine
    for fields, made in (
        (convert._CHAT.body, chat.ChatCompletionResponse),
        (convert._CHAT.choice, chat.ChatCompletionResponseChoice),
        (convert._CHAT.chunk, chat.ChatCompletionStreamResponse),
        (convert._CHAT.part, chat.ChatCompletionResponseStreamChoice),
        (convert._TEXT.body, text.CompletionResponse),
        (convert._TEXT.choice, text.CompletionResponseChoice),
        (convert._TEXT.chunk, text.CompletionStreamResponse),
        (convert._TEXT.part, text.CompletionResponseStreamChoice),
        (convert._USAGE, engine.UsageInfo),
        (convert._PROMPT_TOKENS, engine.PromptTokenUsageInfo),
        (convert._COUNTS, text.CompletionStreamResponse),
    ):
        assert list(fields.nulls) == list(made.model_fields)
    # It leaves out tool calls where there are none, and nothing else.
    known = {name for name in chat.ChatMessage.model_fields if name != "tool_calls"}
    assert set(convert._MESSAGE.nulls) == known
    assert set(vllm.base.DeltaMessage.model_fields) - known == {"tool_calls"}
    assert set(chat.ChatCompletionLogProbsContent.model_fields) == convert._TOKEN
    assert chat.ChatCompletionLogProb.model_fields["logprob"].default == convert._UNKNOWN_LOGPROB


def test_plain_parsers_leave_a_text_as_it_is(vllm) -> None:
    for name in PLAIN_PARSERS:
        made = vllm.parsers.get_parser(tool_parser_name=name, enable_auto_tools=True)
        assert issubclass(made, vllm.delegating)
        for way in ("parse", "parse_delta", "_extract_tool_calls", "_extract_tool_calls_streaming"):
            assert getattr(made, way) is getattr(vllm.delegating, way)
        assert made.reasoning_parser_cls is None
        assert made.tool_parser_cls.engine_based_streaming is False
