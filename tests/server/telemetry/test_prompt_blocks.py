"""The blocks of prompts in a trace: equal where beginnings are equal, and nobody's secret."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest

from server.auth.tenant import Tenant
from server.protocol.model_names import ModelNames
from server.protocol.request import ParsedRequest, parse_request
from server.simulation.traces import read
from server.telemetry import prompt_blocks as module
from server.telemetry.prompt_blocks import BLOCK_CHARACTERS, PromptBlocks, load_key, prompt_blocks
from server.telemetry.trace_log import TraceLog
from tests.server.conftest import CHAT, Upstream, of_vllm, running
from tests.server.telemetry.test_prefixes import chat, usage

NAMES = ModelNames({"m": of_vllm("m", "of m"), "n": of_vllm("n", "of n")})
KEY = bytes(32)
LONG = "All work and no play makes a dull boy. " * 200


def asked(body: dict, tenant: Tenant | None = None, path: str = CHAT) -> ParsedRequest:
    return parse_request(path, orjson.dumps(body), tenant or Tenant("t", b"t"), NAMES)


def blocks(
    *texts: str, tenant: Tenant | None = None, key: bytes = KEY, **more: object
) -> list[str]:
    return list(prompt_blocks(asked(chat(*texts, **more), tenant), key).digests)


def test_blocks_are_equal_as_far_as_prompts_are() -> None:
    first, second = blocks(LONG, "One?" * 500), blocks(LONG, "Two?" * 500)
    common = len(f"user: {LONG}\nuser: ") // BLOCK_CHARACTERS
    assert first[:common] == second[:common]
    assert not set(first[common:]) & set(second[common:])
    # A block is of all that comes before it, so the same text elsewhere is another block.
    assert not set(blocks("x", LONG)) & set(first)
    assert len({*first, *second}) == len(first) + len(second) - common


def test_only_full_blocks_count() -> None:
    whole = prompt_blocks(asked(chat("x" * (2 * BLOCK_CHARACTERS - len("user: \n")))), KEY)
    assert (len(whole.digests), whole.characters) == (2, 2 * BLOCK_CHARACTERS)
    assert len(blocks("x" * (2 * BLOCK_CHARACTERS - len("user: \n") - 1))) == 1
    assert blocks("short") == []


def test_what_the_engine_keeps_apart_has_other_blocks() -> None:
    salts = [Tenant("a", b"a", salt="of a"), Tenant("b", b"b", salt="of b"), None]
    apart = [blocks(LONG, tenant=tenant) for tenant in salts]
    apart += [blocks(LONG, model="n"), blocks(LONG, cache_salt="mine"), blocks(LONG, key=b"k" * 32)]
    assert len({block for each in apart for block in each}) == sum(map(len, apart))
    # Tenants of one scope have one salt, and share.
    assert blocks(LONG, tenant=Tenant("c", b"c", salt="of a")) == apart[0]


def test_the_work_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "_MAX_BLOCKS", 3)
    assert len(blocks(LONG)) == 3
    monkeypatch.setattr(module, "_PARSED_BYTES", 4000)
    found = prompt_blocks(asked(chat(LONG), Tenant("a", b"a", salt="of a")), KEY)
    assert (len(found.digests), found.characters) == (3, None)
    # The salt stands at the end of the body.
    assert not set(found.digests) & set(blocks(LONG))
    nested = ParsedRequest(**asked(chat("x"))._asdict() | {"raw": b'{"a":' * 2000})
    assert prompt_blocks(nested, KEY) == PromptBlocks((), None)


def test_a_key_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "t.key"
    key = load_key(file)
    assert (len(key), load_key(file)) == (32, key)
    assert file.stat().st_mode & 0o077 == 0
    # As after a full disk.
    os.truncate(file, 5)
    assert load_key(file) not in (key, key[:5])
    assert len(file.read_bytes()) == 32


def test_all_that_begin_at_once_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        for number in range(50):
            file = tmp_path / f"{number}.key"
            assert set(threads.map(load_key, [file] * 4)) == {file.read_bytes()}


def test_blocks_outlive_a_restart_and_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    for number in range(2):
        trace = TraceLog(file, 10_000)
        trace.add_prompt(1e9, asked(chat(LONG)), usage(1800), bypassed=False)
        trace.add_prompt(1e9, asked(chat(LONG, str(number))), b"", bypassed=True)
        trace.close()
        file.rename(tmp_path / f"{number}.jsonl")
    first, second = (
        [orjson.loads(line) for line in (tmp_path / f"{number}.jsonl").read_bytes().splitlines()]
        for number in range(2)
    )
    assert first[0] == second[0]
    assert first[1]["blocks"] == first[0]["blocks"] == second[1]["blocks"]
    generated, bypass = first
    assert generated == {
        "time": 1e9, "model": "m", "outcome": "generated", "key": asked(chat(LONG)).key,
        "tokens": 1, "prompt_tokens": 1800, "characters": len(LONG) + 7,
        "blocks": blocks(LONG, key=(tmp_path / "t.key").read_bytes()),
    }  # fmt: skip
    assert "key" not in bypass
    assert bypass["outcome"] == "bypass"


def test_what_is_no_single_prompt_has_no_line(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    trace = TraceLog(file, 10_000)
    several = {"model": "m", "prompt": ["a", "b"]}
    trace.add_prompt(1e9, asked(several, path="/v1/completions"), b"", bypassed=False)
    texts = {"model": "m", "input": "a"}
    trace.add_prompt(1e9, asked(texts, path="/v1/embeddings"), b"", bypassed=False)
    trace.close()
    assert file.read_bytes() == b""
    assert trace.missing == 0
    assert not (tmp_path / "t.key").exists()


def test_pending_bodies_are_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("server.telemetry.trace_log._MAX_PENDING_BYTES", len(LONG))
    trace = TraceLog(tmp_path / "t.jsonl", 100_000)
    trace.add_prompt(1e9, asked(chat(LONG)), b"", bypassed=True)
    trace.add_prompt(1e9, asked(chat("short")), b"", bypassed=True)
    trace.close()
    assert trace.missing == 1


def test_without_room_for_a_key_blocks_hold_until_the_end(tmp_path: Path, caplog) -> None:
    (tmp_path / "t.key").mkdir()
    with caplog.at_level(logging.ERROR):
        trace = TraceLog(tmp_path / "t.jsonl", 100_000)
        for _ in range(2):
            trace.add_prompt(1e9, asked(chat(LONG)), b"", bypassed=True)
        trace.close()
    assert "the key of the trace's blocks can't be kept" in caplog.text
    one, other = read(tmp_path / "t.jsonl").bypassed
    assert one[1].blocks == other[1].blocks != ()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_served_trace_has_the_prompts_that_the_engine_answered(
    upstream: Upstream, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TIERSERVE__LOG__TRACE", "trace.jsonl")
    ask = {"messages": [{"role": "user", "content": LONG}]}
    async with running(tmp_path, upstream) as front:
        for more in ({"temperature": 0}, {"temperature": 0}, {}, {"cache": {"mode": "no-store"}}):
            status, _, _ = await front.ask(ask | more)
            assert status == 200
    trace = read(tmp_path / "trace.jsonl")
    assert "dull boy" not in (tmp_path / "trace.jsonl").read_text()
    assert len(trace.requests) == 2
    ((key, prompt),) = trace.prompts.items()
    assert key == trace.requests[0].key
    # It is sampled; of the last one the client wants nothing to be kept.
    ((_, sampled),) = trace.bypassed
    assert sampled.blocks == prompt.blocks
    assert len(prompt.blocks) == (len(LONG) + 7) // BLOCK_CHARACTERS
