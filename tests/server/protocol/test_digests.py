"""Keys of a few requests as files of this version hold them: no change may lose these answers."""

import json
from typing import Any

import orjson
import pytest

from server.auth.tenant import Tenant, open_tenant
from server.protocol.model_names import ModelNames
from server.protocol.request import parse_request
from tests.server.conftest import of_vllm

CHAT = "/v1/chat/completions"
NAMES = ModelNames(
    {
        "m": of_vllm("m", "i"),
        "alias": of_vllm("m", "i"),
        "poet": of_vllm("poet", "j", encodings_agree=False),
        "other": of_vllm("other", "k", is_vllm=False, encodings_agree=False),
    }
)
TENANTS = {
    "anonymous": open_tenant(""),
    "keyed": open_tenant("Bearer a"),
    "acme": Tenant("acme", b"\0tenant\0acme", share_scope="acme", salt="s" * 32),
}
HEADERS = (("anthropic-beta", "b"),)
HI = [{"role": "user", "content": "hi"}]
MARKED = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
BILLING = {"type": "text", "text": "x-anthropic-billing-header: 1"}
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "digest"),
    [
        (
            CHAT,
            {"model": "m", "messages": HI, "temperature": 0},
            "5af5c3a45ec12b083c9193c637e9f9e304a660f59599bf60462a6a8c493a8efb",
        ),
        (
            CHAT,
            {
                "messages": HI,
                "stream": True,
                "tools": [FUNCTION],
                "logit_bias": {"6": 2.0, "5": 1},
                "stream_options": {"include_usage": True, "x": 1},
                "max_tokens": 10**25,
            },
            "ec2b67b0d18d87708853045984230537e5f3a051ca0cc6143207e23a5af4bd95",
        ),
        (
            CHAT,
            {"model": "poet", "messages": HI, "stream": False},
            "0594f5d7fcbe3055497f3c993343ac3958d530d1bdb047b466c59de59ed3dbee",
        ),
        (
            CHAT,
            {"model": "other", "messages": HI, "stream": True, "user": "u"},
            "bbc01a8518cc69d2fe216740b4f33d21fdcc534b32d0c2ef7e8c2f513b5a6706",
        ),
        (
            "/v1/completions",
            {"model": "m", "prompt": "é", "max_tokens": 16, "priority": 1, "seed": 7},
            "63185c5c10c603c9de3dd602544ccc058ea659f0084f8cb8b31c214e96b54b49",
        ),
        (
            "/v1/responses",
            {"model": "m", "input": "hi", "store": False, "top_logprobs": 0},
            "72537e82a7df357f26b7bf99d1bc8ae75dd2a894ae28b7bc74eca7a3b2a002b8",
        ),
        (
            "/v1/messages",
            {
                "model": "m",
                "max_tokens": 9,
                "system": [BILLING],
                "messages": [{"role": "user", "content": [MARKED]}],
            },
            "7b4a587416a17779e900b188dbdb7b8a9e7a6de98589410b106f480f045273f3",
        ),
        (
            "/v1/messages/count_tokens",
            {"model": "m", "messages": HI, "tools": None},
            "66ba8e2e797c5e4be3dd7de8758aaa484ca348e3ca3feb68310d2352774e5728",
        ),
        (
            "/v1/embeddings",
            {"model": "m", "input": ["a", "b"], "encoding_format": "float", "dimensions": None},
            "0bdec20dbddbb91cae71683321dabebb6274598f1960bfdc1f91595b6a06fd5d",
        ),
        (
            "/v2/embed",
            {"model": "m", "texts": ["a"], "truncate": "END"},
            "de39dd74c92b53e4af444f5d1edb3f5c4857c6080ada2f83b8e90fc8cd38c069",
        ),
        (
            "/v1/score",
            {"model": "m", "text_1": "a", "text_2": "b"},
            "84e47d2847d3ecf8b9b39c8e34a003976b602f1848cdd8011760e18e2433593e",
        ),
        (
            "/score",
            {"model": "m", "text_1": "a", "text_2": "b"},
            "84e47d2847d3ecf8b9b39c8e34a003976b602f1848cdd8011760e18e2433593e",
        ),
        (
            "/v2/rerank",
            {"model": "m", "query": "a", "documents": ["b"], "top_n": 0.0},
            "0cf23da4a649079f79e7153abc9b4cbf5195e196c43cf98df94af6dc1d3ec0c3",
        ),
        (
            "/pooling",
            {"model": "m", "input": "a", "task": None, "thinking_token_budget": 1.0},
            "5a228d28eb121aa73834c979ceb2d964b1e9b2c84f8ca821a9147ea9bd44242f",
        ),
        (
            "/classify",
            {"model": "m", "input": "a"},
            "a10a6f5063422f5e6af0e369c094a2603226b691bb035e6536a12d5307c61a6a",
        ),
        (
            "/tokenize",
            {"model": "m", "prompt": "a", "return_token_strs": None},
            "56ad0baee42a52aadcbd92301c4736f39303e66c4ff7e656eff77ad00629d0ec",
        ),
        (
            "/detokenize",
            {"model": "m", "tokens": [1, 2]},
            "3b380d3bab6c115ffd844425922b8b68b0352f8e2aa6c85f9c7c41eff1ab16ac",
        ),
    ],
)
def test_keys_of_routes(path: str, body: dict[str, Any], digest: str) -> None:
    made = parse_request(path, json.dumps(body).encode(), TENANTS["anonymous"], NAMES, HEADERS)
    assert made.key == digest


@pytest.mark.parametrize(
    ("tenant", "key"),
    [
        ("anonymous", "5af5c3a45ec12b083c9193c637e9f9e304a660f59599bf60462a6a8c493a8efb"),
        ("keyed", "937f9319e913b891c27107c6c9b3adfc2a40dad958febdd73229ee0026e9484b"),
        ("acme", "acme.2f93a8054f4fc072a2f3b1da3c192a91ab3a94bc391f963941438e87fc78438c"),
    ],
)
def test_keys_of_tenants(tenant: str, key: str) -> None:
    plain = {"model": "m", "messages": HI, "temperature": 0}
    stream = {"model": "alias", "user": "u", "stream": True, "cache": {"tags": ["a"]}}
    for body in (plain, plain | stream):
        made = parse_request(CHAT, orjson.dumps(body), TENANTS[tenant], NAMES, HEADERS)
        assert made.key == key
