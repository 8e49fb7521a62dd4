"""Which way dependencies point: read from the syntax tree, so that no import escapes."""

import ast
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

import tiers

HTTP = {
    "admin/api",
    "admin/client",
    "admin/listener",
    "admin/warm",
    "app",
    "cors",
    "destination",
    "door",
    "http_request",
    "listener",
    "middleware",
    "model_list",
    "openai",
    "others",
    "pages/document",
    "pages/files",
    "pages/overview",
    "pages/resource",
    "passthrough",
    "record",
    "responses",
    "tracing",
    "upstream",
    "websocket",
}

ENTRANCES = {
    "server.pages": ("server/pages/", "server/app.py"),
    "server.admin": ("server/admin/", "server/app.py", "server/cli.py"),
    "server.simulation": ("server/simulation/", "server/cli.py"),
}
"""Who alone may import a subpackage: what serves doesn't know what looks at it."""


def imported_by(file: Path) -> set[str]:
    """Return the dotted names that a file imports, and the packages they are in."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {part for name in names for part in accumulate(name.split("."), "{}.{}".format)}


FILES = [*Path("server").rglob("*.py"), *Path("tiers").rglob("*.py")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_dependencies_point_one_way(file: Path) -> None:
    imports = imported_by(file)
    assert not imports & {"vllm", "torch"}
    assert ("lmdb" in imports) <= (file.parent == Path("tiers/disk"))
    assert ("cryptography" in imports) <= (file == Path("tiers/disk/encryption.py"))
    assert bool({"redis", "aiomcache"} & imports) <= (file.parent == Path("tiers/shared"))
    assert ("aiohttp" in imports) <= (str(file.with_suffix("")).removeprefix("server/") in HTTP)
    assert ("opentelemetry" in imports) <= (file == Path("server/web/tracing.py"))
    for package, entrances in ENTRANCES.items():
        assert package not in imports or str(file).startswith(entrances)
    if file.parts[0] == "tiers":
        assert not imports & {"server", "pydantic", "yaml", "prometheus_client"}


def test_what_tiers_offers() -> None:
    assert sorted(tiers.__all__) == [
        "Adoption", "Answer", "Chain", "Copies", "Demotion", "DiskCache", "Entry", "FileLeases",
        "Flight", "Flights", "Form", "FrequencySketch", "Freshness", "Hit", "MemoryCache",
        "Movement", "Origin", "PurgeError", "Purges", "State", "Tier", "Turns", "Write", "digest",
    ]  # fmt: skip


def test_what_serves_without_tracing_does_not_import_it() -> None:
    program = "import server.app, sys; sys.exit('server.web.tracing' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
