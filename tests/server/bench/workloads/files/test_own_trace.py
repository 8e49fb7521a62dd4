"""Our own traces, replayed: a server has the same hits as the one that wrote the trace."""

import asyncio
import re
from pathlib import Path

import orjson
import pytest

from server.config.base import ConfigError
from tests.server.bench.workloads.asked import alike, bodies, made
from tests.server.conftest import Front, Upstream, running
from tests.waiting import HANGS_S


def write(tmp_path: Path, *lines: dict) -> Path:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return file


def asked(at: float, key: str, **more) -> dict:
    return {"time": at, "key": key, "size": 9, "model": "x", "tier": "t", "outcome": "o"} | more


def prompt(at: float, key: str | None, blocks: list[str], **more) -> dict:
    outcome = {"outcome": "bypass"} if key is None else {"outcome": "generated", "key": key}
    return {"time": at, "model": "x"} | outcome | {"blocks": blocks} | more


def text(workload, number: int) -> list[str]:
    return bodies(workload.session(number))[0]["messages"][0]["content"].split()


def test_digests_become_prompts(tmp_path: Path) -> None:
    tokens = {"prompt_tokens": 500, "characters": 2048}
    file = write(
        tmp_path,
        asked(10, "a", tokens=5),
        prompt(10, "a", ["01", "02"], **tokens),
        asked(12, "b"),
        prompt(12, "b", ["01", "03"], **tokens),
        prompt(11, None, ["01", "02"], tokens=3, **tokens),
        asked(13, "a", tokens=6),
        asked(14, "before the trace"),
    )
    workload = made(str(file))
    assert workload.kind == "trace"
    assert workload.count == 5
    assert workload.times(5) == [0, 1, 2, 3, 4]
    first, bypassed, other, again, unknown = (workload.session(n).steps[0] for n in range(5))
    assert first == again
    assert len({first, bypassed, other, unknown}) == 4
    limits = [orjson.loads(s.body)["max_tokens"] for s in (first, bypassed, other)]
    assert limits == [5, 3, 128]
    assert [orjson.loads(s.body)["temperature"] for s in (first, bypassed)] == [0, 1]
    # A block of 1024 characters has 250 tokens.
    texts = [text(workload, number) for number in range(5)]
    assert [len(each) for each in texts] == [508, 508, 508, 508, 64]
    assert 500 <= alike(*texts[:2]) < 503
    assert 250 <= alike(texts[0], texts[2]) < 253
    assert alike(texts[0], texts[4]) < 3
    smaller = made(f"{file},scale=0.1,prompt_tokens=30")
    assert [len(text(smaller, number)) for number in (0, 4)] == [58, 8]


def test_a_short_prompt_has_its_own_length(tmp_path: Path) -> None:
    file = write(tmp_path, asked(0, "a"), prompt(0, "a", [], characters=400))
    assert len(text(made(f"trace:{file}"), 0)) == 100


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (asked(-1, "a"), "time should be a number from 0, not -1"),
        (asked(1, ""), "key should be a text, not ''"),
        (asked(1, "a", tokens="x"), "tokens should be a whole number, not 'x'"),
        (prompt(1, "a", ["x y"]), "blocks should be a list of digests in hexadecimal"),
        (prompt(1, "", []), "key should be a text"),
        (prompt(1, "a", [], characters="x"), "characters should be a whole number"),
        (prompt(1, "a", [], prompt_tokens=-1), "prompt_tokens should be a whole number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict, problem: str) -> None:
    file = write(tmp_path, asked(0, "a"), line)
    with pytest.raises(ConfigError, match=rf"^--workload: .*:2: {re.escape(problem)}"):
        made(f"trace:{file}")


async def test_a_replay_has_the_hits_that_the_server_had(tmp_path: Path, monkeypatch) -> None:
    trace = tmp_path / "trace.jsonl"
    monkeypatch.setenv("TIERSERVE__LOG__TRACE", str(trace))
    async with Upstream() as upstream, running(tmp_path, upstream) as front:
        for number, answers in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 3), (4, 4)):
            messages = [{"role": "user", "content": f"{number} " * 800}]
            await front.ask({"model": "m", "temperature": 0, "messages": messages})
            # One that came before would join the answer, and be no hit.
            await front.until_metric('tierserve_tier_entries{tier="disk"}', answers)
        await front.ask({"model": "m", "messages": messages})
        async with asyncio.timeout(HANGS_S):
            # Eight requests, four of them generated, of which one had no line of its own.
            while not trace.exists() or trace.read_bytes().count(b"\n") < 12:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        workload = made(f"trace:{trace}")
        outcomes = [await _outcome(front, workload.session(n)) for n in range(8)]
    assert workload.count == 8
    # What was asked three times is a miss once.
    assert outcomes == ["miss", "miss", "hit", "miss", "hit", "hit", "miss", "bypass"]


async def _outcome(front: Front, session) -> str:
    (step,) = session.steps
    _, status, _ = await front.ask_alone(orjson.loads(step.body))
    return next(name for name in ("hit", "miss", "bypass") if name in status)
