"""What the master tells a worker: all that has changed, until it has taken it over."""

import asyncio
from typing import Any
from unittest.mock import Mock

from server.config.schema import ServerConfig
from server.workers import child
from server.workers.child import WorkerProcess
from server.workers.link import LinkError
from tests.waiting import HANGS_S


async def test_what_it_cannot_use_keeps_nothing_else_from_it(monkeypatch) -> None:
    monkeypatch.setattr(child, "_TELL_AGAIN_S", 0.001)
    state: dict[str, Any] = {"/config": "old", "/tenants": "old"}
    worker = WorkerProcess(0, (), Mock(), lambda: state, Mock(), Mock(), ServerConfig())
    asked: list[tuple[str, str]] = []

    async def call(_: str, path: str, body: str) -> bytes:
        asked.append((path, body))
        if path == "/config":
            raise LinkError("POST /config has status 500")
        return b""

    monkeypatch.setattr(worker, "call", call)
    worker.link, worker._told = Mock(), {**state}
    state |= {"/config": "new", "/tenants": "new"}
    async with asyncio.timeout(HANGS_S):
        while asked.count(("/config", "new")) < 3:
            worker.tell()
            await asyncio.sleep(0.001)
    assert asked.count(("/tenants", "new")) == 1
