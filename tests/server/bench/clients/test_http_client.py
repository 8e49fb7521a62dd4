"""Requests to real servers on this machine, broken ones too: each has one end, and never hangs."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, closing, suppress

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.bench.clients.client import Client, Part
from server.bench.clients.http_client import HttpClient
from server.bench.clients.http_connection import Exchange
from server.bench.clients.schedule import due_times
from server.bench.load import Load, Target
from server.bench.records import Failure, Records
from server.config.base import ConfigError
from tests.servers import free_port
from tests.waiting import HANGS_S, until_accepted

from .test_answers import CHAT_STREAM, DONE, chunk
from .virtual_time import ANSWER, reply
from .workloads_of_tests import CHAT, Numbered

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Asked(Exchange):
    """A request of which a test awaits the end."""

    def __init__(self, body: bytes = b"{}") -> None:
        super().__init__(CHAT, body)
        self.status, self.headers, self.body_of_answer = 0, [], b""
        self.end = asyncio.get_running_loop().create_future()

    def on_head(self, status, headers) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data, now) -> None:
        self.body_of_answer += data

    def on_end(self, failure, now) -> None:
        self.end.set_result(failure)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine in a loop of its own."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


@asynccontextmanager
async def serving(handler: Handler, **ssl_context: ssl.SSLContext) -> AsyncIterator[str]:
    """Run a server whose connections are handled by `handler(reader, writer)`; yields its URL.

    No connection is open at the end: the collector would complain of it in another test.
    """
    handling: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling[writer] = asyncio.create_task(handle(reader, writer))

    server = await asyncio.start_server(begin, "127.0.0.1", 0, **ssl_context)
    scheme = "https" if ssl_context else "http"
    try:
        yield f"{scheme}://localhost:{server.sockets[0].getsockname()[1]}/base/"
    finally:
        await until_accepted()
        server.close()
        # uvloop tells of one that it has just accepted in its next round.
        await asyncio.sleep(0)
        for writer, task in handling.items():
            task.cancel()
            writer.transport.abort()
        ends = (writer.wait_closed() for writer in handling)
        await asyncio.gather(*handling.values(), *ends, return_exceptions=True)


def answering(*pieces: bytes, closes: bool = True):
    """A server that writes these for each request, piece by piece; then it closes, or waits."""

    async def handle(reader, writer) -> None:
        while True:
            await read_request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if closes:
                return

    return handle


async def ask(url: str, times: int = 1, timeout_s: float = HANGS_S) -> list[Asked]:
    """Ask one request after another."""
    asked = [Asked() for _ in range(times)]
    with closing(HttpClient(Target(url), 2, timeout_s)) as http:
        for request in asked:
            http.start(request)
            await request.end
    return asked


@pytest.mark.parametrize(
    "pieces",
    [
        (OK + b"Content-Length: 5\r\n\r\nhello",),
        tuple(bytes([byte]) for byte in OK + b"Content-Length: 5\r\n\r\nhello"),
        (CHUNKED + b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: x\r\n\r\n",),
        (CHUNKED, b"3\r\nhe", b"l\r\n2\r", b"\nlo\r\n0\r\n\r", b"\n"),
        (OK + b"\r\nhel", b"lo"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello",),
        (OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n", OK, b"\r\nhello"),
    ],
)
def test_bodies_of_each_kind(run, pieces) -> None:
    async def check() -> None:
        async with serving(answering(*pieces)) as url:
            for asked in await ask(url, 3):
                assert (asked.end.result(), asked.status) == (Failure.NONE, 200)
                assert asked.body_of_answer == b"hello"
                assert asked.sent <= asked.first_byte

    run(check())


@pytest.mark.parametrize(
    ("pieces", "closes", "failure"),
    [
        ((), True, Failure.DISCONNECTED),
        ((OK,), True, Failure.DISCONNECTED),
        ((OK + b"Content-Length: 50\r\n\r\nhello",), True, Failure.DISCONNECTED),
        ((OK + b"Content-Length: 50\r\n\r\nhello",), False, Failure.TIMEOUT),
        ((CHUNKED + b"5\r\nhello\r\n",), True, Failure.DISCONNECTED),
        ((CHUNKED + b"zz\r\nhello\r\n",), False, Failure.PROTOCOL),
        ((OK + b"Content-Length: many\r\n\r\n",), False, Failure.PROTOCOL),
        ((OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",), False, Failure.PROTOCOL),
        ((b"garbage",), False, Failure.PROTOCOL),
        ((b"SSH-2.0-OpenSSH_9.2\r\n",), False, Failure.PROTOCOL),
        ((b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",), False,
         Failure.PROTOCOL),
        ((OK + b"X: " + b"x" * 300_000,), False, Failure.PROTOCOL),
        ((), False, Failure.TIMEOUT),
        ((OK,), False, Failure.TIMEOUT),
        ((CHUNKED + b"5\r\nhello\r\n",), False, Failure.TIMEOUT),
    ],
)  # fmt: skip
def test_broken_servers(run, pieces, closes, failure) -> None:
    async def check() -> None:
        async with serving(answering(*pieces, closes=closes)) as url:
            for timeout_s in (0.2, 2, 20, HANGS_S) if failure is Failure.TIMEOUT else (HANGS_S,):
                (asked,) = await ask(url, timeout_s=timeout_s)
                # On a busy machine it may take as long to connect.
                if asked.end.result() is not Failure.CONNECT:
                    break
            assert asked.end.result() is failure

    run(check())


def test_a_reset(run) -> None:
    async def reset(reader, writer) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"5\r\nhello\r\n")
        await writer.drain()
        writer.transport.abort()

    async def check() -> None:
        async with serving(reset) as url:
            (asked,) = await ask(url)
            assert asked.end.result() is Failure.DISCONNECTED

    run(check())


def test_nobody_listens(run) -> None:
    async def check() -> None:
        (refused,) = await ask(f"http://127.0.0.1:{free_port()}")
        assert refused.end.result() is Failure.CONNECT
        (unknown,) = await ask("http://name.invalid")
        assert unknown.end.result() is Failure.CONNECT
        (endless,) = await ask(f"http://{'x' * 70}.invalid")
        assert endless.end.result() is Failure.CONNECT

    run(check())


def test_a_connection_that_never_comes(run) -> None:
    async def check() -> None:
        # Its queue is full, so the system answers nobody any more.
        with ExitStack() as opened:
            full = opened.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(3):
                waiting = opened.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            (asked,) = await ask(f"http://127.0.0.1:{full.getsockname()[1]}", timeout_s=0.2)
            assert asked.end.result() is Failure.CONNECT

    run(check())


def test_connections_are_kept_and_bounded(run) -> None:
    connected = []

    async def handle(reader, writer) -> None:
        connected.append(1)
        await answering(reply(), closes=False)(reader, writer)

    async def check() -> None:
        async with serving(handle) as url:
            with closing(HttpClient(Target(url), 2, HANGS_S)) as http:
                for _ in range(5):
                    requests = [Asked(), Asked()]
                    for request in requests:
                        assert http.has_room
                        http.start(request)
                    assert not http.has_room
                    for request in requests:
                        assert await request.end is Failure.NONE
        assert len(connected) == 2

    run(check())


@pytest.mark.parametrize("answers", [0, 3])
def test_a_connection_that_the_server_has_closed_meanwhile(run, answers) -> None:
    """Each connection answers once and ends at the second request; from some time on, at once."""
    connected, left = [], [answers + 1]

    async def once(reader, writer) -> None:
        connected.append(1)
        await read_request(reader)
        if left[0] == 0:
            return
        left[0] -= 1
        writer.write(reply())
        await read_request(reader)

    async def check() -> None:
        async with serving(once) as url:
            asked = await ask(url, answers + 2)
            ends = [request.end.result() for request in asked]
            assert ends == [Failure.NONE] * (answers + 1) + [Failure.DISCONNECTED]
        # The last one was tried on the kept connection and on one more, and no third time.
        assert len(connected) == answers + 2

    run(check())


def test_what_comes_after_an_answer_is_no_part_of_it(run) -> None:
    async def check() -> None:
        for excess in (b"more", reply(), OK):
            async with serving(answering(reply(b"hello") + excess, closes=False)) as url:
                for asked in await ask(url, 3):
                    assert asked.end.result() is Failure.NONE
                    assert asked.body_of_answer == b"hello"

    run(check())


def test_closing_ends_all(run) -> None:
    async def check() -> None:
        asked = asyncio.Event()

        async def note(reader, writer) -> None:
            await read_request(reader)
            asked.set()
            await reader.read()

        async with serving(note) as url:
            with closing(HttpClient(Target(url), 5, HANGS_S)) as http:
                opened, opening = Asked(), Asked()
                http.start(opened)
                await asked.wait()
                http.start(opening)
            assert opened.end.result() is opening.end.result() is Failure.INTERRUPTED

    run(check())


def test_what_is_sent(run) -> None:
    got = []

    async def note(reader, writer) -> None:
        got.append(await read_request(reader))
        writer.write(reply())

    async def check() -> None:
        async with serving(note) as url:
            target = Target(url, (("Authorization", "Bearer x"), ("user-agent", "me")))
            with closing(HttpClient(target, 1, HANGS_S)) as http:
                request = Asked(b"x" * 1_000_000)
                http.start(request)
                assert await request.end is Failure.NONE

    run(check())
    head, _, body = got[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /base/v1/chat/completions HTTP/1.1"
    assert lines[1].startswith(b"Host: localhost:")
    assert b"Authorization: Bearer x" in lines
    assert [line for line in lines if line.lower().startswith(b"user-agent")] == [b"user-agent: me"]
    assert lines[-1] == b"Content-Length: 1000000"
    assert body == b"x" * 1_000_000


@pytest.fixture
def certificate(tmp_path):
    """A certificate of localhost that signs itself: its file, and the server's context."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "server.pem"
    kinds = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    file.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, *kinds))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return file, context


def test_tls(run, certificate, monkeypatch) -> None:
    file, context = certificate

    async def check() -> None:
        async with serving(answering(reply(), closes=False), ssl=context) as url:
            (stranger,) = await ask(url)
            assert stranger.end.result() is Failure.CONNECT
            monkeypatch.setenv("SSL_CERT_FILE", str(file))
            for asked in await ask(url, 3):
                assert asked.end.result() is Failure.NONE

    run(check())


@pytest.mark.parametrize(
    "url",
    ["", "localhost:80", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://x/?a=b",
     "http://a b", "http://[::1", "http://x/\r\nEvil: 1"],
)  # fmt: skip
def test_urls_that_cannot_be_asked(run, url) -> None:
    async def check() -> None:
        HttpClient(Target(url), 1, 10)

    with pytest.raises(ConfigError, match="URL: should be http://HOST:PORT"):
        run(check())


@pytest.mark.parametrize("header", [("A", "b\r\nEvil: 1"), ("", "b"), ("Ä", "b")])
def test_headers_that_cannot_be_sent(run, header) -> None:
    async def check() -> None:
        HttpClient(Target("http://x", (header,)), 1, 10)

    with pytest.raises(ConfigError, match="--header: should be"):
        run(check())


@pytest.mark.parametrize(
    ("pieces", "stream", "failure", "status"),
    [
        ((reply(),), False, Failure.NONE, 200),
        ((reply(CHAT_STREAM),), True, Failure.NONE, 200),
        ((OK + b"\r\n", CHAT_STREAM[:100], CHAT_STREAM[100:]), True, Failure.NONE, 200),
        ((reply(CHAT_STREAM.removesuffix(DONE)),), True, Failure.CONTENT, 200),
        ((OK + b"\r\n" + chunk("a"),), True, Failure.CONTENT, 200),
        ((OK + b"Content-Length: 9999\r\n\r\n" + chunk("a"),), True, Failure.DISCONNECTED, 200),
        ((CHUNKED + b"5\r\ndata:\r\n",), True, Failure.DISCONNECTED, 200),
        ((reply(b'data: {"error":{"code":500}}\n\n'),), True, Failure.IN_ANSWER, 200),
        ((reply(b"data: nonsense\n\n"),), True, Failure.CONTENT, 200),
        ((reply(),), True, Failure.CONTENT, 200),
        ((reply(CHAT_STREAM),), False, Failure.CONTENT, 200),
        ((reply(ANSWER[:-1]),), False, Failure.CONTENT, 200),
        ((OK + b"Content-Length: 5\r\n\r\n" + ANSWER,), False, Failure.CONTENT, 200),
        ((reply().replace(b"200 OK", b"500 No"),), False, Failure.STATUS, 500),
        ((reply().replace(b"200 OK", b"429 Too Many"),), True, Failure.STATUS, 429),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False, Failure.CONTENT, 204),
        ((b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",), False,
         Failure.STATUS, 302),
        ((b"nonsense\r\n\r\n",), False, Failure.PROTOCOL, 0),
        ((), False, Failure.DISCONNECTED, 0),
    ],
)  # fmt: skip
def test_broken_servers_make_rows(run, pieces, stream, failure, status) -> None:
    async def check() -> None:
        async with serving(answering(*pieces)) as url:
            records, failed = await rows(url, stream=stream)
            assert set(records.failure) == {failure}
            assert set(records.status) == {status}
            assert failed == 4 * (failure is not Failure.NONE)
            expected = "failed" if failure is not Failure.NONE else "uncached"
            assert {records.outcomes[number] for number in records.outcome} == {expected}

    run(check())


def test_a_server_that_is_not_there_makes_rows(run) -> None:
    records, failed = run(rows(f"http://127.0.0.1:{free_port()}", stream=True))
    assert (set(records.failure), failed) == ({Failure.CONNECT}, 4)


async def rows(url: str, *, stream: bool) -> tuple[Records, int]:
    """Return the rows of four requests, and how many a client says have failed."""
    load = Load(rate=1000, arrivals="constant", sessions=4, timeout_s=HANGS_S)
    workload = Numbered(stream=stream)
    client = Client(Part(0, Target(url), load, workload, due_times(load, workload)))
    records, _ = await client.run(time.monotonic())
    assert sorted(records.session) == [0, 1, 2, 3]
    return records, client.report().failed
