"""The command `tierserve cache`: the operations on tiers, through a server or on its file."""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import orjson

from server.admin.operations import MAX_PAGE, AdminError, Operations, Query
from server.config.folders import NO_HOME
from server.config.schema import Config
from server.terminal import human_size, table
from tiers.disk import OtherFormatError, UntrustedError

_PIECE_BYTES = 64 * 1024
_ROW = "{:<64}  {:<11}  {:>9}  {:>9}  {:>9}  {:<8}  {:>5}"
_NAMED = 3


def run(config: Config, options: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 1 for a failure, 2 for wrong use."""
    actions: dict[str, Callable[[Config, argparse.Namespace], Awaitable[int]]] = {
        "stats": _stats, "ls": _ls, "get": _get, "purge": _purge, "warm": _warm,
        "export": _export, "import": _import, "compact": _compact, "verify": _verify,
    }  # fmt: skip
    try:
        return asyncio.run(_awaited(actions[options.action](config, options)))
    except AdminError as exc:
        _say(str(exc))
        return 2 if exc.status == 400 else 1
    except (OtherFormatError, UntrustedError) as exc:
        _say(f"the file can't be used: {exc}")
        return 1
    except BrokenPipeError:
        # Which is no failure of this command's.
        raise
    except OSError as exc:
        # As the system says it, without its number.
        of = f"{exc.filename}: " if exc.filename else ""
        _say(f"{of}{exc.strerror or exc}")
        return 1


async def _awaited(action: Awaitable[int]) -> int:
    return await action


async def _stats(config: Config, options: argparse.Namespace) -> int:
    async with _operations(config) as operations:
        told = await operations.stats()
    if options.json:
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
        return 0
    tiers = told["tiers"]
    flat = [each | {f"file_{n}": v for n, v in each.pop("file", {}).items()} for each in tiers]
    names = dict.fromkeys(name for each in flat for name in each if name != "tier")
    rows = [
        (
            name.replace("_", " "),
            *(
                "" if (value := each.get(name)) is None
                else human_size(value) if "bytes" in name
                else f"{value:,}"
                for each in flat
            ),
        )
        for name in names
    ]  # fmt: skip
    print(*table(("", *(each["tier"] for each in flat)), rows), sep="\n")
    return 0


async def _ls(config: Config, options: argparse.Namespace) -> int:
    limit = MAX_PAGE if options.all else min(options.limit, MAX_PAGE)
    query = Query(options.tier, options.prefix, options.label, limit, options.after)
    left = None if options.all else options.limit
    async with _operations(config) as operations:
        page = await operations.page(query)
        if not options.json:
            print(_ROW.format("key", "tiers", "bytes", "age", "ttl", "state", "asked"))
        while True:
            for row in page["entries"]:
                print(orjson.dumps(row).decode() if options.json else _as_row(row))
            after = page["after"]
            if left is not None:
                left -= len(page["entries"])
            if after is None or left == 0:
                break
            limit = MAX_PAGE if left is None else min(left, MAX_PAGE)
            page = await operations.page(query._replace(after=after, limit=limit))
    if after is not None:
        _say(f"there may be more: --after {after}")
    return 0


async def _get(config: Config, options: argparse.Namespace) -> int:
    async with _operations(config) as operations:
        entry = await operations.entry(options.key)
    if options.json:
        print(orjson.dumps(entry, option=orjson.OPT_INDENT_2).decode())
        return 0
    content = entry.pop("content")
    if not options.raw:
        for name, value in entry.items():
            print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
        print()
    sys.stdout.write(content)
    if not content.endswith("\n") and not options.raw:
        print()
    return 0


async def _purge(config: Config, options: argparse.Namespace) -> int:
    from server.protocol.labels import KINDS
    from tiers.purges.table import ALL

    kind, names = ALL, []
    for each in KINDS:
        if (given := getattr(options, each)) is not None:
            kind, names = each, given
    if kind == ALL and not options.yes and sys.stdin.isatty():
        print("Purge everything? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            _say("nothing was purged")
            return 1
    if kind == "model":
        known_as = dict(pair for n, m in config.models.items() for pair in m.asked_as(n))
        for name in names:
            if name not in known_as:
                _say(f"note: no model is called {name} now, and no adapter")
        names = [known_as.get(name, name) for name in names]
    async with _operations(config) as operations:
        purged = await operations.purge(kind, names)
    what = "everything" if kind == ALL else ", ".join(purged[:_NAMED])
    more = f" and {len(purged) - _NAMED:,} more" if len(purged) > _NAMED else ""
    _say(f"purged {what}{more}: nothing of it from before is given out any more")
    return 0


async def _warm(config: Config, options: argparse.Namespace) -> int:
    from server.admin.warm import warm

    with _named("a JSONL file that can be read", options.file):
        warmed = await warm(config, options.file, options.concurrency, _say)
    told = {name.replace("_", " "): count for name, count in warmed._asdict().items()}
    print(", ".join(f"{name}: {count:,}" for name, count in told.items()))
    return int(bool(warmed.errors or warmed.malformed))


async def _export(config: Config, options: argparse.Namespace) -> int:
    disk = config.tiers.disk
    if disk is not None and (disk.encryption_key or disk.encryption_key_file):
        _say("note: the disk tier is encrypted, and what is exported isn't")
    async with _operations(config) as operations:
        lines = operations.export()
        if options.file == "-":
            async for line in lines:
                sys.stdout.buffer.write(line)
            return 0
        # Nothing that isn't whole takes the place of an earlier export.
        file = Path(options.file)
        new = file.with_name(f"{file.name}.new")
        try:
            with _named("where a file can be made", file):
                await _write(new, lines)
                new.replace(file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    return 0


async def _import(config: Config, options: argparse.Namespace) -> int:
    from server.admin.exports import max_line_bytes
    from server.admin.lines import split

    with _named("an export that can be read", options.file):
        source = (
            os.fdopen(os.dup(sys.stdin.fileno()), "rb")
            if options.file == "-"
            else open(options.file, "rb")  # noqa: ASYNC230, PTH123, SIM115
        )
    with source:
        async with _operations(config, makes_file=True) as operations:
            pieces = _pieces(iter(lambda: source.read(_PIECE_BYTES), b""))
            told = await operations.take(split(pieces, max_line_bytes(config)))
    problems = told.pop("problems")
    for problem in problems:
        _say(f"{options.file}: {problem}")
    print(", ".join(f"{name}: {count:,}" for name, count in told.items()))
    return int(bool(problems or told["refused"]))


async def _compact(config: Config, _: argparse.Namespace) -> int:
    from tiers.disk import compact

    async with _server(config) as client:
        if client is not None:
            told = await client.compact()
            before, after = told["before"], told["after"]
        else:
            before, after = compact(_file(config))
    print(f"{human_size(before)} before, {human_size(after)} after")
    return 0


async def _verify(config: Config, options: argparse.Namespace) -> int:
    from tiers.disk.maintenance import verify

    async with _server(config) as client:
        if client is None:
            told = verify(_file(config), repair=options.repair)._asdict()
        elif options.repair:
            raise AdminError(409, "stop the server first: it uses the file; or leave out --repair")
        else:
            told = await client.verify()
    if told["problem"] is not None:
        _say(f"the file can't be used: {told['problem']}")
        return 1
    dropped = " and dropped" if options.repair and told["damaged"] else ""
    print(f"{told['entries']:,} entries, {told['damaged']:,} damaged{dropped}")
    if told["entries"]:
        _say("what was purged or has expired counts until it gives way to something else")
    return int(bool(told["damaged"]) and not options.repair)


@asynccontextmanager
async def _operations(config: Config, *, makes_file: bool = False) -> AsyncIterator[Operations]:
    """Yield the operations through a server if one answers, else on the disk tier's file."""
    async with _server(config) as client:
        if client is not None:
            yield client
            return
        from server.admin.local import offline

        if makes_file and (disk := config.tiers.disk) is not None and disk.path is not None:
            _say(f"in {disk.path}, since no server answers at {config.admin.socket}")
        else:
            _file(config)
        async with offline(config) as administration:
            yield administration


@asynccontextmanager
async def _server(config: Config) -> AsyncIterator[Operations | None]:
    """Yield a client of the server, or `None` if none answers."""
    from server.admin.client import connected, is_answered
    from server.admin.exports import max_line_bytes

    path = config.admin.socket
    if path is None or not is_answered(path):
        yield None
        return
    _say(f"through the server at {path}")
    async with connected(path, max_line_bytes(config)) as client:
        yield client


def _file(config: Config) -> Path:
    """Return the folder of the disk tier's file, and say that it is used.

    Raises:
        AdminError: there is none.
    """
    nobody = f"no server answers at {config.admin.socket}"
    disk = config.tiers.disk
    if disk is None:
        raise AdminError(409, f"{nobody}, and there is no disk tier")
    if disk.path is None:
        raise AdminError(409, f"tiers.disk.path should be given: {NO_HOME}")
    if not (disk.path / "data.mdb").exists():
        raise AdminError(404, f"{nobody}, and there is no file of a disk tier in {disk.path}")
    _say(f"in {disk.path}, since {nobody}")
    return disk.path


@contextmanager
def _named(should: str, file: Path | str) -> Iterator[None]:
    """Have it said that FILE should be another where the system refuses it."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            raise
        raise OSError(f"FILE should be {should}, not {file}: {exc.strerror}") from exc


def _as_row(row: dict[str, Any]) -> str:
    return _ROW.format(
        row["key"], ",".join(row["tiers"]), row["bytes"], _duration(row["age_s"]),
        _duration(row["ttl_s"]), row["state"], row["frequency"],
    )  # fmt: skip


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


async def _write(file: Path, lines: AsyncIterator[bytes]) -> None:
    with open(file, "wb", opener=_private) as target:  # noqa: ASYNC230
        async for line in lines:
            target.write(line)


def _private(path: str, flags: int) -> int:
    # Answers are nobody else's business.
    return os.open(path, flags, 0o600)


async def _pieces(read: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in read:
        yield piece


def _say(text: str) -> None:
    print(text, file=sys.stderr)
