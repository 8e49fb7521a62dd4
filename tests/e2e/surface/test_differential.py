"""Each request over the surface gets from tierserve what it gets from vLLM itself.

It is sent to the engine's own socket, then to tierserve twice, which is a miss and a hit. What
differs is documented: ids and times, how the text is cut into events, and the prompt tokens that
were in vLLM's cache.
"""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from tests.e2e.conftest import MODEL, Server

from .conftest import kept
from .requests import ALIKE, BAD, COUNT, GOOD, MESSAGES, RESPONSES, WITH_USAGE, Case

pytestmark = pytest.mark.engine

# Of the engine's or our own making, new for each answer.
_IDS = re.compile(rb"(chatcmpl-tool|chatcmpl|cmpl|resp|msg|rs|fc|call|functions)[-_][0-9a-f]{12,}")
_TIMES = re.compile(rb'("created(?:_at)?": ?)\d+')
_CACHED = re.compile(rb'("(?:cached_tokens|cache_write_tokens|cache_read_input_tokens)": ?)\d+')
_TEXTS = ("content", "text", "arguments", "partial_json", "delta")


class Reply(NamedTuple):
    status: int
    content_type: str
    cache_status: str
    body: bytes


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("engine")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def send(connection: http.client.HTTPConnection, case: Case) -> Reply:
    body = case.body if isinstance(case.body, bytes) else json.dumps(case.body)
    connection.request("POST", case.path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    told = {name.lower(): value for name, value in response.getheaders()}
    return Reply(
        response.status, told["content-type"], told.get("cache-status", ""), response.read()
    )


@pytest.fixture
def front(ready: Server) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", ready.port)
    yield connection
    connection.close()


@pytest.fixture
def engine(ready: Server) -> Iterator[http.client.HTTPConnection]:
    (path,) = ready.temporary.glob("tierserve-*/engine.sock")
    connection = _Unix(path)
    yield connection
    connection.close()


def lasting(body: bytes) -> bytes:
    """Return what is the same each time."""
    return _CACHED.sub(rb"\g<1>0", _TIMES.sub(rb"\g<1>0", _IDS.sub(rb"\g<1>_id", body)))


def told(body: bytes) -> Any:
    """Return what a body or a stream says, however its text is cut into events."""
    if not body.startswith((b"data:", b"event:")):
        return orjson.loads(lasting(body))
    said: dict[str, list[Any]] = {}
    events = []
    for event in lasting(body).decode().strip().split("\n\n"):
        *kind, data = event.split("\n")
        data = data.removeprefix("data: ")
        parsed = data if data == "[DONE]" else orjson.loads(data)
        events.append((kind, without_text(parsed, said, "")))
    # Choices are made side by side, and events that differ only by their text are one.
    events.sort(key=choice_of)
    return [each for each, _ in groupby(events)], {
        where: "".join(pieces) if all(isinstance(p, str) for p in pieces) else pieces
        for where, pieces in said.items()
    }


def choice_of(event: tuple[list[str], Any]) -> int:
    """Return which choice an event is about; those about none are the last."""
    choices = event[1].get("choices") if isinstance(event[1], dict) else None
    return choices[0]["index"] if choices else 1000


def without_text(value: Any, said: dict[str, list[Any]], where: str) -> Any:
    if isinstance(value, list):
        return [without_text(each, said, where) for each in value]
    if not isinstance(value, dict):
        return value
    at = f"{where}/{value.get('index', '')}"
    return {
        name: without_text(each, said, f"{at}/{name}")
        for name, each in value.items()
        if not is_noted(value, name, said, at)
    }


def is_noted(event: dict[str, Any], name: str, said: dict[str, list[Any]], at: str) -> bool:
    """Note what may be cut into events in any way, and leave it out."""
    value = event[name]
    if name == "system_fingerprint":
        # Of several choices vLLM says it with each one's last event.
        said["fingerprint"] = [value]
    elif name == "logprobs" and isinstance(value, dict):
        for part, values in value.items():
            said.setdefault(f"{at}/{part}", []).extend(values or [])
    elif name in _TEXTS and isinstance(value, str):
        said.setdefault(f"{at}/{name}", []).append(value)
    elif name in ("token_ids", "logprobs") and isinstance(value, list):
        said.setdefault(f"{at}/{name}", []).extend(value)
    else:
        # Counts that go along are those up to there.
        return name in ("sequence_number", "logprobs", "token_ids") or (
            name == "usage" and bool(event.get("choices"))
        )
    return True


def test_there_are_enough_of_them() -> None:
    assert len(GOOD) >= 150
    assert len(BAD) >= 60


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_good_requests(
    engine: http.client.HTTPConnection, front: http.client.HTTPConnection, case: Case
) -> None:
    direct, miss = send(engine, case), send(front, case)
    hit = kept(lambda: send(front, case), attrgetter("cache_status"))
    assert (direct.status, miss.status, hit.status) == (200, 200, 200), direct.body
    assert direct.content_type == miss.content_type == hit.content_type
    assert "fwd=miss" in miss.cache_status
    assert told(miss.body) == told(direct.body)
    assert lasting(hit.body) == lasting(miss.body)
    assert "detail=memory" in hit.cache_status


@pytest.mark.parametrize("case", ALIKE, ids=str)
def test_hits_in_the_other_form(
    engine: http.client.HTTPConnection, front: http.client.HTTPConnection, case: Case
) -> None:
    forms: list[dict[str, Any]] = [{}, WITH_USAGE]
    expected = [whole(send(engine, Case(case.path, case.body | form)).body) for form in forms]
    for first in (0, 1):
        salted = [Case(case.path, case.body | form | {"cache_salt": str(first)}) for form in forms]
        miss = send(front, salted[first])
        hit = kept(lambda asked=salted[1 - first]: send(front, asked), attrgetter("cache_status"))
        assert ("fwd=miss" in miss.cache_status, "hit" in hit.cache_status) == (True, True)
        assert whole(miss.body) == expected[first]
        assert whole(hit.body) == expected[1 - first]


def whole(body: bytes) -> Any:
    """Return what a reply says, with its fields and nulls, but for events of text alone."""
    said = told(body)
    if isinstance(said, dict):
        return said
    events, texts = said
    return [event for event in events if not is_text_alone(event[1])], texts


def is_text_alone(event: Any) -> bool:
    if not isinstance(event, dict) or not event["choices"]:
        return False
    (choice,) = event["choices"]
    return choice["finish_reason"] is None and "role" not in choice.get("delta", {})


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_requests(
    engine: http.client.HTTPConnection, front: http.client.HTTPConnection, case: Case
) -> None:
    direct, miss, again = send(engine, case), send(front, case), send(front, case)
    assert 400 <= direct.status < 500, direct
    assert miss.status == again.status == direct.status
    assert miss.content_type == direct.content_type
    expected = shape(orjson.loads(direct.body))
    if isinstance(case.body, bytes) and case.path in (MESSAGES, COUNT):
        # What isn't JSON is refused by us, in Anthropic's shape; vLLM does it in OpenAI's.
        expected = {"type": "str", "error": {"type": "str", "message": "str"}}
    assert shape(orjson.loads(miss.body)) == expected
    assert "hit" not in again.cache_status


def shape(error: Any) -> Any:
    if isinstance(error, dict):
        return {name: shape(each) for name, each in error.items() if each is not None}
    return type(error).__name__


def test_what_asks_for_state_goes_past_the_tiers(front: http.client.HTTPConnection) -> None:
    body = {"model": MODEL, "input": "Name a wood.", "temperature": 0, "max_output_tokens": 2}
    for more in ({"store": True}, {"request_id": "resp_mine"}):
        for _ in range(2):
            reply = send(front, Case(RESPONSES, body | more))
            assert reply.status == 200
            assert reply.cache_status == "tierserve; fwd=bypass"
    assert orjson.loads(reply.body)["id"] == "resp_mine"
    assert send(front, Case(MESSAGES, {"model": MODEL, "messages": []})).status == 400
