"""What the service manager is told: that the server listens, lives and stops."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.process import ServiceManager
from tests.server.conftest import Upstream, question, running
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def told(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        yield receiver


async def next_state(told: socket.socket) -> bytes:
    async with asyncio.timeout(HANGS_S):
        return await asyncio.get_running_loop().sock_recv(told, 100)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_server_says_that_it_listens_and_stops(
    upstream: Upstream, told, tmp_path: Path, monkeypatch, workers: int
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", told.getsockname())
    sections = {"server": {"workers": workers}}
    async with running(tmp_path, upstream, sections=sections) as front:
        assert await next_state(told) == b"READY=1"
        assert (await front.ask(question()))[0] == 200
        front.process.terminate()
        assert await next_state(told) == b"STOPPING=1"
    assert front.process.returncode == 0
    with pytest.raises(BlockingIOError):
        told.recv(100)


async def test_the_watchdog_is_told_until_the_task_ends(told) -> None:
    environment = {"NOTIFY_SOCKET": told.getsockname(), "WATCHDOG_USEC": "2000", "HOME": "/"}
    manager = ServiceManager(environment)
    assert environment == {"HOME": "/"}
    task = asyncio.create_task(manager.keep_alive())
    assert [await next_state(told) for _ in range(3)] == 3 * [b"WATCHDOG=1"]
    task.cancel()


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": str(os.getppid())}],
)
async def test_a_watchdog_of_nobody_is_not_told(told, variables: dict[str, str]) -> None:
    await ServiceManager({"NOTIFY_SOCKET": told.getsockname(), **variables}).keep_alive()
    with pytest.raises(BlockingIOError):
        told.recv(100)


async def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # The system gives it an abstract address.
        address = receiver.getsockname()
        ServiceManager({"NOTIFY_SOCKET": "@" + address[1:].decode()}).notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


async def test_a_service_manager_that_is_gone_fails_nothing(tmp_path, caplog) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).notify("READY=1")
    assert "READY=1" in caplog.text
    ServiceManager({}).notify("READY=1")
