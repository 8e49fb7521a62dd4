"""The supervisor, with small programs in place of vLLM, and with clock and sleep of the test's."""

import asyncio
import logging
import os
import pwd
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import server.engine.supervisor
import server.engine.upstream
from server.config.base import ConfigError
from server.config.models import ModelConfig
from server.engine.models import Models
from server.engine.supervisor import Engine, EngineState, _flags, _log_lines
from server.engine.weights import Weights
from tests.server.engine.test_parent_watchdog import MAIN, PATIENT
from tests.waiting import HANGS_S

# Connects to the test, and ends when the test closes the connection.
CHILD = """
import socket, sys
with socket.create_connection(("127.0.0.1", {port})) as test:
    test.recv(1)
sys.exit(3)
"""
LISTENS = """
import socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind({socket!r})
listening.listen()
"""
STUBBORN = "import signal; signal.signal(signal.SIGRTMIN, signal.SIG_IGN)" + CHILD


class Sleep:
    """In place of `asyncio.sleep`: notes the delay, and waits for the test to go on."""

    def __init__(self) -> None:
        self.delays: asyncio.Queue[float] = asyncio.Queue()
        self.go_on = asyncio.Semaphore(0)

    async def __call__(self, delay_s: float) -> None:
        self.delays.put_nowait(delay_s)
        await self.go_on.acquire()

    async def next_delay_s(self) -> float:
        delay_s = await self.delays.get()
        self.go_on.release()
        return delay_s


class Children:
    """The children's connections, in the order in which they came."""

    def __init__(self) -> None:
        self._came: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )

    async def listen(self) -> None:
        def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._came.put_nowait((reader, writer))

        self.server = await asyncio.start_server(came, "127.0.0.1")
        self.port = self.server.sockets[0].getsockname()[1]

    @asynccontextmanager
    async def next(self) -> AsyncIterator[asyncio.StreamReader]:
        """Give the next child's connection, and let it end afterwards."""
        reader, writer = await self._came.get()
        yield reader
        writer.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch) -> None:
    """Let children take their time to end: one that is killed has no last words."""
    monkeypatch.setattr(server.engine.supervisor, "_STOP_S", HANGS_S)
    monkeypatch.setattr(server.engine.supervisor, "_DRAIN_OUTPUT_S", HANGS_S)


@pytest.fixture
def sleep(monkeypatch) -> Sleep:
    made = Sleep()
    monkeypatch.setattr(asyncio, "sleep", made)
    return made


@pytest.fixture
async def children() -> AsyncIterator[Children]:
    made = Children()
    await made.listen()
    yield made
    made.server.close()


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch) -> Path:
    """The folder for temporary files, with a short path, as a socket's has to be."""
    made = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


async def nothing() -> Mapping[str, Any]:
    return {}


def supervised(name: str, model: ModelConfig, weights: Weights, loading: asyncio.Lock) -> Engine:
    return Engine(name, model, weights, loading, before_start=nothing)


@pytest.fixture
async def engine(temporary: Path) -> AsyncIterator[Engine]:
    model = ModelConfig.model_validate({"source": "weights", "engine": {"restart_max_delay_s": 5}})
    made = supervised("m", model, Weights("weights"), asyncio.Lock())
    yield made
    await made.upstream.close()


@asynccontextmanager
async def running(
    engine: Engine, script: str, watchdog: tuple[str, ...] = MAIN
) -> AsyncIterator[None]:
    """Run the engine's loop with `script` in vLLM's place."""
    own = [sys.executable, "-P", *watchdog, str(engine.folder)]
    assert watchdog != MAIN or own == engine._command[:5]
    engine._command = [*own, sys.executable, "-c", script]
    task = asyncio.create_task(engine.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def messages(caplog, level: int = logging.DEBUG) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@pytest.mark.parametrize(
    ("args", "flags"),
    [
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"lora_modules": ["a=/a", "b=/b"]}, ["--lora-modules", "a=/a", "b=/b"]),
        ({"kv_transfer_config": {"a": [1, None]}}, ["--kv-transfer-config", '{"a":[1,null]}']),
        ({"dtype": None}, []),
        ({"max_model_len": 0, "swap": 0.5, "dtype": "half"}, [
            "--max-model-len", "0", "--swap", "0.5", "--dtype", "half"
        ]),
    ],
)  # fmt: skip
def test_args_become_vllms_options(args: dict, flags: list[str]) -> None:
    assert list(_flags(args)) == flags


async def test_a_folder_with_too_long_a_path_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 90)
    with pytest.raises(ConfigError, match="TMPDIR"):
        supervised("m", ModelConfig(source="w"), Weights("w"), asyncio.Lock())


async def test_delays_grow_up_to_the_maximum(engine: Engine, sleep: Sleep, caplog) -> None:
    caplog.set_level(logging.ERROR)
    async with running(engine, "raise SystemExit(3)"):
        assert [await sleep.next_delay_s() for _ in range(5)] == [1, 2, 4, 5, 5]
        assert (engine.restarts, engine.state) == (4, EngineState.DOWN)
    assert "the engine of m ended with status 3" in messages(caplog)


async def test_each_start_has_the_options_of_that_time(
    engine: Engine, sleep: Sleep, caplog
) -> None:
    caplog.set_level(logging.INFO)
    starts = iter(range(9))

    async def read() -> Mapping[str, Any]:
        return {"kv_transfer_config": {"start": next(starts)}}

    engine._before_start = read
    async with running(engine, "import sys; print(*sys.argv)"):
        for _ in range(2):
            await sleep.next_delay_s()
    for number in range(2):
        assert f'-c --kv-transfer-config {{"start":{number}}}' in messages(caplog)


async def test_what_can_not_be_started_is_tried_again(engine: Engine, sleep: Sleep, caplog) -> None:
    async with running(engine, ""):
        engine._command = ["/nowhere/python"]
        assert [await sleep.next_delay_s() for _ in range(3)] == [1, 2, 4]
        assert (engine.restarts, engine.state) == (2, EngineState.DOWN)
    assert "/nowhere/python" in messages(caplog, logging.ERROR)[0]


async def test_delays_start_anew_after_the_engine_was_ready_for_long(
    engine: Engine, sleep: Sleep, children: Children, monkeypatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(server.engine.upstream, "time", SimpleNamespace(monotonic=lambda: now_s))
    async with running(engine, CHILD.format(port=children.port)):
        for ready_s, delay_s in ((None, 1), (0, 2), (60, 4), (61, 1), (None, 2)):
            async with children.next():
                assert engine.state == EngineState.STARTING
                # Loading takes time too, and doesn't count.
                now_s += 1000
                if ready_s is not None:
                    engine.upstream.ready = True
                    assert engine.state == EngineState.READY
                    now_s += ready_s
            assert await sleep.next_delay_s() == delay_s
            assert not engine.upstream.ready
        async with children.next():
            engine.upstream.ready = True
            now_s += 61
            engine._command = ["/nowhere/python"]
        assert [await sleep.next_delay_s() for _ in range(3)] == [1, 2, 4]


@pytest.mark.parametrize("script", [CHILD, STUBBORN])
async def test_cancelling_ends_the_child_and_removes_its_folder(
    engine: Engine, children: Children, monkeypatch, script: str
) -> None:
    # One that heeds a signal is never killed.
    if script == STUBBORN:
        monkeypatch.setattr(server.engine.supervisor, "_STOP_S", 0.01)
    async with running(engine, script.format(port=children.port)):
        child = await children._came.get()
        assert engine.folder.stat().st_mode & 0o777 == 0o700
    assert await child[0].read() == b""
    child[1].close()
    assert not engine.folder.exists()
    assert engine.state == EngineState.DOWN


async def test_cancelling_while_the_child_is_started_ends_it(
    engine: Engine, children: Children, monkeypatch
) -> None:
    start, started = asyncio.create_subprocess_exec, asyncio.Event()

    async def slow(*command: str, **options) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        await started.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    async with running(engine, CHILD.format(port=children.port)):
        child = await children._came.get()
        asyncio.get_running_loop().call_soon(started.set)
    assert await child[0].read() == b""
    child[1].close()
    assert not engine.folder.exists()


async def test_what_a_dead_engine_left_behind_is_replaced(
    engine: Engine, children: Children
) -> None:
    engine.folder.mkdir()
    (engine.folder / "engine.sock").write_bytes(b"")
    async with running(engine, CHILD.format(port=children.port)), children.next():
        assert list(engine.folder.iterdir()) == []


@pytest.mark.parametrize("removed", ["socket", "folder"])
async def test_an_engine_that_nobody_can_reach_any_more_is_started_anew(
    engine: Engine, children: Children, monkeypatch, caplog, removed: str
) -> None:
    monkeypatch.setattr(server.engine.supervisor, "_SOCKET_CHECK_S", 0.01)
    socket = engine.folder / "engine.sock"
    script = LISTENS.format(socket=str(socket)) + CHILD.format(port=children.port)
    async with running(engine, script):
        async with children.next() as child:
            # Whoever cleans up looks for old ones.
            os.utime(socket, (0, 0))
            async with asyncio.timeout(HANGS_S):
                while not socket.stat().st_mtime:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            shutil.rmtree(engine.folder) if removed == "folder" else socket.unlink()
            assert await child.read() == b""
        async with children.next():
            assert socket.is_socket()
            assert engine.restarts == 1
    assert f"the engine of m can't be reached any more: somebody removed {socket}" in messages(
        caplog
    )


async def test_last_words_are_logged(engine: Engine, sleep: Sleep, caplog) -> None:
    caplog.set_level(logging.INFO)
    script = "for n in range(5000): print('word', n)\nprint('ERROR last', end='', flush=True)"
    async with running(engine, script):
        await sleep.delays.get()
    words = [f"word {n}" for n in range(5000)]
    assert [line for line in messages(caplog) if line.startswith("word")] == words
    assert "ERROR last" in messages(caplog, logging.ERROR)


async def test_output_of_a_stop_is_for_debugging(
    engine: Engine, children: Children, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    stop = "print('ERROR ended', flush=True), sys.exit(0)"
    script = f"import signal, sys; signal.signal(signal.SIGRTMIN, lambda *_: ({stop}))"
    script += CHILD.format(port=children.port)
    async with running(engine, script, watchdog=PATIENT):
        child = await children._came.get()
    child[1].close()
    assert ("DEBUG", "ERROR ended") in [(each.levelname, each.message) for each in caplog.records]


async def test_the_childs_lines_keep_their_levels(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    output = asyncio.StreamReader()
    output.feed_data(b"(EngineCore pid=7) ERROR 11-24 no\nWARNING 11-24 hm\r\n\n")
    output.feed_data(b"(APIServer pid=1) ERROR:    uvicorn\nINFO:     up\nERRORS are\n  at\r 50%")
    output.feed_data(b"\xff\n(EngineCore pid=7) DEBUG x\nCRITICAL y\n")
    output.feed_eof()
    await _log_lines(SimpleNamespace(stdout=output), logging.getLogger("m"), asyncio.Event())
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "(EngineCore pid=7) ERROR 11-24 no"),
        ("WARNING", "WARNING 11-24 hm"),
        ("ERROR", "(APIServer pid=1) ERROR:    uvicorn"),
        ("INFO", "INFO:     up"),
        ("INFO", "ERRORS are"),
        ("INFO", "  at"),
        ("INFO", " 50%\N{REPLACEMENT CHARACTER}"),
        ("DEBUG", "(EngineCore pid=7) DEBUG x"),
        ("CRITICAL", "CRITICAL y"),
    ]


async def test_a_line_without_end_is_logged_in_pieces(caplog) -> None:
    caplog.set_level(logging.INFO)
    output = asyncio.StreamReader()
    output.feed_data(b"x" * 100_000)
    output.feed_eof()
    await _log_lines(SimpleNamespace(stdout=output), logging.getLogger("m"), asyncio.Event())
    assert "".join(messages(caplog)) == "x" * 100_000
    assert max(map(len, messages(caplog))) <= 2 * server.engine.supervisor._LINE_BYTES


async def test_engines_load_one_after_another(
    engine: Engine, children: Children, tmp_path: Path
) -> None:
    other = supervised("other", ModelConfig(source="w"), Weights("w"), engine._loading)
    script = CHILD.format(port=children.port)
    async with running(engine, script), children.next(), running(other, script):
        await asyncio.sleep(0)
        assert (engine.state, other.state) == (EngineState.STARTING,) * 2
        assert not other.folder.exists()
        engine.upstream.ready = True
        async with children.next():
            assert (engine.state, other.state) == (EngineState.READY, EngineState.STARTING)
    await other.upstream.close()


async def test_one_that_ends_gives_its_turn_up(
    engine: Engine, children: Children, sleep: Sleep
) -> None:
    other = supervised("other", ModelConfig(source="w"), Weights("w"), engine._loading)
    async with running(engine, "raise SystemExit(3)"):
        await sleep.delays.get()
        async with running(other, CHILD.format(port=children.port)), children.next():
            assert (engine.state, other.state) == (EngineState.DOWN, EngineState.STARTING)
    await other.upstream.close()


async def test_vllm_gets_names_and_adapters(temporary: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    model = ModelConfig.model_validate(
        {"source": "w", "aliases": ["a"], "engine": {"args": {"max_lora_rank": 8}}}
    )
    weights = Weights("w", adapters={"a,b=c": temporary})
    made = supervised("m", model, weights, asyncio.Lock())
    command = " ".join(made._command)
    assert " --served-model-name m a --uds " in command
    assert " --enable-lora --lora-modules " in command
    assert f'{{"name":"a,b=c","path":"{temporary}"}} --max-lora-rank 8' in command
    assert made._env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    await made.upstream.close()


async def test_an_engine_has_a_home_where_its_user_has_none(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/")
    homes = []
    for _ in range(2):
        made = supervised("m", ModelConfig(source="s"), Weights("s"), asyncio.Lock())
        homes.append((made._env["HOME"], str(made.folder)))
        await made.upstream.close()
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    (given, _), (own, folder) = homes
    assert (given, own) == ("/", folder)


async def test_each_start_finds_the_identity_anew(
    temporary: Path, tmp_path: Path, sleep: Sleep
) -> None:
    (tmp_path / "config.json").write_text("{}")
    template = tmp_path / "chat.jinja"
    template.write_text("one")
    args = {"chat_template": str(template)}
    described = ModelConfig.model_validate({"source": str(tmp_path), "engine": {"args": args}})
    models = Models({"m": described})
    (model,) = models.all
    assert model.engine is not None
    before = models.names()
    async with running(model.engine, "raise SystemExit(3)"):
        await sleep.delays.get()
        assert models.names() is before
        template.write_text("{{ strftime_now('%d') }}")
        assert models.names() is before
        sleep.go_on.release()
        await sleep.delays.get()
        after = models.names().resolve("m").identity
    assert re.search(r" \d{4}-\d\d-\d\d$", after)
    assert after.rpartition(" ")[0] != before.resolve("m").identity
    await models.close()
