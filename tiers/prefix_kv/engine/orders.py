"""What an engine's scheduler and its workers tell each other at each step."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tiers.prefix_kv.record import BlockChain
from tiers.prefix_kv.store import Location


class LoadOrder(NamedTuple):
    """Blocks to load for a request."""

    request: str
    block_ids: list[int]
    """Where they go in the engine's cache."""
    locations: list[list[Location]]
    """Where they are, for each worker."""
    deadline_s: float


class SaveOrder(NamedTuple):
    """A block to store."""

    block_id: int
    """Where it is in the engine's cache."""
    chain: BlockChain
    at: int
    requests: int
    """How often it was requested lately."""
    purge_epoch: int


@dataclass(slots=True)
class StepOrders:
    """Orders of one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Requests that wait for a load which could not be ordered, and have to be told so."""
    new_block_ids: list[int] = field(default_factory=list)
    """Blocks whose contents the step may overwrite."""
