"""Folders that are made because the configuration names them."""

import logging
from pathlib import Path

from server.config import cache_folder

logger = logging.getLogger(__name__)


def say_if_new(field: str, folder: Path) -> None:
    """Log that a folder is about to be made, which may be a slip of who wrote `field`.

    Nobody wrote the cache folder.
    """
    if not folder.exists() and not folder.is_relative_to(cache_folder()):
        there = next((each for each in folder.parents if each.exists()), folder)
        logger.info("%s: makes %s in %s", field, folder.relative_to(there), there)
