"""The prefix tier as `tierserve cache` prints it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.terminal import duration, human_size, table

PREFIX_TIER = "prefix"
"""What `tierserve cache ls --tier` calls it."""
_CHAIN = "{:<16}  {:>6}  {:>8}  {:>9}  {:>8}  {:>9}  {}"


def prefix_tables(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of its numbers, and of the counters of each model."""
    numbers = {name: value for name, value in report.items() if name != "counters"}
    lines = [] if numbers.pop("available") else ["the prefix tier can't be read"]
    lines += table(
        ("", PREFIX_TIER),
        [
            (_words(name), human_size(value) if "bytes" in name else f"{value:,}")
            for name, value in numbers.items()
        ],
    )
    counters: Mapping[str, Mapping[str, float]] = report["counters"]
    if names := dict.fromkeys(name for of_model in counters.values() for name in of_model):
        rows = [
            (_words(name), *(f"{each.get(name, 0):,.0f}" for each in counters.values()))
            for name in names
        ]
        lines += ["", *table(("", *counters), rows)]
    return lines


def chain_table(chains: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a list of chains."""
    yield _CHAIN.format("last block", "blocks", "tokens", "bytes", "priority", "ttl", "labels")
    for chain in chains:
        yield _CHAIN.format(
            chain["key"][-16:], chain["blocks"], chain["tokens"], human_size(chain["bytes"]),
            f"{chain['priority']:.0f}", duration(chain["ttl_s"]), ", ".join(chain["labels"]),
        )  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ")
