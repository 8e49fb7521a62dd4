"""The command `tierserve cache`: the operations on a running server or on its disk tier's file."""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from server.admin.audited import AuditedOperations
from server.admin.operations import MAX_PAGE, AdminError, AdminOperations, EntryQuery
from server.admin.prefix_tables import PREFIX_TIER, chain_table, prefix_tables
from server.audit.actor import HOST
from server.audit.acts import open_audit
from server.config.folders import NO_HOME
from server.config.schema import Config
from server.terminal import duration, human_size, table
from tiers.disk import OtherFormatError, UntrustedError

_CHUNK_BYTES = 64 * 1024
_ROW = "{:<64}  {:<11}  {:>9}  {:>9}  {:>9}  {:<8}  {:>5}"
_MAX_SHOWN = 3


def run(config: Config, options: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 1 for a failure, 2 for wrong arguments."""
    actions: dict[str, Callable[[Config, argparse.Namespace], Awaitable[int]]] = {
        "stats": _stats, "ls": _ls, "get": _get, "purge": _purge, "warm": _warm,
        "export": _export, "import": _import, "compact": _compact, "verify": _verify,
    }  # fmt: skip
    try:
        return asyncio.run(_awaited(actions[options.action](config, options)))
    except AdminError as exc:
        _print_note(str(exc))
        return 2 if exc.status == 400 else 1
    except (OtherFormatError, UntrustedError) as exc:
        _print_note(f"the file can't be used: {exc}")
        return 1
    except BrokenPipeError:
        # The reader of our output has closed it, which is no failure.
        raise
    except OSError as exc:
        # Without the error's number.
        file = f"{exc.filename}: " if exc.filename else ""
        _print_note(f"{file}{exc.strerror or exc}")
        return 1


async def _awaited(action: Awaitable[int]) -> int:
    return await action


async def _stats(config: Config, options: argparse.Namespace) -> int:
    async with _operations(config) as operations:
        stats = await operations.stats()
    if options.json:
        _print_json(stats)
        return 0
    tiers = stats["tiers"]
    # A column for each tier, a row for each name.
    flat = [each | {f"file_{n}": v for n, v in each.pop("file", {}).items()} for each in tiers]
    names = dict.fromkeys(name for each in flat for name in each if name != "tier")
    rows = [
        (name.replace("_", " "), *(_as_cell(name, each.get(name)) for each in flat))
        for name in names
    ]
    print(*table(("", *(each["tier"] for each in flat)), rows), sep="\n")
    if (prefix := stats.get("prefix")) is not None:
        print("", *prefix_tables(prefix), sep="\n")
    return 0


async def _ls(config: Config, options: argparse.Namespace) -> int:
    if options.tier == PREFIX_TIER:
        return await _ls_chains(config, options)
    limit = MAX_PAGE if options.all else min(options.limit, MAX_PAGE)
    query = EntryQuery(options.tier, options.prefix, options.label, limit, options.after)
    left = None if options.all else options.limit
    async with _operations(config) as operations:
        page = await operations.page(query)
        if not options.json:
            print(_ROW.format("key", "tiers", "bytes", "age", "ttl", "state", "freq."))
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
        _print_note(f"there may be more entries: --after {after}")
    return 0


async def _ls_chains(config: Config, options: argparse.Namespace) -> int:
    if options.prefix or options.after:
        raise AdminError(400, f"--prefix and --after are of entries, not of --tier {PREFIX_TIER}")
    limit = MAX_PAGE if options.all else min(options.limit, MAX_PAGE)
    async with _operations(config) as operations:
        chains = (await operations.chains(limit, options.label))["chains"]
    lines = (
        (orjson.dumps(each).decode() for each in chains) if options.json else chain_table(chains)
    )
    for line in lines:
        print(line)
    return 0


async def _get(config: Config, options: argparse.Namespace) -> int:
    async with _operations(config) as operations:
        entry = await operations.entry(options.key)
    if options.json:
        _print_json(entry)
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
    if kind == ALL and not options.yes and sys.stdin.isatty() and not _confirm():
        _print_note("nothing was purged")
        return 1
    if kind == "model":
        names = _model_names(config, names)
    async with _operations(config) as operations:
        purged = await operations.purge(kind, names)
    what = "everything" if kind == ALL else ", ".join(purged[:_MAX_SHOWN])
    more = f" and {len(purged) - _MAX_SHOWN:,} more" if len(purged) > _MAX_SHOWN else ""
    _print_note(f"purged {what}{more}: no entry from before the purge is served any more")
    return 0


def _confirm() -> bool:
    print("Purge everything? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _model_names(config: Config, names: list[str]) -> list[str]:
    """Return the names that labels have for these models, aliases and adapters."""
    label_names = dict(pair for n, m in config.models.items() for pair in m.asked_as(n))
    for name in names:
        if name not in label_names:
            _print_note(f"note: the configuration has no model or adapter {name}")
    return [label_names.get(name, name) for name in names]


async def _warm(config: Config, options: argparse.Namespace) -> int:
    from server.admin.warm import warm

    with _explain_file("a readable JSONL file", options.file):
        result = await warm(config, options.file, options.concurrency, _print_note)
    counts = {name.replace("_", " "): count for name, count in result._asdict().items()}
    _print_counts(counts)
    return int(bool(result.errors or result.malformed))


async def _export(config: Config, options: argparse.Namespace) -> int:
    disk = config.tiers.disk
    if disk is not None and (disk.encryption_key or disk.encryption_key_file):
        _print_note("note: the disk tier is encrypted, but the export is not")
    async with _operations(config) as operations, aclosing(operations.export()) as lines:
        if options.file == "-":
            async for line in lines:
                sys.stdout.buffer.write(line)
            return 0
        # An earlier export stays until the new one is complete.
        file = Path(options.file)
        new = file.with_name(f"{file.name}.new")
        try:
            with _explain_file("a writable path", file):
                await _write(new, lines)
                new.replace(file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    return 0


async def _import(config: Config, options: argparse.Namespace) -> int:
    from server.admin.export_format import max_line_bytes, split_lines

    with _explain_file("a readable export", options.file):
        source: BinaryIO = (
            os.fdopen(os.dup(sys.stdin.fileno()), "rb")
            if options.file == "-"
            else open(options.file, "rb")  # noqa: ASYNC230, PTH123, SIM115
        )
    with source:
        async with _operations(config, creates_file=True) as operations:
            lines = split_lines(_chunks(source), max_line_bytes(config))
            result = await operations.import_(lines)
    problems = result.pop("problems")
    for problem in problems:
        _print_note(f"{options.file}: {problem}")
    _print_counts(result)
    return int(bool(problems or result["refused"]))


async def _compact(config: Config, _: argparse.Namespace) -> int:
    from tiers.disk import compact

    async with _server(config) as client:
        if client is not None:
            sizes = await client.compact()
            before, after = sizes["before"], sizes["after"]
            print(f"{human_size(before)} before, {human_size(after)} after")
            return 0
    from server.admin.local import has_disk_file, has_prefix_files, open_prefix_tier
    from tiers import Purges

    with open_audit(config.log.audit) as audit:
        async with audit.act("compact", HOST, {}):
            if has_disk_file(config) or not has_prefix_files(config):
                before, after = compact(_folder(config))
                print(f"{human_size(before)} before, {human_size(after)} after")
            async with open_prefix_tier(config, Purges()) as tier:
                if tier is not None:
                    saved = await tier.compact()
                    print(f"prefixes: {human_size(saved)} less")
    return 0


async def _verify(config: Config, options: argparse.Namespace) -> int:
    async with _server(config) as client:
        if client is None and options.repair:
            with open_audit(config.log.audit) as audit:
                async with audit.act("repair", HOST, {}) as act:
                    result = await _verify_files(config, repair=True)
                    act.count = {"dropped": _damaged(result)}
        elif client is None:
            result = await _verify_files(config, repair=False)
        elif options.repair:
            raise AdminError(409, "stop the server first: it uses the file; or leave out --repair")
        else:
            result = await client.verify()
    if result.get("problem") is not None:
        _print_note(f"the file can't be used: {result['problem']}")
        return 1
    damaged = result.get("damaged", 0)
    if "entries" in result:
        print(f"{result['entries']:,} entries, {damaged:,} damaged{_dropped(damaged, options)}")
        if result["entries"]:
            _print_note("purged and expired entries count until others take their place")
    if (prefix := result.get("prefix")) is not None:
        blocks, bad = prefix["blocks"], prefix["damaged"]
        print(f"{blocks:,} blocks of prefixes, {bad:,} damaged{_dropped(bad, options)}")
        damaged += bad
    return int(bool(damaged) and not options.repair)


def _damaged(result: dict[str, Any]) -> int:
    prefix = result.get("prefix") or {}
    return int(result.get("damaged", 0)) + int(prefix.get("damaged", 0))


def _dropped(damaged: int, options: argparse.Namespace) -> str:
    return " and dropped" if options.repair and damaged else ""


async def _verify_files(config: Config, *, repair: bool) -> dict[str, Any]:
    from server.admin.local import has_disk_file, has_prefix_files, open_prefix_tier
    from tiers import Purges
    from tiers.disk.maintenance import verify

    result: dict[str, Any] = {}
    if has_disk_file(config) or not has_prefix_files(config):
        result = verify(_folder(config), repair=repair)._asdict()
    async with open_prefix_tier(config, Purges()) as tier:
        if tier is not None:
            result["prefix"] = await tier.verify(repair=repair)
    return result


@asynccontextmanager
async def _operations(
    config: Config, *, creates_file: bool = False
) -> AsyncIterator[AdminOperations]:
    """Yield the operations of a server if one answers, else those on the disk tier's file."""
    async with _server(config) as client:
        if client is not None:
            yield client
            return
        from server.admin.local import has_disk_file, has_prefix_files, open_local

        # Looking at prefixes makes no disk tier's file.
        with_disk = creates_file or has_disk_file(config) or not has_prefix_files(config)
        if creates_file and (disk := config.tiers.disk) is not None and disk.path is not None:
            _print_folder(disk.path, config)
        elif with_disk:
            _folder(config)
        with open_audit(config.log.audit) as audit:
            async with open_local(config, with_disk=with_disk) as operations:
                yield AuditedOperations(operations, audit, HOST)


@asynccontextmanager
async def _server(config: Config) -> AsyncIterator[AdminOperations | None]:
    """Yield a client of the server, or `None` if none answers."""
    from server.admin.client import connect, is_answering
    from server.admin.export_format import max_line_bytes

    path = config.admin.socket
    if path is None or not is_answering(path):
        yield None
        return
    _print_note(f"using the server at {path}")
    async with connect(path, max_line_bytes(config)) as client:
        yield client


def _folder(config: Config) -> Path:
    """Return the folder of the disk tier's file, after having printed it.

    Raises:
        AdminError: there is no such file.
    """
    no_server = f"no server answers at {config.admin.socket}"
    disk = config.tiers.disk
    if disk is None:
        raise AdminError(409, f"{no_server}, and there is no disk tier")
    if disk.path is None:
        raise AdminError(409, f"tiers.disk.path should be given: {NO_HOME}")
    if not (disk.path / "data.mdb").exists():
        raise AdminError(404, f"{no_server}, and there is no disk tier's file in {disk.path}")
    _print_folder(disk.path, config)
    return disk.path


def _print_folder(folder: Path, config: Config) -> None:
    _print_note(f"using the file in {folder}: no server answers at {config.admin.socket}")


@contextmanager
def _explain_file(should_be: str, file: Path | str) -> Iterator[None]:
    """Have an `OSError` explain what the argument FILE should be."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            raise
        raise OSError(f"FILE should be {should_be}, not {file}: {exc.strerror}") from exc


def _as_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return human_size(value) if "bytes" in name else f"{value:,}"


def _as_row(row: dict[str, Any]) -> str:
    return _ROW.format(
        row["key"], ",".join(row["tiers"]), row["bytes"], duration(row["age_s"]),
        duration(row["ttl_s"]), row["state"], row["frequency"],
    )  # fmt: skip


async def _write(file: Path, lines: AsyncIterator[bytes]) -> None:
    with open(file, "wb", opener=_open_private) as target:  # noqa: ASYNC230
        async for line in lines:
            target.write(line)


def _open_private(path: str, flags: int) -> int:
    # Only this user may read the answers.
    return os.open(path, flags, 0o600)


async def _chunks(source: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk


def _print_counts(counts: dict[str, int]) -> None:
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))


def _print_json(value: Any) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _print_note(text: str) -> None:
    print(text, file=sys.stderr)
