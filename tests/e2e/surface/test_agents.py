"""What agents ask twice is found the second time, though they say what vLLM ignores otherwise.

Most of them ask for chance, so they ask a tierserve that keeps what it is asked by chance, too,
before the one that has the engine.
"""

import json
import urllib.request
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.conftest import MODEL, Server, serving
from tests.waiting import HANGS_S

from .agents import AGENTS, Call, claude_code_counts
from .conftest import kept
from .requests import CHAT, TOOL
from .test_differential import told

pytestmark = pytest.mark.engine


class Reply(NamedTuple):
    body: bytes
    cache_status: str
    headers: Any


def send(url: str, call: Call) -> Reply:
    asked = urllib.request.Request(
        url + call.path,
        json.dumps(call.body).encode(),
        {"Content-Type": "application/json", **call.headers},
    )
    with urllib.request.urlopen(asked) as response:
        headers = response.headers
        return Reply(response.read(), headers.get("Cache-Status", ""), headers)


@pytest.fixture(scope="module")
def front(ready: Server, tmp_path_factory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("front")
    model = {
        "upstreams": [ready.url],
        "vllm": {"tool_call_parser": "hermes"},
        "wait_for_engine_s": HANGS_S,
    }
    config = {
        "models": {MODEL: model},
        "cache": {"nondeterministic": "always"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    with serving(folder, folder / "config.yaml") as made:
        made.wait_ready()
        yield made


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_what_an_agent_asks_again_is_found(front: Server, agent: Callable[[int], Call]) -> None:
    first, again = agent(1), agent(2)
    assert first != again
    miss = send(front.url, first)
    assert "fwd=miss" in miss.cache_status
    hit = kept(lambda: send(front.url, again), attrgetter("cache_status"))
    assert "detail=memory" in hit.cache_status
    assert told(hit.body) == told(miss.body)


def tokens(url: str, body: dict[str, Any], headers: dict[str, str]) -> list[int]:
    """Return the prompt that the engine makes, and what it goes on with."""
    asked = body | {"return_token_ids": True, "cache": {"mode": "no-store"}}
    reply = json.loads(send(url, Call(CHAT, asked, headers)).body)
    return reply["prompt_token_ids"] + reply["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"safety_identifier": "s"}, {}),
        ({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}, {}),
        ({"service_tier": "priority"}, {}),
        ({"store": False}, {}),
        ({"store": True, "metadata": {"a": "b"}}, {}),
        ({"user": "u", "session_id": "s", "priority": 0, "request_id": "r"}, {}),
        ({}, {"anthropic-beta": "b", "anthropic-version": "v", "openai-beta": "b"}),
        ({}, {"openai-organization": "o", "openai-project": "p"}),
    ],
    ids=str,
)
def test_it_makes_the_same_prompt(ready: Server, fields: dict, headers: dict[str, str]) -> None:
    said = [{"role": "user", "content": "Name a bird."}]
    body = {"model": MODEL, "messages": said, "tools": [TOOL], "temperature": 0, "max_tokens": 3}
    assert tokens(ready.url, body | fields, headers) == tokens(ready.url, body, {})


def test_it_counts_the_same_without_what_it_ignores(ready: Server) -> None:
    def counted(call: Call) -> bytes:
        return send(ready.url, call._replace(headers={"Cache-Control": "no-store"})).body

    call = claude_code_counts(1)
    plain = json.loads(json.dumps(call.body))
    del plain["system"][0]
    for block in (*plain["system"], *plain["tools"], *(m["content"][0] for m in plain["messages"])):
        for name in ("cache_control", "is_error", "signature"):
            block.pop(name, None)
    assert counted(Call(call.path.removesuffix("?beta=true"), plain)) == counted(call)
    heard = call.body | {"system": [{"type": "text", "text": "x-other-header: 1"}]}
    assert counted(call._replace(body=heard)) != counted(call)


@pytest.mark.parametrize("mode", ["no-cache", "no-store"])
def test_a_request_is_called_as_its_body_says(ready: Server, mode: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1}
    body |= {"temperature": 0, "request_id": "mine-1", "cache": {"mode": mode}}
    for headers, expected in (({}, "mine-1"), ({"X-Request-Id": "its-2"}, "its-2")):
        reply = send(ready.url, Call(CHAT, body, headers))
        assert json.loads(reply.body)["id"] == f"chatcmpl-{expected}"
        assert reply.headers["X-Request-Id"] == expected


def test_a_load_balancer_is_told_how_the_engine_is(ready: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Ho."}], "max_tokens": 1}
    asked = Call(CHAT, body | {"temperature": 0}, {"endpoint-load-metrics-format": "JSON"})
    miss = send(ready.url, asked)
    assert miss.headers["endpoint-load-metrics"].startswith("JSON {")
    hit = kept(lambda: send(ready.url, asked), attrgetter("cache_status"))
    assert "endpoint-load-metrics" not in hit.headers


def test_what_is_listed_is_there(ready: Server) -> None:
    paths = ready.openapi()["paths"]
    assert CHAT in paths
    assert "/v1/embeddings" not in paths
    assert ready.status("/v1/embeddings") == 404
