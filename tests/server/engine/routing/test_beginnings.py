"""Digests of the beginnings of prompts: which are equal, and in which processes."""

import orjson
import pytest

from server.auth.tenant import Tenant
from server.engine.routing.beginnings import PromptBeginnings, beginnings_of, session_in
from server.protocol.model_names import ModelNames
from server.protocol.request import parse_request
from tests.server.conftest import CHAT, of_vllm

NAMES = ModelNames({name: of_vllm(name, f"of {name}") for name in ("m", "poet")})
KEY = b"of a configuration"
LONG = "You are a patient support bot. " * 10


def begun(asked: dict, headers: dict[str, str] | None = None, **of) -> PromptBeginnings:
    tenant = Tenant("acme", b"acme", salt=of.get("salt"))
    request = parse_request(of.get("path", CHAT), orjson.dumps(asked), tenant, NAMES)
    return beginnings_of(request, headers or {}, of.get("key", KEY))


def chat(*contents: str, **more) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": c} for c in contents]} | more


def test_what_begins_alike_has_equal_digests() -> None:
    one, other = begun(chat(LONG, "one")), begun(chat(LONG, "other"))
    assert one.digests[0] == other.digests[0]
    assert one.digests[1] != other.digests[1]
    assert one.ends[0] == other.ends[0] > len(LONG)
    assert begun(chat(LONG, "one", "more")).digests[:2] == one.digests


def test_short_beginnings_are_left_out() -> None:
    assert len(begun(chat("Be short.", LONG)).digests) == 1
    assert len(begun(chat("Be short.", "Hi")).digests) == 1
    assert begun({"model": "m", "messages": []}) == PromptBeginnings()


def test_long_texts_have_beginnings_within() -> None:
    ends = begun({"model": "m", "prompt": "x" * 20_000}, path="/v1/completions").ends
    assert ends == (1024, 4096, 16384, 20_000)
    # Of a very long body only the beginning is looked at.
    ends = begun({"model": "m", "prompt": "x" * 90_000}, path="/v1/completions").ends
    assert ends == (1024, 4096, 16384)


@pytest.mark.parametrize(
    "other",
    [
        begun(chat(LONG), salt="other"),
        begun(chat(LONG) | {"model": "poet"}),
        begun(chat(LONG), key=b"of another configuration"),
    ],
    ids=["tenant", "adapter", "configuration"],
)
def test_what_an_engine_keeps_apart_is_apart(other: PromptBeginnings) -> None:
    mine = begun(chat(LONG))
    assert other.ends == mine.ends
    assert not {*other.digests} & {*mine.digests}


def test_a_session_stands_for_all_beginnings() -> None:
    headers = {"X-Session-Id": "s"}
    assert begun(chat(LONG), headers) == begun(chat("x", LONG), headers) == session_in(headers, KEY)
    key = begun(chat(LONG, prompt_cache_key="k"))
    assert len(key.digests) == 1
    assert key == begun(chat("x", prompt_cache_key="k"))
    # Clients write it after the messages.
    assert key == begun(chat("x" * 50_000, prompt_cache_key="k"))
    assert key != begun(chat(LONG, prompt_cache_key="k"), salt="of another tenant")
    for odd in ("", None, 1, ["k"]):
        assert begun(chat(LONG, prompt_cache_key=odd)) == begun(chat(LONG))
    assert session_in({}, KEY) == PromptBeginnings()


def test_lone_surrogates_and_deep_nesting_break_nothing() -> None:
    assert begun({"model": "m", "messages": [{"role": "user", "content": [[[[LONG]]]]}]}).digests


def test_all_processes_and_replicas_find_the_same() -> None:
    assert begun(chat(LONG, "one")).digests == (0x95391F4F2320C067, 0x829452315B4FBBBF)
