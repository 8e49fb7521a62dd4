"""Requests: the fields that each route has."""

from collections.abc import Sequence

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.workloads.requests import (
    PATHS,
    ROUTES,
    Common,
    Message,
    assistant,
    make_step,
    system,
    user,
)

CHAT = [system("be brief"), user("why?"), assistant("so"), user("really?")]


@pytest.mark.parametrize(
    ("route", "prompt"),
    [
        (
            "chat",
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "why?"},
                    {"role": "assistant", "content": "so"},
                    {"role": "user", "content": "really?"},
                ],
                "max_tokens": 9,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (
            "completions",
            {
                "prompt": "System: be brief\n\nUser: why?\n\nAssistant: so\n\nUser: really?"
                "\n\nAssistant:",
                "max_tokens": 9,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (
            "responses",
            {
                "instructions": "be brief",
                "input": [
                    {"role": "user", "content": "why?"},
                    {"role": "assistant", "content": "so"},
                    {"role": "user", "content": "really?"},
                ],
                "store": False,
                "max_output_tokens": 9,
                "temperature": 0,
                "stream": True,
            },
        ),
        (
            "messages",
            {
                "system": "be brief",
                "messages": [
                    {"role": "user", "content": "why?"},
                    {"role": "assistant", "content": "so"},
                    {"role": "user", "content": "really?"},
                ],
                "max_tokens": 9,
                "temperature": 0,
                "stream": True,
            },
        ),
        (
            "embeddings",
            {"input": "System: be brief\n\nUser: why?\n\nAssistant: so\n\nUser: really?"},
        ),
    ],
)
def test_each_route_has_its_fields(route, prompt: dict) -> None:
    step = make_step(Common("m", route=route), CHAT, 9, think_s=3)
    assert orjson.loads(step.body) == {"model": "m"} | prompt
    assert step.path == PATHS[route]
    assert step.stream == (route != "embeddings")
    assert step.think_s == 3
    whole = make_step(Common("m", route=route, stream=False), CHAT, 9)
    without = {k: v for k, v in prompt.items() if k not in ("stream", "stream_options")}
    assert orjson.loads(whole.body) == {"model": "m"} | without
    assert not whole.stream


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
roles = st.sampled_from(["system", "user", "assistant"])
chats = st.lists(st.builds(Message, roles, texts), min_size=1, max_size=4)


@settings(max_examples=40)
@given(st.sampled_from(ROUTES), chats, st.text("ab ", min_size=1))
def test_a_nonce_changes_only_the_beginning(route, chat: Sequence[Message], nonce: str) -> None:
    first = Message(chat[0].role, f"{nonce} {chat[0].text}")
    told_apart = make_step(Common("m", route=route, nonce=nonce), chat, 1)
    assert told_apart == make_step(Common("m", route=route), [first, *chat[1:]], 1)


@pytest.mark.parametrize("route", ROUTES)
def test_options_are_fields_only_if_they_are_given(route) -> None:
    plain = orjson.loads(make_step(Common("m", route=route), CHAT, 1).body)
    assert not plain.keys() & {"cache", "ignore_eos"}
    asked = orjson.loads(make_step(Common("m", route=route, tag="t"), CHAT, 1).body)
    assert asked["cache"] == {"tags": ["t"]}
    eos = make_step(Common("m", route="chat", ignore_eos=True), CHAT, 1)
    assert orjson.loads(eos.body)["ignore_eos"] is True


def test_what_may_not_be_cached_is_sampled() -> None:
    assert orjson.loads(make_step(Common("m"), CHAT, 1, sampled=True).body)["temperature"] == 1


def test_one_text_is_a_prompt_as_it_is() -> None:
    body = orjson.loads(make_step(Common("m", route="completions"), [user("why?")], 1).body)
    assert body["prompt"] == "why?"
