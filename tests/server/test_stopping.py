"""How the server starts and stops: signals, and a user without a home."""

import asyncio
import subprocess

import pytest
from aiohttp import web

from tests.server.conftest import (
    CHAT,
    ROLE,
    Front,
    Upstream,
    alike,
    held,
    question,
    running,
    skip_unless_runs,
    stream,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMELESS = ("unshare", "--user", "--map-user=12345", "--map-group=12345")


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
async def test_a_stop_lets_running_answers_end(upstream: Upstream, tmp_path, path: str) -> None:
    go = asyncio.Event()

    asked = question(stream=True)
    upstream.handler = held(go)
    async with running(tmp_path, upstream) as front:
        async with front.session.post(path, json=asked) as response:
            await response.content.readuntil(b"\n\n")
            front.process.terminate()
            await front.until_ready(0)
            go.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0
        if path == CHAT:
            await front.session.close()
            await front.start()
            assert "tierserve; hit" in (await front.ask(asked))[1]


async def test_a_second_signal_ends_at_once(upstream: Upstream, tmp_path) -> None:
    never = asyncio.Event()

    async def endless(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE, never)

    upstream.handler = endless
    async with (
        running(tmp_path, upstream) as front,
        front.post(question(stream=True)) as response,
    ):
        await response.content.readuntil(b"\n\n")
        assert await front.end_by_signals() == 130


async def test_a_user_without_a_home_has_to_be_given_all_paths(upstream: Upstream, tmp_path):
    skip_unless_runs(*NAMELESS)
    front = Front(tmp_path, alike(upstream.url))
    # Nor is there anything else in its environment.
    front.wrapper = ("env", "-i", *NAMELESS)
    async with front:
        assert (await front.ask(question()))[0] == 200
        assert (tmp_path / "disk" / "data.mdb").exists()
    assert front.process.returncode == 0
    front.config.write_text("tracing: null")
    for action in ("check", "serve"):
        command = [action if part == "serve" else part for part in front.command]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2
        for field in ("tiers.disk.path", "admin.socket", "models.smollm2-135m-instruct.source"):
            assert f"{field}: " in ended.stderr
        assert ended.stderr.count("has no home folder") == len(ended.stderr.splitlines()) == 3
