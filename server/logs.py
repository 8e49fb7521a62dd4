"""Logs on standard error: text on a terminal, JSON lines elsewhere."""

import asyncio
import logging
import sys
import time

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from server.config import Log

_FLUSH_S = 0.2
_BUFFER_LINES = 1024


def configure(log: Log) -> None:
    """Set up logging for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    if _is_json(log):
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(OrjsonFormatter(fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)


class AccessLog:
    """One line for each answered request, among the logs and in their format.

    Lines are written in batches and without `logging`, which costs more than a hit.
    """

    def __init__(self, log: Log) -> None:
        self._enabled = logging.getLogger().isEnabledFor(logging.INFO)
        self._json = _is_json(log)
        self._lines: list[bytes] = []
        self._second, self._stamp = 0, ""

    def add(
        self, method: str, path: str, status: int, id_: str, tier: str, outcome: str, seconds: float
    ) -> None:
        """Note a request that took `seconds`; the line is written within a fraction of one."""
        if not self._enabled:
            return
        line: bytes
        if self._json:
            line = orjson.dumps(
                {
                    "asctime": self._now(), "levelname": "INFO", "name": "tierserve.access",
                    "message": f"{method} {path} {status}", "request_id": id_, "tier": tier,
                    "outcome": outcome, "ms": round(seconds * 1000, 3),
                }
            )  # fmt: skip
        else:
            # A path may hold any character, those that end a line included.
            text = f"{method} {path!a} {status} {tier} {outcome} {seconds * 1000:.3f} ms {id_}"
            line = f"{self._now()} INFO    tierserve.access: {text}".encode()
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._lines.append(line)
        if len(self._lines) >= _BUFFER_LINES:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._lines:
            sys.stderr.flush()
            sys.stderr.buffer.write(b"\n".join(self._lines) + b"\n")
            sys.stderr.buffer.flush()
            self._lines.clear()

    def _now(self) -> str:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return f"{self._stamp},{int(now % 1 * 1000):03d}"


def _is_json(log: Log) -> bool:
    return log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
