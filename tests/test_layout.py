"""Which way dependencies point: read from the syntax tree, so that no import escapes."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

import tiers

LAYERS = (
    ("server.cli",),
    ("server.check",),
    ("server.workers",),
    ("server.app",),
    ("server.router",),
    (
        "server.handlers",
        "server.admin",
        "server.pages",
        "server.simulation",
        "server.bench",
        "server.preparation",
    ),
    ("server.prefix_tier",),
    ("server.web", "server.engine", "server.cache"),
    ("server.audit",),
    ("server.telemetry",),
    ("server.protocol",),
    ("server.auth",),
    ("server.config",),
    ("tiers",),
)
"""From top to bottom: a module imports from its own package and from layers below it."""
ANYWHERE = ("server.terminal", "server.process")
"""What knows nothing of the rest."""
TIERS = (
    ("tiers.answer_cache", "tiers.background"),
    ("tiers.singleflight",),
    ("tiers.chain",),
    ("tiers.movement", "tiers.shared"),
    ("tiers.tier", "tiers.prefix_kv"),
    ("tiers.purges",),
    ("tiers.memory", "tiers.disk"),
    ("tiers.backend", "tiers.policies"),
    ("tiers.acceptance",),
    (
        "tiers.entry",
        "tiers.key",
        "tiers.frequency",
        "tiers.resilience",
        "tiers.file_locks",
        "tiers.lmdb_pages",
        "tiers.encryption",
        "tiers.server_clock",
    ),
)
CONCRETE = ("tiers.memory", "tiers.disk")
"""Backends that nothing else in `tiers` imports: it knows them by their contract."""
ENGINE = ("tiers.prefix_kv.engine.connector", "tiers.prefix_kv.engine.engine_cache",
          "tiers.prefix_kv.engine.cuda_copies")  # fmt: skip
"""What runs in an engine, and so may import vLLM and torch; nothing else imports it."""
LMDB = ("tiers.disk", "tiers.prefix_kv", "tiers.lmdb_pages")
"""Who may import LMDB."""
HTTP = ("server.web", "server.handlers", "server.pages", "server.admin", "server.engine.upstream",
        "server.engine.routing.connections", "server.engine.routing.sending",
        "server.engine.routing.upstreams",
        "server.engine.warm_start", "server.app",
        "server.router", "server.workers", "server.bench.cache_state",
        "server.bench.warming")  # fmt: skip
"""Who may import aiohttp."""


@cache
def imported_by(file: Path) -> frozenset[str]:
    """Return the dotted names that a file imports, and the packages they are in."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return frozenset(part for name in names for part in accumulate(name.split("."), "{}.{}".format))


FILES = [*Path("server").rglob("*.py"), *Path("tiers").rglob("*.py")]


def module_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer_of(module: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """Return how far down a module's layer is, and its package there."""
    for depth, packages in enumerate(layers):
        for package in packages:
            if is_in(module, (package,)):
                return depth, package
    return None


@pytest.mark.parametrize("layers", [LAYERS, TIERS], ids=["all", "tiers"])
def test_nobody_imports_upwards(layers: tuple[tuple[str, ...], ...]) -> None:
    for file in FILES:
        own = layer_of(module_of(file), layers)
        for name in imported_by(file) if own is not None else ():
            other = layer_of(name, layers)
            assert other is None or other == own or other[0] > own[0], f"{file} imports {name}"


def test_each_library_has_its_place() -> None:
    for file in FILES:
        imports, module = imported_by(file), module_of(file)
        assert bool(imports & {"vllm", "torch"}) <= is_in(module, ENGINE)
        assert bool(imports & set(ENGINE)) <= is_in(module, ENGINE)
        assert ("lmdb" in imports) <= is_in(module, LMDB)
        assert ("cryptography" in imports) <= (module == "tiers.encryption")
        assert bool({"redis", "aiomcache"} & imports) <= is_in(module, ("tiers.shared",))
        assert ("aiohttp" in imports) <= is_in(module, HTTP)
        assert ("opentelemetry" in imports) <= (module == "server.web.tracing")
        if is_in(module, ANYWHERE):
            assert not any(is_in(name, ("server",)) and "." in name for name in imports)
        if file.parts[0] == "tiers":
            assert not imports & {"server", "pydantic", "yaml", "prometheus_client", "orjson"}


def test_no_tier_knows_a_concrete_backend() -> None:
    for file in FILES:
        module = module_of(file)
        if is_in(module, ("tiers",)) and module != "tiers":
            others = tuple(package for package in CONCRETE if not is_in(module, (package,)))
            assert not any(is_in(name, others) for name in imported_by(file)), file


def test_every_module_has_a_layer() -> None:
    for file in FILES:
        module = module_of(file)
        known = module == "server" or is_in(module, ANYWHERE) or layer_of(module, LAYERS)
        assert known, f"{module} is in no layer"


def test_no_folder_is_a_hall() -> None:
    assert len([*Path("server").glob("*.py")]) <= 8
    folders = Counter(file.parent for file in FILES)
    assert [str(folder) for folder, files in folders.items() if files > 16] == []


def test_no_public_class_has_the_name_of_another() -> None:
    names = Counter(
        node.name
        for file in FILES
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_what_tiers_offers() -> None:
    assert sorted(tiers.__all__) == [
        "Acceptance", "Answer", "AnswerCache", "BackgroundWork", "Chain", "Demotion", "DiskCache",
        "Entry", "FileLeases", "Flight", "FrequencySketch", "Freshness", "GenerationLock", "Hit",
        "ImportResult", "MemoryCache", "Pending", "Provenance", "PurgeError", "Purges",
        "SingleFlight", "State", "Tier", "Transfers", "WritePolicy", "digest",
    ]  # fmt: skip


def test_what_serves_without_tracing_does_not_import_it() -> None:
    program = "import server.app, sys; sys.exit('server.web.tracing' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
