"""Results in files: `result.json`, and `records.npz` with all requests."""

import os
import platform
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import orjson
from pydantic import ValidationError

from server.bench.load import Load, Target
from server.bench.records import Integers, Records
from server.bench.results.objective import Objective
from server.bench.results.result_schema import Result
from server.config.base import ConfigError, expected

RESULT, RECORDS = "result.json", "records.npz"
"""Their names in the folder of `--out`."""
_MOST_RESULT_BYTES = 64 << 20
_MOST_RECORDS_BYTES = 8 << 30
"""Unpacked; a million requests of 128 tokens have 2.2 GB."""


@cache
def describe_machine() -> Mapping[str, str | int]:
    """Return what figures depend on: processor, cores that this process may use, system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was to be, as its result tells.

    Attributes:
        workload, digest, seed: the workload's. cache: `cold`, `warm` or `steady`.
        load: as it was offered. target: the endpoint; its headers stay secret.
        model: as requests named it. path: the route of requests.
    """

    workload: str
    digest: str
    seed: int
    cache: str
    load: Load
    target: Target
    model: str
    path: str
    objective: Objective | None = None
    machine: Mapping[str, str | int] = field(default_factory=describe_machine)

    def shown_url(self) -> str:
        """Return the endpoint's address without a password."""
        parts = urlsplit(self.target.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def write_json(content: Any, file: Path) -> None:
    """Write JSON, whole or not at all; NaN becomes null.

    Raises:
        ConfigError: the file can't be written.
    """
    with _written(file) as stream:
        stream.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))


def write_records(records: Records, file: Path) -> None:
    """Write all columns, whole or not at all, as numpy's `.npz`; gaps have single precision.

    Raises:
        ConfigError: the file can't be written.
    """
    columns = {f.name: getattr(records, f.name) for f in fields(records)}
    columns["gaps"] = columns["gaps"].astype(np.float32)
    columns["gap_row"] = columns["gap_row"].astype(np.int32)
    columns["outcomes"] = np.array(records.outcomes, dtype=np.str_)
    with _written(file) as stream:
        np.savez_compressed(stream, **columns)


@contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    """Give a stream whose content takes the file's place once it is whole."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as stream:
                yield stream
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as exc:
        raise ConfigError([f"--out: {file} can't be written: {exc.strerror or exc}"]) from exc


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was read back.

    Attributes:
        name: where it was read from. records: None where only `result.json` is left.
    """

    name: str
    result: dict[str, Any]
    records: Records | None


def read_run(path: Path) -> Run:
    """Return the run in a folder of `--out`, or in a `result.json` and what lies beside it.

    Raises:
        ConfigError: there is no such file, or it isn't a result of this version.
    """
    file = path / RESULT if path.is_dir() else path
    result = _read_result(file)
    beside = file.with_name(RECORDS)
    records = read_records(beside) if beside.exists() else None
    if records is not None and int((~records.probe).sum()) != result["whole"]["requests"]:
        raise ConfigError([f"{beside}: should be of the same run as {file.name} beside it"])
    return Run(str(path), result, records)


def _read_result(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_RESULT_BYTES + 1)
    except OSError as exc:
        raise ConfigError([f"{file}: can't be read: {exc.strerror or exc}"]) from exc
    if len(content) > _MOST_RESULT_BYTES:
        raise ConfigError([f"{file}: should have at most {_MOST_RESULT_BYTES >> 20} MiB"])
    try:
        result = orjson.loads(content)
        Result.model_validate(result)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        message = f"should be a result of tierserve bench: {place} {expected(first)}"
        raise ConfigError([f"{file}: {message}"]) from exc
    except ValueError as exc:
        raise ConfigError([f"{file}: should be JSON: {exc}"]) from exc
    found: dict[str, Any] = result
    return found


def read_records(file: Path) -> Records:
    """Return the requests of a run.

    Raises:
        ConfigError: the file is unreadable, damaged, or larger than anything that we write.
    """
    wanted = {f.name for f in fields(Records)}
    try:
        with zipfile.ZipFile(file) as packed:
            size = sum(each.file_size for each in packed.infolist())
        columns = {}
        if size <= _MOST_RECORDS_BYTES:
            with np.load(file, allow_pickle=False) as found:
                columns = {name: found[name] for name in wanted}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        message = f"{file}: should be the {RECORDS} of tierserve bench: {exc}"
        raise ConfigError([message]) from exc
    if not columns:
        raise ConfigError([f"{file}: should unpack to {_MOST_RECORDS_BYTES >> 30} GiB at most"])
    outcomes = columns.pop("outcomes")
    shapes = {column.shape for name, column in columns.items() if not name.startswith("gap")}
    fits = (
        len(shapes) == 1
        and columns["session"].ndim == outcomes.ndim == columns["gaps"].ndim == 1
        and columns["gaps"].shape == columns["gap_row"].shape
        and all(column.dtype.kind in "biuf" for column in columns.values())
        and _all_below(columns["gap_row"], len(columns["session"]))
        and _all_below(columns["outcome"], len(outcomes))
    )
    if not fits:
        raise ConfigError([f"{file}: should have columns that fit each other; it is damaged"])
    columns["gaps"] = columns["gaps"].astype(np.float64)
    columns["gap_row"] = columns["gap_row"].astype(np.int64)
    return Records(**columns, outcomes=[str(name) for name in outcomes])


def _all_below(numbers: Integers, limit: int) -> bool:
    return numbers.size == 0 or bool(numbers.min() >= 0 and numbers.max() < limit)
