"""Logs on standard error: text on a terminal, JSON lines elsewhere."""

import asyncio
import logging
import sys
import time
from functools import lru_cache
from typing import NamedTuple

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from server.config import Log

_FLUSH_S = 0.2
_BATCH = 256


def configure(log: Log) -> None:
    """Set up logging for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    if _is_json(log):
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(OrjsonFormatter(fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)


class Access(NamedTuple):
    """One answered request: when it ended (Unix s), what it was, and the seconds it took."""

    at: float
    method: str
    path: str
    status: int
    request_id: str
    tier: str
    outcome: str
    seconds: float


class AccessLog:
    """One line for each answered request, among the logs and in their format.

    Lines are made and written in batches, without `logging`, which would cost more than a hit.
    """

    def __init__(self, log: Log) -> None:
        self._enabled = logging.getLogger().isEnabledFor(logging.INFO)
        self._line = _json_line if _is_json(log) else _text_line
        self._waiting: list[Access] = []

    def add(self, access: Access) -> None:
        """Note a request; its line is written within a fraction of a second."""
        if not self._enabled:
            return
        if not self._waiting:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._waiting.append(access)
        if len(self._waiting) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._waiting:
            lines = b"\n".join(map(self._line, self._waiting)) + b"\n"
            self._waiting.clear()
            sys.stderr.flush()
            sys.stderr.buffer.write(lines)
            sys.stderr.buffer.flush()


def _json_line(access: Access) -> bytes:
    return orjson.dumps(
        {
            "asctime": _stamp(access.at), "levelname": "INFO", "name": "tierserve.access",
            "message": f"{access.method} {access.path} {access.status}",
            "request_id": access.request_id, "tier": access.tier, "outcome": access.outcome,
            "ms": round(access.seconds * 1000, 3),
        }
    )  # fmt: skip


def _text_line(access: Access) -> bytes:
    # A path may hold any character, those that end a line included.
    line = (
        f"{_stamp(access.at)} INFO    tierserve.access: {access.method} {access.path!a}"
        f" {access.status} {access.tier} {access.outcome} {access.seconds * 1000:.3f} ms"
        f" {access.request_id}"
    )
    return line.encode()


def _stamp(at: float) -> str:
    return f"{_second(int(at))},{int(at % 1 * 1000):03d}"


@lru_cache(2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _is_json(log: Log) -> bool:
    return log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
