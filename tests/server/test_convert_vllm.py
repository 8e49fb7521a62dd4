"""Conversion against vLLM's own classes: a stream becomes what it says in one body, and back.

They take a quarter of a minute to import, so this is left to the runs that have an engine.
"""

import warnings
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import orjson
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from server import convert
from server.record import record
from server.shapes import CHOICES
from tiers import Answer, Form

pytestmark = pytest.mark.engine

PROMPT_IDS = [1, 2, 3]
# What each choice says, piece by piece, in several tokens a piece.
SAID = (
    [["Hel", "lo"], [" wor"], ["ld", "\n\n"], []],
    [["G\N{LATIN SMALL LETTER U WITH DIAERESIS}", "t"], ["en Tag \N{WAVING HAND SIGN}"]],
)
THOUGHT = [["Let ", "me"], [" think"]]


class Case(NamedTuple):
    """What a request asks for."""

    n: int = 1
    logprobs: bool = False
    reasoning: bool = False
    token_ids: bool = False


CASES = [
    Case(),
    Case(logprobs=True),
    Case(n=2),
    Case(reasoning=True),
    Case(n=2, logprobs=True, reasoning=True),
    Case(token_ids=True),
    Case(n=2, logprobs=True, reasoning=True, token_ids=True),
]


class Reply:
    """An upstream's reply, as far as it is recorded."""

    status = 200

    def __init__(self, raw: bytes, form: Form) -> None:
        self._raw, self.headers, self.content = raw, {}, self
        self.content_type = "text/event-stream" if form is Form.EVENTS else "application/json"

    async def read(self) -> bytes:
        return self._raw

    async def iter_any(self) -> Iterator[bytes]:
        for at in range(0, len(self._raw), 100):
            yield self._raw[at : at + 100]


@pytest.fixture(scope="module")
def vllm() -> tuple[Any, Any, Any]:
    """Return vLLM's modules: chat, completions, and what both use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.entrypoints.generate.base import protocol as base
        from vllm.entrypoints.openai.chat_completion import protocol as chat
        from vllm.entrypoints.openai.completion import protocol as completion
        from vllm.entrypoints.serve.engine import protocol as engine
    usage = engine.UsageInfo(prompt_tokens=3, completion_tokens=9, total_tokens=12)
    return chat, completion, (base, usage)


def ids_of(tokens: list[str]) -> list[int]:
    return [len(token) for token in tokens]


def chat_logprobs(chat, tokens: list[str]):
    def one(made: type, token: str, **more):
        return made(token=token, logprob=-len(token) / 8, bytes=list(token.encode()), **more)

    return chat.ChatCompletionLogProbs(
        content=[
            one(
                chat.ChatCompletionLogProbsContent,
                token,
                top_logprobs=[one(chat.ChatCompletionLogProb, each) for each in (token, "other")],
            )
            for token in tokens
        ]
    )


def text_logprobs(completion, before: str, tokens: list[str]):
    at = [len(before + "".join(tokens[:number])) for number in range(len(tokens))]
    return completion.CompletionLogProbs(
        text_offset=at,
        token_logprobs=[-len(token) / 8 for token in tokens],
        tokens=tokens,
        top_logprobs=[{token: -1.0, "other": -2.0} for token in tokens],
    )


def flat(pieces: list[list[str]]) -> list[str]:
    return [token for piece in pieces for token in piece]


def interleaved(case: Case) -> Iterator[tuple[int, int, list[str], bool, bool]]:
    """Yield choice, number, tokens, whether they are reasoning and whether they are the last."""
    thought = THOUGHT if case.reasoning else []
    pieces = [thought + said for said in SAID[: case.n]]
    for number, step in enumerate(zip_longest(*pieces)):
        for index, tokens in enumerate(step):
            if tokens is not None:
                is_last = number == len(pieces[index]) - 1
                yield index, number, tokens, number < len(thought), is_last


def sse(*chunks: str) -> bytes:
    return b"".join(b"data: %s\n\n" % chunk.encode() for chunk in (*chunks, "[DONE]"))


def chat_stream(vllm, case: Case) -> bytes:
    """Return what vLLM's `chat_completion_stream_generator` would send."""
    chat, _, (base, usage) = vllm
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    prompt_ids = PROMPT_IDS if case.token_ids else None
    chunks = []
    for index in range(case.n):
        choice = chat.ChatCompletionResponseStreamChoice(
            index=index,
            delta=base.DeltaMessage(role="assistant", content=""),
            logprobs=None,
            finish_reason=None,
        )
        chunks.append(
            chat.ChatCompletionStreamResponse(
                **head, choices=[choice], prompt_token_ids=prompt_ids, prompt_text=None
            )
        )
    for index, _, tokens, is_reasoning, is_last in interleaved(case):
        text = "".join(tokens)
        delta = base.DeltaMessage(**({"reasoning": text} if is_reasoning else {"content": text}))
        choice = chat.ChatCompletionResponseStreamChoice(
            index=index,
            delta=delta,
            logprobs=chat_logprobs(chat, tokens) if case.logprobs else None,
            finish_reason="stop" if is_last else None,
            token_ids=ids_of(tokens) if case.token_ids else None,
            **({"stop_reason": 7} if is_last else {}),
        )
        chunks.append(chat.ChatCompletionStreamResponse(**head, choices=[choice]))
    last = chat.ChatCompletionStreamResponse(
        **head, choices=[], usage=usage, system_fingerprint="fp", metrics=None
    )
    return sse(
        *(chunk.model_dump_json(exclude_unset=True) for chunk in chunks),
        last.model_dump_json(exclude_unset=True, exclude_none=True),
    )


def chat_body(vllm, case: Case) -> bytes:
    """Return what vLLM would send for the same without `stream`."""
    chat, _, (_, usage) = vllm
    thought = THOUGHT if case.reasoning else []
    choices = [
        chat.ChatCompletionResponseChoice(
            index=index,
            message=chat.ChatMessage(
                role="assistant",
                content="".join(flat(said)),
                reasoning="".join(flat(thought)) or None,
            ),
            logprobs=chat_logprobs(chat, flat(thought + said)) if case.logprobs else None,
            finish_reason="stop",
            stop_reason=7,
            token_ids=ids_of(flat(thought + said)) if case.token_ids else None,
        )
        for index, said in enumerate(SAID[: case.n])
    ]
    made = chat.ChatCompletionResponse(
        id="x", created=1, model="m", choices=choices, usage=usage, system_fingerprint="fp",
        prompt_token_ids=PROMPT_IDS if case.token_ids else None,
    )  # fmt: skip
    return orjson.dumps(made.model_dump())


def text_stream(vllm, case: Case) -> bytes:
    """Return what vLLM's `completion_stream_generator` would send."""
    _, completion, (_, usage) = vllm
    head = {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
    before, chunks = [""] * case.n, []
    for index, number, tokens, _, is_last in interleaved(case):
        text = "".join(tokens)
        choice = completion.CompletionResponseStreamChoice(
            index=index,
            text=text,
            logprobs=text_logprobs(completion, before[index], tokens) if case.logprobs else None,
            finish_reason="length" if is_last else None,
            stop_reason=None,
            prompt_token_ids=PROMPT_IDS if case.token_ids and number == 0 else None,
            token_ids=ids_of(tokens) if case.token_ids else None,
        )
        before[index] += text
        made = completion.CompletionStreamResponse(**head, choices=[choice])
        chunks.append(made.model_dump_json(exclude_unset=True))
    last = completion.CompletionStreamResponse(
        **head, choices=[], usage=usage, system_fingerprint="fp", metrics=None
    )
    return sse(*chunks, last.model_dump_json(exclude_none=True))


def text_body(vllm, case: Case) -> bytes:
    """Return what vLLM would send for the same without `stream`."""
    _, completion, (_, usage) = vllm
    choices = []
    for index in range(case.n):
        pieces = [tokens for at, _, tokens, _, _ in interleaved(case) if at == index]
        choices.append(
            completion.CompletionResponseChoice(
                index=index,
                text="".join(flat(pieces)),
                logprobs=text_logprobs(completion, "", flat(pieces)) if case.logprobs else None,
                finish_reason="length",
                stop_reason=None,
                prompt_token_ids=PROMPT_IDS if case.token_ids else None,
                token_ids=ids_of(flat(pieces)) if case.token_ids else None,
            )
        )
    made = completion.CompletionResponse(
        id="x", created=1, model="m", choices=choices, usage=usage, system_fingerprint="fp"
    )
    return orjson.dumps(made.model_dump())


MADE = {"chat": (chat_stream, chat_body), "text": (text_stream, text_body)}


async def recorded(raw: bytes, form: Form) -> Answer:
    async def publish(_: bytes) -> None:
        pass

    answer, finished = await record(Reply(raw, form), CHOICES, form, publish, 1_000_000)
    assert finished
    return answer


def rendered(content: bytes) -> bytes:
    return convert.fill(content, b"x", 1)


def without_nulls(value: Any) -> Any:
    """Return the value without fields that say nothing; clients read them as what isn't there."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def joined_chat(content: bytes) -> Any:
    """Return what OpenAI's client makes of the events."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    ids: dict[int, list[int]] = {}
    for chunk in chunks_of(content):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
        for choice in chunk["choices"]:
            ids.setdefault(choice["index"], []).extend(choice.pop("token_ids", None) or [])
    made = state.current_completion_snapshot.to_dict(mode="json")
    for choice in made["choices"]:
        choice["token_ids"] = ids[choice["index"]]
        # Only the client's own.
        choice["message"].pop("parsed", None)
    return without_nulls(made)


def joined_text(content: bytes) -> Any:
    """Return what the choices of the events say together."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks_of(content):
        for choice in chunk["choices"]:
            of = joined.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": {}})
            of["text"] += choice["text"]
            of["token_ids"] += choice.get("token_ids") or []
            of["finish_reason"] = choice["finish_reason"]
            of.setdefault("prompt_token_ids", choice.get("prompt_token_ids"))
            for name, values in (choice["logprobs"] or {}).items():
                of["logprobs"].setdefault(name, []).extend(values)
    return joined


def chunks_of(content: bytes) -> list[dict[str, Any]]:
    parts = [part for part in content.split(b"\n\n") if part and b"[DONE]" not in part]
    return [orjson.loads(part.removeprefix(b"data: ")) for part in parts]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("route", MADE)
async def test_a_stream_becomes_vllms_body(vllm, route: str, case: Case) -> None:
    make_stream, make_body = MADE[route]
    events = await recorded(make_stream(vllm, case), Form.EVENTS)
    body = orjson.loads(rendered(convert.as_form(events, Form.BODY).content))
    assert without_nulls(body) == without_nulls(orjson.loads(make_body(vllm, case)))


# Where token ids are asked for, either form has a key of its own.
@pytest.mark.parametrize("case", [case for case in CASES if not case.token_ids], ids=str)
@pytest.mark.parametrize("route", MADE)
async def test_a_body_becomes_a_stream_that_says_the_same(vllm, route: str, case: Case) -> None:
    make_stream, make_body = MADE[route]
    joined = joined_chat if route == "chat" else joined_text
    body = await recorded(make_body(vllm, case), Form.BODY)
    made = convert.as_form(body, Form.EVENTS)
    content = convert.counted(made.content, wants_usage=True) + made.usage
    assert joined(rendered(content)) == joined(make_stream(vllm, case))
    counts = without_nulls(chunks_of(rendered(made.usage)))
    assert counts == chunks_of(make_stream(vllm, case))[-1:]
    again = await recorded(rendered(content) + b"data: [DONE]\n\n", Form.EVENTS)
    assert without_nulls(orjson.loads(rendered(convert.as_form(again, Form.BODY).content))) == (
        without_nulls(orjson.loads(make_body(vllm, case)))
    )
