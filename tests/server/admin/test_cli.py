"""`tierserve cache` as a command, through a server and on its file."""

import asyncio
import gc
import itertools
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from server.admin.client import _READ_TIMEOUT_S
from server.admin.handler import AdminHandler
from server.admin.local import LocalOperations
from server.admin.sockets import serve_admin_api
from server.audit.acts import Audit
from server.config.load import load
from tests.server.admin.test_exports import entry, export
from tests.server.conftest import (
    Cache,
    Front,
    Upstream,
    alike,
    answer,
    body,
    question,
    running,
)
from tests.waiting import HANGS_S
from tiers import Chain, DiskCache, FrequencySketch
from tiers.disk.file import DATA
from tiers.disk.marks import CLEAN

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def started(config: Path, action: str, *rest: str) -> asyncio.subprocess.Process:
    """Start the command in a process of its own."""
    command = (sys.executable, "-m", "server.cli", "cache", action, "--config", str(config), *rest)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose server doesn't run."""
    return Front(tmp_path, alike("http://127.0.0.1:1")).config


def exported(tmp_path: Path, **texts: str) -> str:
    file = tmp_path / "export"
    now = Path(tmp_path).stat().st_mtime
    file.write_bytes(b"".join(export(*((key, entry(t, now, 1e6)) for key, t in texts.items()))))
    return str(file)


def counts(**of: int) -> str:
    """Return what an import prints."""
    outcomes = ("stored", "unchanged", "older", "expired", "purged", "refused", "damaged")
    return ", ".join(f"{outcome}: {of.get(outcome, 0)}" for outcome in outcomes) + "\n"


async def test_an_export_is_not_encrypted_and_says_so(
    cache: Cache, tmp_path: Path, config: Path, monkeypatch
) -> None:
    file = exported(tmp_path, **{"a" * 64: "{}"})
    for key, notes in ((None, 0), ("ab" * 32, 1)):
        if key is not None:
            monkeypatch.setenv("TIERSERVE__TIERS__DISK__ENCRYPTION_KEY", key)
            monkeypatch.setenv("TIERSERVE__TIERS__DISK__PATH", str(tmp_path / "sealed"))
        assert (await cache(config, "import", file)).status == 0
        ended = await cache(config, "export", str(tmp_path / "out"))
        assert ended.status == 0
        assert ended.err.count("is encrypted, but the export is not") == notes


async def test_a_file_is_administered_while_no_server_runs(
    cache: Cache, tmp_path: Path, config: Path
) -> None:
    a, ab, b = "a" * 64, "ab" * 32, "b" * 64
    file = exported(tmp_path, **dict.fromkeys((a, ab, b), "{}"))
    made = await cache(config, "import", file)
    assert made.status == 0
    assert made.out == counts(stored=3)
    assert (await cache(config, "import", file)).out == counts(unchanged=3)
    assert f"using the file in {tmp_path / 'disk'}: no server answers at " in made.err
    rows = (await cache(config, "ls", "--prefix", "a", "--json")).rows
    assert [(row["key"], row["tiers"], row["bytes"]) for row in rows] == [
        (a, ["disk"], 2), (ab, ["disk"], 2),
    ]  # fmt: skip
    (memory_is_not_there,) = orjson.loads((await cache(config, "stats", "--json")).out)["tiers"]
    assert (memory_is_not_there["tier"], memory_is_not_there["entries"]) == ("disk", 3)
    assert (await cache(config, "get", a, "--raw")).out == "{}"
    purged = await cache(config, "purge", "--key", a, "--key", b)
    assert purged.status == 0
    assert f"purged key:{a}, key:{b}: no entry from before the purge is served" in purged.err
    gone = await cache(config, "get", a)
    assert (gone.status, gone.out) == (1, "")
    assert "There is no entry under this key." in gone.err
    assert [row["key"] for row in (await cache(config, "ls", "--all", "--json")).rows] == [ab]
    verified = await cache(config, "verify")
    assert verified.out == "3 entries, 0 damaged\n"
    assert "purged and expired entries count until" in verified.err
    compacted = await cache(config, "compact")
    assert re.fullmatch(r"[\d.]+KiB before, [\d.]+KiB after\n", compacted.out)
    exported_ = await cache(config, "export")
    assert len(exported_.out.splitlines()) == 3
    nowhere = await cache(config, "export", "/no/e")
    assert nowhere.status == 1
    assert "FILE should be a writable path, not /no/e: No such file" in nowhere.err


async def test_a_running_server_is_administered_and_its_leftovers(
    cache: Cache, tmp_path: Path, upstream: Upstream
) -> None:
    async with running(tmp_path, upstream) as front:
        asked = question()
        await front.ask(asked)
        assert "hit" in (await front.ask_alone(asked))[1]
        await front.until_metric('tierserve_tier_stores_total{tier="disk"}', 1)
        listed = await cache(front.config, "ls", "--json", "--limit", "1")
        (row,) = listed.rows
        assert listed.err.startswith(f"using the server at {front.socket}\n")
        got = await cache(front.config, "get", row["key"])
        assert re.search(r"^frequency: 2$", got.out, re.MULTILINE)
        assert orjson.loads(got.out.splitlines()[-1]) == body() | {"id": "", "created": 0}
        for label, rows in (("model:m", 1), ("tenant:anonymous", 1), ("model:x", 0)):
            labelled = await cache(front.config, "ls", "--label", label, "--json")
            assert len(labelled.rows) == rows
        table = (await cache(front.config, "ls")).out.splitlines()
        assert len(table) == 2
        assert table[1].startswith(row["key"])
        stats = (await cache(front.config, "stats")).out
        assert re.search(r"^hits +1 +0$", stats, re.MULTILINE)
        assert (await cache(front.config, "verify")).out == "1 entries, 0 damaged\n"
        for refused in (["compact"], ["verify", "--repair"]):
            ended = await cache(front.config, *refused)
            assert ended.status == 1
            assert "top the server first" in ended.err
        kept = tmp_path / "kept"
        assert (await cache(front.config, "export", str(kept))).status == 0
        assert kept.stat().st_mode & 0o777 == 0o600
        front.process.send_signal(signal.SIGKILL)
        await front.process.wait()
        again = await cache(front.config, "ls", "--json")
        assert [each["key"] for each in again.rows] == [row["key"]]
        assert (await cache(front.config, "purge", "--all")).status == 0
        process = await started(front.config, "import", "-")
        out, _ = await process.communicate(kept.read_bytes())
        assert out.decode() == counts(purged=1)


async def test_purges_by_label(cache: Cache, front: Front) -> None:
    asked = question(model="n", cache={"tags": ["red"]})
    for how in (["--model", "n"], ["--tenant", "anonymous"], ["--tag", "red"], ["--all"]):
        await front.ask(asked)
        assert "hit" in (await front.ask_alone(asked))[1]
        assert (await cache(front.config, "purge", "--model", "other")).status == 0
        assert "hit" in (await front.ask(asked))[1]
        ended = await cache(front.config, "purge", *how)
        assert (ended.status, ended.out) == (0, "")
        assert "fwd=miss" in (await front.ask(asked))[1]


async def test_a_model_that_the_configuration_does_not_name_is_noted(
    cache: Cache, tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    models = {"m": {"source": "s", "aliases": ["alias"], "adapters": {"poet": "p"}}}
    tiers = {"disk": {"path": str(tmp_path / "disk")}}
    file.write_bytes(orjson.dumps({"models": models, "tiers": tiers}))
    await cache(file, "import", exported(tmp_path, a="{}"))
    for name, known_as in (("m", "m"), ("alias", "m"), ("poet", "poet"), ("n", "n")):
        ended = await cache(file, "purge", "--model", name)
        assert ended.status == 0
        assert f"purged model:{known_as}: " in ended.err
        noted = "note: the configuration has no model or adapter n" in ended.err
        assert noted is (name == "n")


async def test_damage_is_found_and_repaired(cache: Cache, tmp_path: Path, config: Path) -> None:
    texts = {f"key{number}": f"text{number}" * 9 for number in range(9)}
    await cache(config, "import", exported(tmp_path, **texts))
    data = tmp_path / "disk" / DATA
    data.write_bytes(data.read_bytes().replace(b"text7text7", b"text7texT7"))
    found = await cache(config, "verify")
    assert (found.status, found.out) == (1, "9 entries, 1 damaged\n")
    repaired = await cache(config, "verify", "--repair")
    assert (repaired.status, repaired.out) == (0, "9 entries, 1 damaged and dropped\n")
    assert (await cache(config, "verify")).out == "8 entries, 0 damaged\n"
    assert len((await cache(config, "ls", "--json")).rows) == 8
    data.write_bytes(b"nothing" * 10_000)
    broken = await cache(config, "verify")
    assert broken.status == 1
    assert "the file can't be used: " in broken.err


async def test_a_file_in_use_is_not_compacted(cache: Cache, tmp_path: Path, config: Path) -> None:
    # By a server without an admin API, for instance.
    other = DiskCache(tmp_path / "disk", 4 * 1024**2)
    await other.set("k", b"v")
    for action in ("compact", "verify"):
        ended = await cache(config, action)
        assert ended.status == 1
        assert "another process has the disk tier open" in ended.err
    process = await started(config, "stats")
    out, _ = await process.communicate()
    assert re.search(rb"^entries +1$", out, re.MULTILINE)
    await other.close()


@pytest.mark.parametrize("closed", ["cleanly", "too large", "not cleanly"])
async def test_a_file_of_another_format_stays_where_it_is(
    cache: Cache, tmp_path: Path, config: Path, monkeypatch, closed: str
) -> None:
    folder = tmp_path / "disk"
    max_bytes = 16 * 1024**2 if closed == "too large" else 4 * 1024**2
    with monkeypatch.context() as other:
        other.setattr("tiers.disk.file.FORMAT", 1)
        disk = DiskCache(folder, max_bytes)
        for number in range(8 if closed == "too large" else 1):
            await disk.set(f"{number}", bytes(900_000))
        await disk.close()
    if closed == "not cleanly":
        (folder / CLEAN).unlink()
    held = {file.name for file in folder.iterdir()}
    before = (folder / DATA).read_bytes()
    commands = [
        ["compact"], ["stats"], ["ls"], ["get", "0"], ["export"], ["purge", "--all", "--yes"],
    ]  # fmt: skip
    # What was not closed cleanly is verified each time.
    for arguments in commands[:2] if closed == "not cleanly" else commands:
        ended = await cache(config, *arguments)
        assert (ended.status, ended.out) == (1, "")
        assert "the file can't be used: its format is b'1', not " in ended.err
        assert "Traceback" not in ended.err
    assert (folder / DATA).read_bytes() == before
    assert {file.name for file in folder.iterdir()} == held


async def test_damaged_lines_are_named(cache: Cache, tmp_path: Path, config: Path) -> None:
    file = Path(exported(tmp_path, a="{}", b="{}"))
    first, one, two, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + one[:40] + b"\n" + two + last)
    ended = await cache(config, "import", str(file))
    assert ended.status == 1
    assert ended.out == counts(stored=1, damaged=1)
    assert f"{file}: line 2 is damaged or cut" in ended.err
    file.write_text("hello")
    ended = await cache(config, "import", str(file))
    assert (ended.status, ended.out) == (2, "")
    assert "should begin as an export of tierserve" in ended.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["ls"], 1, "no server answers at "),
        (["export"], 1, "there is no disk tier's file in "),
        (["compact"], 1, "there is no disk tier's file in "),
        (["verify"], 1, "there is no disk tier's file in "),
        (["import", "/no/e"], 1, "FILE should be a readable export, not /no/e: No such"),
        (["warm", "/no/e"], 1, "FILE should be a readable JSONL file, not /no/e: No such"),
        (["warm", "/dev/null"], 1, "server.host and server.port should be those of a running"),
        (["ls", "--limit", "0"], 2, "should be a number from 1 on, not '0'"),
        (["purge"], 2, "one of the arguments --key --model --tenant --tag --all is required"),
        (["purge", "--key", "k", "--all"], 2, "not allowed with"),
        (["get"], 2, "the following arguments are required: KEY"),
        (["drop"], 2, "invalid choice"),
    ],
)
async def test_what_can_t_be_done_is_named(
    cache: Cache, config: Path, arguments, status, message
) -> None:
    ended = await cache(config, *arguments)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert "Errno" not in ended.err
    assert not (config.parent / "disk").exists()


async def test_wrong_queries_are_wrong_use(cache: Cache, tmp_path: Path, config: Path) -> None:
    await cache(config, "import", exported(tmp_path, a="{}"))
    for arguments, message in (
        (["ls", "--tier", "memory"], "tier should be one of disk"),
        (["ls", "--after", "x"], "after should be as the page before gave it"),
        (["purge", "--model", ""], "a label should be"),
        (["purge", "--key", "k"], "key should be as `tierserve cache ls` prints it"),
        (["purge", "--key", "A" * 64], "nothing was purged"),
        (["purge", "--tenant", "al ice"], "tenant should be 1 to 64 letters, digits, dots,"),
        (["purge", "--tag", "a\nb"], "tag should be 1 to 128 printable characters, not 'a\\nb'"),
    ):
        ended = await cache(config, *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert message in ended.err


async def test_warming(
    cache: Cache, tmp_path: Path, front: Front, upstream: Upstream, monkeypatch
) -> None:
    async def failing(http: web.Request) -> web.StreamResponse:
        if b"fail" in await http.read():
            return web.json_response({"error": {"message": "no"}}, status=400)
        reply = await answer(http)
        if b"instead" in await http.read():
            reply.headers["X-Tierserve-Fallback"] = "small"
        return reply

    upstream.handler = failing
    asked = question()
    lines = [
        orjson.dumps(asked),
        orjson.dumps({"route": "/v1/chat/completions", "body": question()}),
        orjson.dumps(question(temperature=1)),
        orjson.dumps(question(user="fail")),
        b"no JSON",
        b"[]",
        b"",
        b'{"route":"/v1/models","body":{}}',
        b'{"body":1}',
        b'{"body":{},"more":1}',
        orjson.dumps(question(user="instead")),
    ]
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"\n".join(lines))
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    first = await cache(front.config, "warm", str(file))
    assert first.status == 1
    assert first.out == "hits: 0, misses: 2, not kept: 1, errors: 2, malformed: 5\n"
    named = [line.removeprefix(f"{file}:") for line in first.err.splitlines()]
    *malformed, one, other = named
    assert [line.partition(":")[0] for line in malformed] == ["5", "6", "8", "9", "10"]
    assert {one, other} == {
        "4: answered with status 400", "11: answered by small, its model's fallback"
    }  # fmt: skip
    assert {http.headers["Authorization"] for http in upstream.asked} == {"Bearer mine"}
    file.write_bytes(b"\n".join(lines[:2]))
    again = await cache(front.config, "warm", str(file))
    assert (again.status, again.out) == (
        0,
        "hits: 2, misses: 0, not kept: 0, errors: 0, malformed: 0\n",
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    other = await cache(front.config, "warm", str(file), "--concurrency", "1")
    assert other.out.startswith("hits: 0, misses: 2, ")


# What a client has not got rid of when it gives up ends with its process.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    "arguments", [["stats"], ["export"], ["verify"], ["import", "small"], ["import", "large"]]
)
async def test_a_server_that_does_not_answer_is_not_waited_for(
    cache: Cache, tmp_path: Path, config: Path, monkeypatch, arguments: list[str]
) -> None:
    """Not even one that doesn't read what it is sent, as it is more than the system buffers."""
    monkeypatch.setattr("server.admin.client._READ_TIMEOUT_S", 0.2)
    if arguments[0] == "import":
        sizes = {"small": 1, "large": 400}
        texts = {f"{n}": "x" * 9000 for n in range(sizes[arguments[1]])}
        arguments = ["import", exported(tmp_path, **texts)]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "admin.sock"))
        silent.listen()
        ended = await cache(config, *arguments)
    assert (ended.status, ended.out) == (1, "")
    gc.collect()
    assert "admin.socket did not answer within 0.2 seconds" in ended.err


def administering(
    config: Path, operations: type[LocalOperations]
) -> AbstractAsyncContextManager[None]:
    """Answer at the admin socket, in this process, with `operations` on no tiers."""
    chain = Chain([], frequency=FrequencySketch(1), max_answer_bytes=1)
    admin = AdminHandler(operations(chain), Audit(None), max_line_bytes=99)
    return serve_admin_api(load(config), lambda _: admin.answer, None, Audit(None))


async def test_a_socket_that_was_removed_is_made_anew(
    cache: Cache, config: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("server.admin.sockets._CHECK_EVERY_S", 0.01)
    socket = load(config).admin.socket
    lock = socket.with_name(f"{socket.name}.lock")

    async def until(is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANGS_S):
            while not is_so():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async with administering(config, LocalOperations):
        lock.unlink()
        # As long as it can't be made.
        lock.mkdir()
        socket.unlink()
        await until(lambda: "admin.socket: should be a path where a socket can be" in caplog.text)
        lock.rmdir()
        await until(socket.exists)
        assert "using the server at" in (await cache(config, "stats")).err
        assert socket.stat().st_mode & 0o777 == 0o600
    assert caplog.text.count(f"admin.socket: {socket} was removed; it is created again") == 1
    assert not socket.exists()


async def test_a_server_that_goes_on_is_waited_for(cache: Cache, config: Path, monkeypatch) -> None:
    """It takes longer than it may be silent, by a clock of which the client sleeps minutes."""
    servers, sleep, slept_s = asyncio.get_running_loop(), asyncio.sleep, 0.0
    looks, has_looked = itertools.count(1), asyncio.Event()

    async def sleep_long(delay_s: float) -> None:
        nonlocal slept_s
        if asyncio.get_running_loop() is not servers:
            slept_s += 2 * _READ_TIMEOUT_S
            delay_s = 0
        await sleep(delay_s)

    def now(loop: asyncio.AbstractEventLoop) -> float:
        return time.monotonic() + (0 if loop is servers else slept_s)

    monkeypatch.setattr(asyncio, "sleep", sleep_long)
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", now)

    class Slow(LocalOperations):
        async def stats(self) -> dict:
            if next(looks) == 3:
                has_looked.set()
            return {}

        async def verify(self) -> dict:
            await has_looked.wait()
            return {"entries": 1, "damaged": 0, "problem": None}

    async with administering(config, Slow):
        assert (await cache(config, "verify")).out == "1 entries, 0 damaged\n"


@pytest.mark.parametrize("action", ["verify", "import"])
async def test_a_server_that_goes_on_no_more_is_not_waited_for(
    cache: Cache, tmp_path: Path, config: Path, monkeypatch, action: str
) -> None:
    monkeypatch.setattr("server.admin.client._READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr("server.admin.client._CHECK_EVERY_S", 0.05)
    looks = itertools.count()

    class Hanging(LocalOperations):
        async def stats(self) -> dict:
            if next(looks):
                await asyncio.Event().wait()
            return {}

        async def verify(self) -> dict:
            await asyncio.Event().wait()
            return {}

        async def import_(self, lines) -> dict:
            return await self.verify()

    async with administering(config, Hanging):
        arguments = [exported(tmp_path, a="{}")] if action == "import" else []
        ended = await cache(config, action, *arguments)
    assert ended.status == 1
    assert "admin.socket did not answer within 0.5 seconds" in ended.err


async def test_whoever_reads_may_stop(cache: Cache, tmp_path: Path, config: Path) -> None:
    texts = {f"{number:0500}": "x" * 900 for number in range(700)}
    await cache(config, "import", exported(tmp_path, **texts))
    for arguments, first in ((["export"], b"tierserve-export"), (["ls", "--all"], b"key")):
        process = await started(config, *arguments)
        assert process.stdout is not None
        assert process.stderr is not None
        # More follows than a pipe and our reader take.
        assert first in (await process.stdout.readline()).lower()
        process.stdout._transport.close()
        err = (await process.stderr.read()).decode()
        assert await process.wait() == 141
        assert err.count("\n") == 1
        assert "no server answers" in err
