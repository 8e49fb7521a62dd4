"""Bytes that are nearly a request, alone and among known requests.

The server that answers known requests at once sends back what the usual one sends: so no answer is
one to another question. Each connection ends, and nothing fails.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests.server.conftest import CHAT
from tests.server.scripts import EMBEDDINGS, Draft, chat
from tests.server.sides import KEYS, Leave, Send, Side, Step, both_ways, difference, examples

pytestmark = pytest.mark.asyncio(loop_scope="module")

fuzzed = examples(400, long=5000)
_question = re.compile(rb"/v1/[a-z/]+ (question-[a-z]+) #")


def request(path: str, body: dict[str, Any], key: str = "alice") -> bytes:
    headers = [("Content-Type", "application/json"), ("Authorization", f"Bearer {KEYS[key]}")]
    return Draft(path, str(body).replace("'", '"').encode(), headers=headers).render(0)


KNOWN = [
    (request(CHAT, chat("question-a")), CHAT),
    (request(CHAT, chat("question-b"), "carol"), CHAT),
    (request(CHAT, {**chat("question-c"), "max_tokens": 7}), CHAT),
    (request(EMBEDDINGS, {"input": "question-d"}), EMBEDDINGS),
]
LINES = st.sampled_from(
    [
        b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: +5", b"Content-Length:",
        b"Content-Length: 1, 1", b"Content-Length: 99999999999999999999", b"content-length : 5",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding : chunked",
        b"Expect: 100-continue", b"Connection: close",
        b"Connection: Upgrade\r\nUpgrade: websocket", b"Upgrade: h2c",
        b"X-A: b\r\n folded", b"X-A:" + b"a" * 9000, b"X-A: b\r\n" * 130 + b"X-A: b", b": none",
        b"Authorization: Bearer " + KEYS["nobody"].encode(), b"X-A: \0", b"no header", b"",
    ]
)  # fmt: skip
BYTES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(
        [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b":", b"0\r\n\r\n", b"5\r\n"]
    ),
    st.sampled_from([data for data, _ in KNOWN]),
)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A known request with one to three mistakes."""
    data = draw(st.sampled_from(KNOWN))[0]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "drop", "twice", "insert", "cut", "line", "length"]))
        if kind == "flip" and data:
            flipped = bytes([data[at] ^ (1 << draw(st.integers(0, 7)))])
            data = data[:at] + flipped + data[at + 1 :]
        elif kind in ("drop", "twice"):
            end = at + draw(st.integers(1, 20))
            data = data[:at] + data[end:] if kind == "drop" else data[:end] + data[at:]
        elif kind == "insert":
            data = data[:at] + draw(BYTES) + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "line":
            lines = data.split(b"\r\n")
            lines.insert(draw(st.integers(1, 5)), draw(LINES))
            data = b"\r\n".join(lines)
        else:
            wrong = b"Content-Length: %d\r\n" % draw(st.integers(0, 200))
            data = re.sub(rb"Content-Length: \d+\r\n", wrong, data)
    return data


@st.composite
def scripts(draw: st.DrawFn) -> list[Step]:
    """Known requests, something wrong in one piece or several, and perhaps a known one again."""
    steps: list[Step] = []
    for data, path in draw(st.lists(st.sampled_from(KNOWN), max_size=2)):
        steps.append(Send(0, data, (("POST", path, "m"),)))
    data = draw(mutants())
    if draw(st.booleans()):
        data += draw(st.sampled_from(KNOWN))[0]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=2)))
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if start < end:
            steps.append(Send(0, data[start:end]))
    if draw(st.booleans()):
        steps.append(Send(0, draw(st.sampled_from(KNOWN))[0]))
    return [*steps, Leave(0, "half-close")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sides(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Side, Side]]:
    folder = tmp_path_factory.mktemp("raw")
    async with both_ways(folder, padding=0, disk=None) as (one, other):
        yield one, other
        for side in (one, other):
            await side.metrics()
    assert one.answered_at_once > 0
    assert other.answered_at_once == 0


@fuzzed
@given(scripts())
async def test_mutants(sides: tuple[Side, Side], script: list[Step]) -> None:
    one, other = sides
    said, expected = await asyncio.gather(one.play(script), other.play(script))
    if said != expected or one.engine.times != other.engine.times:
        pytest.fail(difference(script, said, expected))
    sent = b"".join(step.data for step in script if isinstance(step, Send))
    for answered in set(_question.findall(str(said).encode())):
        assert answered in sent
