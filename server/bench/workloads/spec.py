"""The text that names a workload: `NAME:option=value,…`, `NAME:FILE,option=value,…` or `FILE,…`.

A file without a name is one of the formats that its first object or row tells.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from server.bench.workloads.agents import AgentOptions, Agents
from server.bench.workloads.base import BuiltWorkload, EndlessWorkload, Options
from server.bench.workloads.chats import ChatOptions, Chats, ConversationOptions
from server.bench.workloads.files.batch import Batch, BatchOptions
from server.bench.workloads.files.block_traces import Bailian, Mooncake
from server.bench.workloads.files.finite import FiniteWorkload
from server.bench.workloads.files.length_traces import Azure, BurstGpt
from server.bench.workloads.files.own_trace import OwnTrace, OwnTraceOptions
from server.bench.workloads.files.pieces import pieces, problem, require_file, unreadable
from server.bench.workloads.files.prompts import (
    Custom,
    CustomOptions,
    MtBench,
    MtBenchOptions,
    ShareGpt,
    ShareGptOptions,
)
from server.bench.workloads.files.trace_prompts import TraceOptions
from server.bench.workloads.prefixes import SharedPrefixes, SharedPrefixOptions
from server.bench.workloads.requests import Common
from server.bench.workloads.texts import MT_BENCH
from server.bench.workloads.zipf import Search, SearchOptions, Zipf, ZipfOptions
from server.config.base import ConfigError, expected
from server.config.environment import hint

_MADE: Mapping[str, tuple[type[EndlessWorkload[Any]], type[Options]]] = MappingProxyType(
    {
        "zipf": (Zipf, ZipfOptions),
        "search": (Search, SearchOptions),
        "prefix": (SharedPrefixes, SharedPrefixOptions),
        "chat": (Chats, ChatOptions),
        "conversation": (Chats, ConversationOptions),
        "agents": (Agents, AgentOptions),
    }
)
_READ: Mapping[str, tuple[type[FiniteWorkload[Any]], type[Options]]] = MappingProxyType(
    {
        "mtbench": (MtBench, MtBenchOptions),
        "sharegpt": (ShareGpt, ShareGptOptions),
        "batch": (Batch, BatchOptions),
        "custom": (Custom, CustomOptions),
        "mooncake": (Mooncake, TraceOptions),
        "bailian": (Bailian, TraceOptions),
        "azure": (Azure, TraceOptions),
        "burstgpt": (BurstGpt, TraceOptions),
        "trace": (OwnTrace, OwnTraceOptions),
    }
)
NAMES: Mapping[str, type[Options]] = MappingProxyType(
    {name: options for name, (_, options) in (*_MADE.items(), *_READ.items())}
)
"""The names of all workloads, with their options."""
_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "sharegpt": frozenset({"conversations"}),
        "batch": frozenset({"url", "body"}),
        # Bailian's have the same fields and more.
        "bailian": frozenset({"chat_id", "hash_ids"}),
        "mooncake": frozenset({"timestamp", "hash_ids"}),
        "trace": frozenset({"time", "outcome"}),
        "mtbench": frozenset({"turns"}),
        "custom": frozenset({"prompt"}),
        "azure": frozenset(Azure.columns),
        "burstgpt": frozenset(BurstGpt.columns),
    }
)
"""By which fields a format is known; the first one that fits."""
_is_option = re.compile(r"[a-z_]+=.*", re.DOTALL).fullmatch
_EOS_ROUTES = ("chat", "completions", "responses")


def build(spec: str, common: Common) -> BuiltWorkload[Any]:
    """Return the workload that a text names.

    Args:
        spec: such as `zipf:s=1.1,unique=0.2`, `mooncake:FILE,scale=0.1` or `FILE`.
        common: what all its requests have in common.

    Raises:
        ConfigError: there is none of that name, or an option or its file is wrong.
    """
    if common.ignore_eos and common.route not in _EOS_ROUTES:
        should = f"should be left out, or --route be one of {', '.join(_EOS_ROUTES)}"
        raise ConfigError([f"--ignore-eos: {should}, not {common.route}"])
    kind, _, rest = spec.partition(":")
    if kind not in NAMES:
        return _of_file(spec, common)
    path, given = _split(rest)
    options = _parse_options(kind, NAMES[kind], given)
    if kind in _MADE:
        if path:
            should = "should have parts such as OPTION=VALUE, with commas between them"
            raise ConfigError([f"--workload: {kind}: {should}; not {path!r}"])
        return _MADE[kind][0](spec, kind, options, common)
    if not path and kind != "mtbench":
        raise ConfigError([f"--workload: {kind}: should name a file: {kind}:FILE"])
    return _read(spec, kind, options, common, Path(path) if path else MT_BENCH)


def _of_file(spec: str, common: Common) -> BuiltWorkload[Any]:
    text, given = _split(spec)
    path = Path(text)
    try:
        path.stat()
    except OSError as exc:
        if text in NAMES:
            should = f"should have a colon before its options: {text}:{','.join(given)}"
            raise ConfigError([f"--workload: {text}: {should}"]) from exc
        near = hint(spec.partition(":")[0], NAMES)
        should = f"should be a file, or the name of a workload; not {text!r}: {near}"
        raise ConfigError([f"--workload: {should}"]) from exc
    require_file(path)
    kind = _format(path)
    options = _parse_options(kind, NAMES[kind], given)
    return _read(spec, kind, options, common, path)


def _read(spec: str, kind: str, options: Options, common: Common, path: Path) -> BuiltWorkload[Any]:
    require_file(path)
    return _READ[kind][0](spec, kind, options, common, path)


def _split(text: str) -> tuple[str, list[str]]:
    """Return a path, which may have commas, and the options after it."""
    parts = text.split(",") if text else []
    first = len(parts)
    while first and _is_option(parts[first - 1]):
        first -= 1
    return ",".join(parts[:first]), parts[first:]


def _parse_options(kind: str, options: type[Options], given: list[str]) -> Options:
    values: dict[str, str] = {}
    for part in given:
        name, _, value = part.partition("=")
        if name in values:
            raise ConfigError([f"--workload: {kind}: {name} should be given once"])
        values[name] = value
    try:
        return options.model_validate(values)
    except ValidationError as exc:
        raise ConfigError([_mistake(kind, options, error) for error in exc.errors()]) from exc


def _mistake(kind: str, options: type[Options], error: Any) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = options.model_fields
        more = hint(name, known) if known else "there are none"
        return f"--workload: {kind}: unknown option {name!r}; {more}"
    return f"--workload: {kind}: {name} {expected(error)}, not {error['input']!r}"


def _format(path: Path) -> str:
    """Return the name of the format of a file."""
    fields = _columns(path) if path.suffix == ".csv" else _first_fields(path)
    for kind, known in _FIELDS.items():
        if known <= fields:
            return kind
    should = "; or ".join(", ".join(sorted(each)) for each in _FIELDS.values())
    raise problem(path, f"should have fields {should}; or name its format: FORMAT:FILE")


def _first_fields(path: Path) -> frozenset[str]:
    first = next(pieces(path), None)
    return frozenset() if first is None else frozenset(first.fields)


def _columns(path: Path) -> frozenset[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return frozenset(next(csv.reader(file), ()))
    except OSError as exc:
        raise unreadable(path, exc) from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise problem(path, f"should be CSV: {exc}") from exc
