"""The server as the system has it: streams, signals, as process 1, and the addresses it has."""

import asyncio
import os
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from server.config.schema import ServerConfig
from server.process import stop_handler
from server.web.listener import addresses, listen, make_server
from tests.server.conftest import Front, Upstream, alike, question, running, skip_unless_runs
from tests.waiting import HANGS_S
from tiers.disk.file import DATA

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOSING = {0: "<&-", 1: ">&-", 2: "2>&-"}


def without(*streams: int) -> tuple[str, ...]:
    """Return what runs a command with these standard streams closed."""
    return ("sh", "-c", f'exec "$@" {" ".join(CLOSING[each] for each in streams)}', "sh")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
async def test_serves_and_ends_without_standard_streams(
    upstream: Upstream, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    front = Front(tmp_path, alike(upstream.url))
    front.wrapper = without(*closed)
    async with front:
        assert (await front.ask(question()))[0] == 200
        files = Path(f"/proc/{front.process.pid}/fd")
        assert {str((files / str(each)).readlink()) for each in closed} == {os.devnull}
    assert front.process.returncode == 0
    assert (front.log.stat().st_size > 0) == (2 not in closed)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("command", ["check", "cache stats", "simulate", "version", "keys new a"])
async def test_commands_do_without_standard_streams(
    tmp_path: Path, command: str, closed: tuple[int, ...]
) -> None:
    front = Front(tmp_path, alike("http://127.0.0.1:1"))
    trace = tmp_path / "t.csv"
    trace.write_text("time,key,size\n1,a,10\n2,a,10\n")
    python, *_, config, file = front.command
    options = {"version": [], "keys new a": []}.get(command, [config, file])
    options += [str(trace)] * (command == "simulate")
    ended = await asyncio.create_subprocess_exec(
        *without(*closed), python, "-m", "server.cli", *command.split(), *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await ended.communicate()
    assert b"Traceback" not in errors
    # There is no file of a disk tier yet.
    assert ended.returncode == (1 if command == "cache stats" else 0)
    assert bool(output) == (1 not in closed and command != "cache stats")


async def test_signals_that_ask_for_nothing_end_nothing(front: Front) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        front.process.send_signal(number)
    assert (await front.ask(question()))[0] == 200


@pytest.mark.parametrize("command", ["cache verify", "simulate"])
async def test_an_interrupt_says_nothing_of_python(tmp_path: Path, command: str) -> None:
    front = Front(tmp_path, alike("http://127.0.0.1:1"))
    (tmp_path / "disk").mkdir()
    read = tmp_path / "disk" / (DATA if command == "cache verify" else "t.csv")
    os.mkfifo(read)
    python, *_, config, path = front.command
    arguments = [config, path, *[str(read)] * (command == "simulate")]
    process = subprocess.Popen(
        [python, "-m", "server.cli", *command.split(), *arguments],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with ExitStack() as stack:
        if command == "simulate":
            # Returns once it is being read.
            stack.enter_context(read.open("wb"))
        else:
            # The child that verifies has a thread once it begins.
            while all(each.num_threads() < 2 for each in psutil.Process(process.pid).children()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # As a terminal does, its children included.
        os.killpg(process.pid, signal.SIGINT)
        # Just before it waits for the trace, it notices the signal only when that ends. A second
        # one could come while Python ends.
    _, errors = process.communicate(timeout=HANGS_S)
    assert b"Traceback" not in errors
    assert process.returncode in (1, 130)


async def test_one_stop_may_be_asked_for_twice(monkeypatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now, asked = 0.0, []
    on_signal = stop_handler(asked.append, lambda: now)
    on_signal(7)
    on_signal(0)
    now = 0.5
    on_signal(0)
    assert (ended, asked) == ([], [7])
    now = 0.6
    on_signal(0)
    assert (ended, asked) == ([130], [7])


async def test_logs_go_on_in_a_new_file_when_theirs_is_moved(
    upstream: Upstream, tmp_path: Path
) -> None:
    async with running(tmp_path, upstream) as front:
        moved = front.log.rename(tmp_path / "log.1")
        async with asyncio.timeout(HANGS_S):
            while not front.log.exists() or "/v1/chat" not in front.log.read_text():
                await front.ask(question())
        before = moved.read_text()
    assert "stopping" in front.log.read_text()
    assert moved.read_text() == before


@pytest_asyncio.fixture(loop_scope="module")
async def first(upstream: Upstream, tmp_path: Path):
    """A server that was started as process 1; its `init` is that."""
    front = Front(tmp_path, alike(upstream.url))
    front.wrapper = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    skip_unless_runs(*front.wrapper)
    try:
        await front.start()
        (front.init,) = psutil.Process(front.process.pid).children()
        yield front
    finally:
        await front.session.close()
        # Ends the namespace, too.
        with suppress(ProcessLookupError):
            front.process.kill()
        await front.process.wait()


async def test_orphans_of_process_1_are_waited_for(first: Front) -> None:
    made = await asyncio.create_subprocess_exec(
        "nsenter", "-t", str(first.init.pid), "-p", "sh", "-c", "sleep 600 > /dev/null & echo on",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await made.communicate()
    async with asyncio.timeout(HANGS_S):
        # Until then it is a copy of the shell.
        while not (found := [each for each in first.init.children() if each.name() == "sleep"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (orphan,) = found
    orphan.kill()
    async with asyncio.timeout(HANGS_S):
        while psutil.pid_exists(orphan.pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await first.ask(question()))[0] == 200


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 137)]
)
async def test_process_1_passes_signals_on_and_ends_as_the_server(
    first: Front, number: int, status: int
) -> None:
    # A signal that asks for nothing is passed on, too.
    first.init.send_signal(signal.SIGUSR1)
    assert (await first.ask(question()))[0] == 200
    (server,) = first.init.children()
    (server if number == signal.SIGKILL else first.init).send_signal(number)
    assert await asyncio.wait_for(first.process.wait(), HANGS_S) == status


async def test_any_address_of_ipv6_is_any_of_ipv4_too(upstream: Upstream, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    hosts = {name: {"host": "::"} for name in ("server", "admin")}
    async with running(tmp_path, upstream, sections=hosts) as front:
        for host in ("127.0.0.1", "[::1]"):
            async with front.session.get(f"http://{host}:{front.port}/health") as response:
                assert response.status == 200
        await front.until_logged(f"listening on http://[::]:{front.port}")


async def test_all_addresses_are_said() -> None:
    server = make_server(lambda _: None, ServerConfig())
    listener = await listen(server, "localhost", 0, ServerConfig(), None)
    urls = addresses(listener, None).split(", ")
    assert len(urls) == len(listener.sockets)
    assert all(each.startswith(("http://127.0.0.1:", "http://[::1]:")) for each in urls)
    listener.close()
