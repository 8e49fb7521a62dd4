"""tierserve as a process in front of an upstream that a test scripts."""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from server.auth.tenant import open_tenant
from server.cli import main
from server.config.load import load
from server.engine.identity import identity
from server.engine.weights import embedded_folder
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.request import parse_request
from tests.servers import free_port
from tests.waiting import HANGS_S, until_accepted

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
_number = itertools.count()


def question(**more) -> dict:
    """A question that nobody has asked before."""
    content = f"question {next(_number)}"
    return {"messages": [{"role": "user", "content": content}], "temperature": 0} | more


def body(text: str = "yes", reason: str | None = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    head = {"id": "chatcmpl-x", "object": "chat.completion", "created": 1, "model": "m"}
    return head | {"choices": [choice], "usage": USAGE}


def chunk(delta: dict | None, reason: str | None = None) -> bytes:
    """One event; with the token counts and no choice where `delta` is None."""
    made = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    if delta is None:
        made |= {"choices": [], "usage": USAGE}
    else:
        made |= {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return b"data: " + orjson.dumps(made) + b"\n\n"


ONE_TOKEN = b'{"model": "m", "prompt": "a", "max_tokens": 1}'
ROLE = chunk({"role": "assistant", "content": ""})
WHOLE = (ROLE, chunk({"content": "yes"}), chunk({}, "stop"), chunk(None), b"data: [DONE]\n\n")


async def answer(http: web.Request) -> web.StreamResponse:
    """What an engine does, in short."""
    asked = orjson.loads(await http.read())
    if not asked.get("stream"):
        return web.json_response(body())
    return await stream(http, *WHOLE)


async def stream(
    http: web.Request,
    *pieces: bytes | asyncio.Event,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> web.StreamResponse:
    """Send pieces; where an event stands, wait for it."""
    sse = {"Content-Type": "text/event-stream; charset=utf-8"}
    response = web.StreamResponse(headers=sse | headers)
    await response.prepare(http)
    for piece in pieces:
        if isinstance(piece, asyncio.Event):
            await piece.wait()
        else:
            await response.write(piece)
    return response


def held(go: asyncio.Event) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that begins a stream, and goes on once `go` is set."""

    async def slow(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE, go, *WHOLE[1:])

    return slow


def counting() -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that answers 0, 1, 2, …"""
    number = iter(range(100))

    async def count(http: web.Request) -> web.StreamResponse:
        return web.json_response(body(str(next(number))))

    return count


async def one_token(_: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]})


async def nothing_measured(_: web.Request) -> web.StreamResponse:
    return web.Response()


async def nothing_listed(_: web.Request) -> web.StreamResponse:
    return web.json_response({"data": []})


class Upstream:
    """An HTTP server that does what `handler` says, and notes what it was asked.

    `lists` answers `/v1/models` and `metrics` `/metrics`, which it is asked all the time, and
    `token` the request for one token that shows whether it keeps generating.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.port = host, port or free_port()
        self.url = f"http://{host}:{self.port}"
        self.handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = answer
        self.lists = nothing_listed
        self.metrics = nothing_measured
        self.token = one_token
        self.asked: list[web.Request] = []
        self.aborted = asyncio.Event()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:(?s:.*)}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port).start()

    async def stop(self) -> None:
        await until_accepted()
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        if http.path == "/v1/models":
            return await self.lists(http)
        if http.path == "/metrics" and "X-Request-Id" not in http.headers:
            # A client's would have an id.
            return await self.metrics(http)
        if http.path == "/v1/completions" and await http.read() == ONE_TOKEN:
            return await self.token(http)
        self.asked.append(http)
        try:
            return await self.handler(http)
        except asyncio.CancelledError:
            self.aborted.set()
            raise


def alike(*urls: str) -> dict[str, dict]:
    """Models of the same upstreams: by rules of `Front`, answers of two are stale at once, and of
    `n` nobody knows that it is a vLLM."""
    known = {name: {"upstreams": list(urls), "vllm": {}} for name in ("m", "n", "swr", "sie")}
    return known | {"n": {"upstreams": list(urls)}}


def skip_unless_runs(*wrapper: str) -> None:
    """Skip a test where `unshare` isn't there, or may not make namespaces."""
    if shutil.which(wrapper[0]) is None or subprocess.run([*wrapper, "true"]).returncode:
        pytest.skip(f"can't be run here: {' '.join(wrapper)}")


def of_vllm(name: str, identity: str = "", **known: bool) -> ResolvedModel:
    """What a name means that a vLLM answers to which tells the same in both forms."""
    known = {"is_vllm": True, "encodings_agree": True, "always_counts_tokens": False} | known
    return ResolvedModel(name, identity, **known)


class Front:
    """A tierserve process, and a client of it. `tiers` are more than a memory and a disk tier.

    `sections` are merged into the configuration's, `headers` sent with each request. A `wrapper` is
    a command that runs the server's.
    """

    wrapper: tuple[str, ...] = ()
    inherited: tuple[int, ...] = ()
    """Files that the process has open from its start."""
    end_signal = signal.SIGTERM

    def __init__(
        self,
        folder: Path,
        models: dict[str, dict],
        *,
        sections: dict[str, dict] | None = None,
        headers: dict[str, str] | None = None,
        **tiers: dict,
    ) -> None:
        self.headers = headers
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.socket = folder / "admin.sock"
        self.config = folder / "config.yaml"
        made = {
            # Its bounds are no test's affair, unless the test sets them.
            "server": {
                "port": self.port,
                "max_body_bytes": 100_000,
                "client_timeout_s": HANGS_S,
                "shutdown_grace_s": HANGS_S,
            },
            "models": models,
            "cache": {
                "wait_for_others_s": HANGS_S,
                "rules": [
                    # Stale at once, so that nobody waits for it.
                    {"model": "swr", "ttl_s": 1e-6, "stale_while_revalidate_s": 3600},
                    {"model": "sie", "ttl_s": 1e-6, "stale_if_error_s": 3600},
                ],
            },
            "admin": {"socket": str(self.socket)},
            "tiers": {"disk": {"path": str(folder / "disk"), "max_bytes": "4MiB"}} | tiers,
        }
        for name, section in (sections or {}).items():
            made[name] = made.get(name, {}) | section
        self.config.write_bytes(orjson.dumps(made))

    @property
    def command(self) -> list[str]:
        own = [sys.executable, "-m", "server.cli", "serve", "--config", str(self.config)]
        return [*self.wrapper, *own]

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stderr=log, pass_fds=self.inherited
            )
        self.session = aiohttp.ClientSession(self.url, headers=self.headers)
        await self.until_ready()

    async def stop(self) -> None:
        await self.session.close()
        if self.process.returncode is None:
            self.send(self.end_signal)
        try:
            await asyncio.wait_for(self.process.wait(), HANGS_S)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.process.wait()
            raise

    def send(self, number: int) -> None:
        """Send the process a signal, which may have just ended.

        asyncio's own methods then may take its exit status, and 255 would stand for it.
        """
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    async def end_by_signals(self) -> int:
        """Send SIGTERM until the process has ended; returns its exit status."""
        async with asyncio.timeout(HANGS_S):
            while (status := self.process.returncode) is None:
                # The first one may come several times; a later one ends it at once.
                self.send(signal.SIGTERM)
                await asyncio.sleep(0.2)
        return status

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def until_ready(self, status: int = 200, model: str | None = None) -> None:
        """Wait for `/ready` to say `status`, of all models or one; 0 stands for no connection."""
        said = None
        with suppress(TimeoutError):
            async with asyncio.timeout(HANGS_S):
                while (said := await self.ready(model)) != status:
                    if self.process.returncode is not None:
                        break
                    await asyncio.sleep(0.05)
        if said != status:
            ended = self.process.returncode
            log = self.log.read_text()[-4000:]
            pytest.fail(f"/ready says {said}, not {status}; exit status {ended}:\n{log}")

    async def ready(self, model: str | None = None) -> int:
        asked = {} if model is None else {"model": model}
        try:
            # Also by whoever does not know its certificate.
            async with self.session.get("/ready", params=asked, ssl=False) as response:
                return response.status
        except aiohttp.ClientConnectionError:
            # One that waits to be accepted is closed with the listener.
            return 0

    def key(self, asked: dict) -> str:
        """Return the key of a chat completion."""
        models = load(self.config).models
        names = ModelNames(
            {name: of_vllm(name, identity(each, None)) for name, each in models.items()}
        )
        return parse_request(CHAT, orjson.dumps(asked), open_tenant(""), names).key

    def post(self, asked: dict, **options):
        return self.session.post(CHAT, json=asked, **options)

    async def ask(self, asked: dict, **options) -> tuple[int, str, bytes]:
        """Return status, Cache-Status and body."""
        async with self.post(asked, **options) as response:
            return response.status, response.headers["Cache-Status"], await response.read()

    async def ask_alone(self, asked: dict, **options) -> tuple[int, str, bytes]:
        """Ask until no flight is joined: the nearest tier holds the answer then, or none does."""
        async with asyncio.timeout(HANGS_S):
            while "collapsed" in (reply := await self.ask(asked, **options))[1]:
                pass
        return reply

    async def metric(self, line: str) -> float:
        status = 503
        async with asyncio.timeout(HANGS_S):
            # Of several processes others may not have answered in time.
            while status == 503:
                async with self.session.get("/metrics") as response:
                    status, lines = response.status, (await response.text()).splitlines()
        assert status == 200
        return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(line))

    async def until_logged(self, text: str, times: int = 1) -> None:
        """Wait until the log has a text so many times."""
        async with asyncio.timeout(HANGS_S):
            while self.log.read_text().count(text) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def until_status(self, headers: dict[str, str], status: int) -> None:
        """Wait until a client with these headers gets this status."""
        async with asyncio.timeout(HANGS_S):
            while True:
                # Also by whoever does not know its certificate.
                async with self.session.get("/v1/models", headers=headers, ssl=False) as reply:
                    if reply.status == status:
                        return
                await asyncio.sleep(0.05)

    async def until_metric(self, line: str, value: float) -> None:
        """Wait until a metric that only rises has this value."""
        async with asyncio.timeout(HANGS_S):
            while (now := await self.metric(line)) != value:
                assert now < value
                await asyncio.sleep(0.02)

    async def until_above(self, line: str, value: float) -> None:
        """Wait until a metric is above this value."""
        async with asyncio.timeout(HANGS_S):
            while await self.metric(line) <= value:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        return [orjson.loads(line) for line in self.out.splitlines()]


Cache = Callable[..., Awaitable[Ended]]


@pytest.fixture
def cache(capsys) -> Cache:
    """Runs `tierserve cache`, with a loop of its own."""

    async def run(config: Path, action: str, *rest: str) -> Ended:
        def ended() -> int:
            try:
                return main(["cache", action, "--config", str(config), *rest])
            except SystemExit as exc:
                return exc.code

        capsys.readouterr()
        status = await asyncio.to_thread(ended)
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Keep what is made by default out of this user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(tmp_path_factory.mktemp("cache"), patch)
        yield


def prepare(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have a cache folder with what passes for the embedded model."""
    patch.setenv("XDG_CACHE_HOME", str(cache))
    embedded_folder().mkdir(parents=True)
    (embedded_folder() / "config.json").touch()


@asynccontextmanager
async def running(folder: Path, *upstreams: Upstream, **options: dict) -> AsyncIterator[Front]:
    """A server in front of `upstreams`; `options` are of `Front`."""
    async with Front(folder, alike(*(each.url for each in upstreams)), **options) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def own_upstream() -> AsyncIterator[Upstream]:
    """One that no other test uses, which may be stopped."""
    async with Upstream() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def upstream(_upstream: Upstream) -> Upstream:
    _upstream.handler, _upstream.token = answer, one_token
    _upstream.asked.clear()
    _upstream.aborted.clear()
    return _upstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    async with running(tmp_path_factory.mktemp("front"), _upstream) as made:
        yield made
