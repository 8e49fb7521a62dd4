"""The names of models: a client's name for one, and the model that it means."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from server.protocol.errors import BadRequestError


class UnknownModelError(BadRequestError):
    """No model has the name that a request gives."""

    status = 404


class ResolvedModel(NamedTuple):
    """The model that a name means."""

    name: str
    """The engine's name of the model, or of one of its adapters."""
    identity: str
    """Identifies what generates its answers now (`server.engine.identity`)."""
    is_vllm: bool
    """Whether its engine is a vLLM of the version that we know, so that we know what each field of
    a request does."""
    encodings_agree: bool
    """Whether its JSON bodies and its streams hold the same text."""
    always_counts_tokens: bool
    """Whether each of its streams has token counts, asked for or not."""


class ModelNames:
    """All names at one moment. It never changes; two are equal only if they are the same object.

    Args:
        meanings: the models by name; the first is the default.
    """

    def __init__(self, meanings: Mapping[str, ResolvedModel]) -> None:
        self._meanings = dict(meanings)
        self.default = next(iter(self._meanings.values()))
        self.are_vllm = all(model.is_vllm for model in self._meanings.values())
        """Whether each means a vLLM that we know, so that no header is part of a key."""

    @property
    def is_single(self) -> bool:
        """Whether there is only one name."""
        return len(self._meanings) == 1

    def resolve(self, asked: Any) -> ResolvedModel:
        """Return the model that a request's `model` means; the default one if it is missing.

        A value that isn't text means that one, too: an engine refuses it in its own words.

        Raises:
            UnknownModelError: no model has this name; the text is vLLM's.
        """
        if not asked or not isinstance(asked, str):
            return self.default
        if (model := self._meanings.get(asked)) is None:
            raise UnknownModelError(
                f"The model `{asked}` does not exist. Valid aliases: {', '.join(self._meanings)}.",
                "model",
            )
        return model
