"""Sockets that the service manager has opened: a server listens at them, and the next one, too."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from server.config.base import ConfigError
from server.web.inherited_sockets import take_inherited_sockets
from tests.server.conftest import Front, Upstream, alike, question
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What systemd does between fork and exec, for sockets whose numbers are given.
ACTIVATE = """
import os, sys
names, *files = sys.argv[1].split(",")
for number, file in enumerate(files, 3):
    os.dup2(int(file), number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(files))}
os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.argv[2], sys.argv[2:])
"""
ADMIN_KEY = "admin-key-of-16-or-more"


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as made:
        yield made


@asynccontextmanager
async def activated(folder: Path, upstream: Upstream, workers: int, **sockets: socket.socket):
    """A server that inherits sockets by their names."""
    # An address that no machine has, as the server isn't to use its own.
    options = {"workers": workers, "host": "192.0.2.1"}
    front = Front(folder, alike(upstream.url), sections={"server": options})
    # Above the numbers that the server is to find them under.
    front.inherited = tuple(os.dup(each.fileno()) for each in sockets.values())
    given = ",".join([":".join(sockets), *map(str, front.inherited)])
    front.wrapper = (sys.executable, "-c", ACTIVATE, given)
    front.url = f"http://127.0.0.1:{next(iter(sockets.values())).getsockname()[1]}"
    try:
        async with front:
            yield front
    finally:
        for each in front.inherited:
            os.close(each)


async def begin(listening: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and send a request."""
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize("workers", [1, 2])
async def test_who_comes_between_two_servers_is_answered(
    upstream: Upstream, listening: socket.socket, tmp_path: Path, workers: int
) -> None:
    async with activated(tmp_path, upstream, workers, front=listening) as front:
        assert (await front.ask(question()))[0] == 200
        processes = psutil.Process(front.process.pid).children() if workers > 1 else []
        assert not any("LISTEN" in name for each in processes for name in each.environ())
    assert front.process.returncode == 0
    waiting = [await begin(listening) for _ in range(20)]
    async with activated(tmp_path, upstream, workers, front=listening) as front:
        for reader, writer in waiting:
            async with asyncio.timeout(HANGS_S):
                answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            writer.close()
        assert (await front.ask(question()))[0] == 200


async def test_the_admin_api_has_a_socket_of_its_own(
    upstream: Upstream, listening: socket.socket, tmp_path: Path, monkeypatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as of_admin:
        given = {"front": listening, "admin": of_admin}
        monkeypatch.setenv("TIERSERVE__ADMIN__KEY", ADMIN_KEY)
        async with activated(tmp_path, upstream, 1, **given) as front:
            assert (await front.ask(question()))[0] == 200
            url = f"http://127.0.0.1:{of_admin.getsockname()[1]}/stats"
            for key, status in ((ADMIN_KEY, 200), ("other", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                async with aiohttp.request("GET", url, headers=headers) as reply:
                    assert reply.status == status
        monkeypatch.delenv("TIERSERVE__ADMIN__KEY")
        files = [each.fileno() for each in given.values()]
        wrapper = (sys.executable, "-c", ACTIVATE, ",".join(["front:admin", *map(str, files)]))
        command = [*wrapper, *front.command[len(front.wrapper) :]]
        ended = subprocess.run(command, pass_fds=files, capture_output=True, text=True)
        assert ended.returncode == 2
        assert "admin.key: should be set, as the socket named admin is inherited" in ended.stderr


def taken(file: int, **more: str):
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "HOME": "/"} | more
    try:
        return take_inherited_sockets(environment, file)
    finally:
        assert environment == {"HOME": "/"}


async def test_no_child_inherits_them(listening: socket.socket) -> None:
    os.set_inheritable(file := os.dup(listening.fileno()), True)
    (found,) = taken(file, LISTEN_FDNAMES="tierserve.socket").front
    with found:
        assert (found.getsockname(), found.getblocking()) == (listening.getsockname(), False)
        assert not found.get_inheritable()
    assert taken(file, LISTEN_PID=str(os.getppid())) == ((), ())
    assert take_inherited_sockets({}) == ((), ())


@pytest.fixture
async def odd(tmp_path: Path) -> AsyncIterator[dict[str, int]]:
    """Files that no server can listen at."""
    with (
        (tmp_path / "file").open("w") as file,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket() as unbound,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        files = {"file": file, "datagrams": datagrams, "unbound": unbound, "unix": unix}
        yield {name: each.fileno() for name, each in files.items()} | {"closed": 999_999}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "should be a socket: Socket operation on non-socket"),
        ("closed", "should be a socket: Bad file descriptor"),
        ("datagrams", "should be a TCP socket that listens"),
        ("unbound", "should be a TCP socket that listens"),
        ("unix", "should be a TCP socket that listens"),
    ],
)
async def test_what_is_no_listening_socket_is_named(odd: dict, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"LISTEN_FDS: file {odd[name]} {message}"):
        taken(odd[name])


async def test_numbers_that_do_not_fit_are_named(listening: socket.socket) -> None:
    for number in ("", "-1", "two"):
        with pytest.raises(ConfigError, match=f"LISTEN_FDS: .* number of sockets, not '{number}'"):
            taken(listening.fileno(), LISTEN_FDS=number)
    with pytest.raises(ConfigError, match="LISTEN_FDNAMES: should be 1 names, not 'a:b'"):
        taken(listening.fileno(), LISTEN_FDNAMES="a:b")
