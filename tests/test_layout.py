"""Which way dependencies point: read from the syntax tree, so that no import escapes."""

import ast
from pathlib import Path

import pytest

import tiers

HTTP = {
    "admin",
    "admin_client",
    "admin_listener",
    "app",
    "http_request",
    "listener",
    "middleware",
    "openai",
    "passthrough",
    "record",
    "responses",
    "upstream",
    "warm",
    "websocket",
}


def imported_by(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


FILES = [*Path("server").rglob("*.py"), *Path("tiers").rglob("*.py")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_dependencies_point_one_way(file: Path) -> None:
    imports = imported_by(file)
    assert not imports & {"vllm", "torch"}
    assert ("lmdb" in imports) <= (file.parent == Path("tiers/disk"))
    assert bool({"redis", "aiomcache"} & imports) <= (file.parent == Path("tiers/shared"))
    assert ("aiohttp" in imports) <= (file.parent.name == "server" and file.stem in HTTP)
    if file.parts[0] == "tiers":
        assert not imports & {"server", "pydantic", "yaml", "prometheus_client"}


def test_what_tiers_offers() -> None:
    assert sorted(tiers.__all__) == [
        "Adoption", "Answer", "Chain", "Copies", "Demotion", "DiskCache", "Entry", "FileLeases",
        "Flight", "Flights", "Form", "FrequencySketch", "Freshness", "Hit", "MemoryCache",
        "Movement", "Origin", "PurgeError", "Purges", "State", "Tier", "Turns", "Write", "digest",
    ]  # fmt: skip
