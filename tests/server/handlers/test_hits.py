"""Hits by bytes that are known, beside processes that this one shares limits with."""

from types import SimpleNamespace
from typing import Any

import orjson
from aiohttp import HttpVersion11
from multidict import CIMultiDict

from server.auth.limits import Limits, LocalUsage, RateLimited, RateLimiter
from server.auth.tenant import Tenant
from server.handlers.hits import Hits
from server.protocol.model_names import ModelNames
from server.protocol.request import parse_request
from tests.server.conftest import CHAT, body, of_vllm, question
from tiers import Answer, Chain, FrequencySketch, Freshness, MemoryCache, SingleFlight, Tier
from tiers.answer_cache import AnswerCache
from tiers.singleflight.lock import GenerationLock


class TakenMeanwhile(LocalUsage):
    """What another process has taken just after this one has looked."""

    def begin(self, limits: Limits, now: float) -> RateLimited | None:
        return RateLimited("too many", 1, "requests_per_minute")


async def test_what_another_process_has_taken_meanwhile_ends_only_what_it_began() -> None:
    usage = TakenMeanwhile()
    limits = Limits(requests_per_minute=9, max_requests=9)
    limiter = RateLimiter(limits, new_usage=lambda _: usage)
    tenant = Tenant("acme", b"acme", limiter=limiter)
    chain = Chain(
        [Tier("memory", MemoryCache(100_000))],
        frequency=FrequencySketch(16),
        max_answer_bytes=10_000,
    )
    names = ModelNames({"m": of_vllm("m")})
    known: list[Any] = []
    ended: list[Any] = []
    hits = Hits(
        AnswerCache(chain, SingleFlight(max_bytes=10_000), GenerationLock(chain, [], wait_s=0)),
        lambda: names,
        SimpleNamespace(is_current=lambda _: True),  # type: ignore[arg-type]
        iter(["id"] * 9),
        SimpleNamespace(add=lambda *noted: ended.append(noted)),  # type: ignore[arg-type]
        remembers=True,
    )
    http: Any = SimpleNamespace(
        headers=CIMultiDict({"Content-Type": "application/json"}),
        raw_path=CHAT,
        tenant=tenant,
        id="id",
        cors_headers={},
        more_headers={},
        keep_alive=True,
        version=HttpVersion11,
        writer=None,
        remember=lambda _, request: known.append(request),
    )
    asked = orjson.dumps(question())
    parsed = parse_request(CHAT, asked, tenant, names)
    await chain.store(parsed.key, Answer(parsed.encoding, orjson.dumps(body())), Freshness(60))
    hits.learn(http, asked, names, parsed)
    assert hits.answer(http, asked) is not None
    whole = known[0]()
    assert whole is not None
    assert whole.startswith(b"HTTP/1.1 200 ")
    assert len(ended) == 1
    assert (limiter.active, usage.active) == (0, 0)
