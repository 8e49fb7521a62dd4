"""Logs on standard error: text on a terminal, JSON lines elsewhere."""

import logging
import sys

from pythonjsonlogger.orjson import OrjsonFormatter

from server.config import Log


def configure(log: Log) -> None:
    """Set up logging for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    if log.format == "json" or (log.format == "auto" and not sys.stderr.isatty()):
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(OrjsonFormatter(fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)
