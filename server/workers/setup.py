"""What a worker is told at its start: a pickle on its standard input, which stays open.

The configuration comes from the master, not from the file, which may have changed meanwhile. JSON
would not hold all that a file may: an engine's options have any keys and numbers.
"""

import pickle
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Self

import orjson
from pydantic import TypeAdapter

from server.auth.tenants import TenantRecord
from server.config.schema import Config
from server.engine.followed import ModelReport

_records = TypeAdapter(dict[str, TenantRecord])


@dataclass(frozen=True, slots=True)
class Setup:
    """The start of one worker. Files are numbers of inherited file descriptors."""

    number: int
    """From 0; a worker that replaces another has its number."""
    config: Config
    """Its part: models are as the engines' process knows them, sizes are this worker's."""
    records: Mapping[str, TenantRecord]
    """The tenants now."""
    models: Sequence[ModelReport]
    started_at: float
    """When the server began (Unix s)."""
    door: int
    counters: int
    listeners: Sequence[int]

    def pickled(self) -> bytes:
        """Return what `read` reads, with all secrets."""
        return pickle.dumps(self)

    @classmethod
    def read(cls, source: BinaryIO) -> Self:
        """Return the setup that the master has written there."""
        setup: Self = pickle.load(source)  # noqa: S301
        return setup


def dump_config(config: Config) -> str:
    """Return a configuration with all secrets, for `load_config`."""
    return b64encode(pickle.dumps(config)).decode()


def load_config(text: str) -> Config:
    """Return the configuration that `dump_config` gave."""
    config: Config = pickle.loads(b64decode(text))  # noqa: S301
    return config


def dump_records(records: Mapping[str, TenantRecord]) -> orjson.Fragment:
    """Return tenants as JSON, whose numbers may be beyond those of orjson."""
    return orjson.Fragment(_records.dump_json({**records}))


def load_records(body: bytes) -> dict[str, TenantRecord]:
    """Return the tenants that `dump_records` gave."""
    return _records.validate_json(body)
