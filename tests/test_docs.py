"""What the documents say that can be checked: paths, lengths, the example of a configuration."""

import re
from pathlib import Path

import pytest

from server.config.load import load

DOCUMENTS = [
    Path("README.md"),
    *Path().glob("*/README.md"),
    Path("configs/helm/tierserve/README.md"),
    Path("server/bench/README.md"),
    Path("server/audit/README.md"),
    Path("server/engine/routing/README.md"),
    Path("tiers/prefix_kv/README.md"),
]
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_PLACES = ("configs", "scripts", "server", "tests", "tiers")


def packages(folder: str) -> list[str]:
    return sorted(file.parent.name for file in Path(folder).glob("*/__init__.py"))


def modules(folder: str) -> set[str]:
    files = Path(folder).rglob("*.py")
    return {str(f.relative_to(folder)) for f in files if f.name != "__init__.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_paths_are_there(document: Path) -> None:
    text = document.read_text()
    codes = (code.split()[0] for code in _CODE.findall(text) if code.strip())
    named = {Path(path) for path in codes if path.split("/")[0] in _PLACES}
    named |= {document.parent / link for link in _LINK.findall(text) if "://" not in link}
    assert [str(path) for path in named if "/" in str(path) and not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_stay_short(document: Path) -> None:
    most = 150 if document == Path("README.md") else 200
    assert len(document.read_text().splitlines()) <= most


@pytest.mark.parametrize("folder", ["server", "tiers"])
def test_readme_names_every_package(folder: str) -> None:
    text = Path("README.md").read_text()
    assert [name for name in packages(folder) if f"`{name}/`" not in text] == []


@pytest.mark.parametrize("folder", ["server", "server/audit", "server/bench"])
def test_readme_names_every_module(folder: str) -> None:
    table = Path(folder, "README.md").read_text().split("## What is where")[1]
    # These have tables of their own.
    there = {module for module in modules(folder) if not module.startswith(("bench/", "audit/"))}
    assert set(re.findall(r"`([a-z_/]+\.py)`", table)) == there


def test_configuration_of_the_readme_is_right(tmp_path: Path) -> None:
    section = Path("README.md").read_text().split("## Configuration")[1].split("##")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert load(tmp_path / "config.yaml").tiers.shared is not None


def test_names_in_the_readme_are_there() -> None:
    named = re.findall(r"`(\S+\.py)`: `(\w+)`", Path("README.md").read_text())
    assert named
    assert [name for file, name in named if name not in Path(file).read_text()] == []
