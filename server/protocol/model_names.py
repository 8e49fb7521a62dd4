"""The names by which clients may ask for models, and what each of them means."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from server.protocol.errors import BadRequestError


class UnknownModelError(BadRequestError):
    """No model has the name that was asked for."""

    status = 404


class ResolvedModel(NamedTuple):
    """What a name means."""

    name: str
    """By which the engine knows it: the name of a model, or of one of its adapters."""
    identity: str
    """What gives its answers now (`server.engine.identity`)."""
    is_vllm: bool
    """Whether a vLLM of the version that we know answers, so that we know what each field does."""
    encodings_agree: bool
    """Whether a body and a stream of it hold the same text."""
    always_counts_tokens: bool
    """Whether each of its streams has token counts, asked for or not."""


class ModelNames:
    """All names at one moment. Never changed once made; two are equal if they are the same object.

    Args:
        meanings: by name; the first is what a request means that names no model.
    """

    def __init__(self, meanings: Mapping[str, ResolvedModel]) -> None:
        self._meanings = dict(meanings)
        self.default = next(iter(self._meanings.values()))

    @property
    def is_single(self) -> bool:
        """Whether there is no choice."""
        return len(self._meanings) == 1

    def resolve(self, asked: Any) -> ResolvedModel:
        """Return what a request's `model` means, which may be missing.

        What isn't text is an engine's to refuse, in its own words.

        Raises:
            UnknownModelError: nothing has this name; the text is vLLM's.
        """
        if not asked or not isinstance(asked, str):
            return self.default
        if (named := self._meanings.get(asked)) is None:
            raise UnknownModelError(
                f"The model `{asked}` does not exist. Valid aliases: {', '.join(self._meanings)}.",
                "model",
            )
        return named
