"""The weights: where they are, and which commit of a hub's model they are.

A hub's model can change under its name. So its commit is looked up once, is part of every key, and
is what the engine is told to load.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from server.config import EMBEDDED, EMBEDDED_NAME, ConfigError, Model, cache_folder

logger = logging.getLogger(__name__)

_HUB_S = 5


class Weights(NamedTuple):
    """`source` is a folder or a hub's name, `revision` the commit of the latter where known."""

    source: str
    revision: str | None = None


def embedded_folder() -> Path:
    """Return where `scripts/prepare_model.py` puts the embedded model."""
    return cache_folder() / "models" / EMBEDDED_NAME


def locate(model: Model) -> Weights:
    """Find the weights that the configuration names; asks the hub where it names a hub's model.

    Raises:
        ConfigError: the weights aren't there, or `model.source` can't be a model.
    """
    source = str(embedded_folder()) if model.source == EMBEDDED else model.source
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return Weights(str(folder))
    if model.source == EMBEDDED:
        raise ConfigError(["model.source: the embedded model isn't prepared; run scripts/serve"])
    if folder.is_dir() or source.startswith(("/", "~", ".")):
        raise ConfigError([f"model.source: {source} should be a folder with a config.json"])
    return Weights(source, _commit(source, model.revision))


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit that the hub or else the local copy has under `revision`."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return HfApi().model_info(name, revision=revision, timeout=_HUB_S).sha
    except HFValidationError as exc:
        raise ConfigError(
            [f"model.source: should be {EMBEDDED!r}, a folder, or a hub's name, not {name!r}"]
        ) from exc
    except Exception as exc:  # noqa: BLE001
        # Which exceptions there are depends on the HTTP client that the hub's library uses.
        logger.info("the hub did not tell the commit of %s (%s)", name, type(exc).__name__)
    local = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(local, str):
        # …/snapshots/COMMIT/config.json
        return Path(local).parent.name
    logger.warning(
        "the commit of %s isn't known, so keys hold only its name; set model.version anew"
        " when the weights change", name,
    )  # fmt: skip
    return revision
