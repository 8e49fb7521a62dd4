"""Configurations that are shipped: each starts a server on a machine that has what it names."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from server.cli import main
from tests.server.conftest import prepare

CONFIGS = Path("configs")
FILES = [*CONFIGS.glob("*.yaml"), CONFIGS / "container" / "config.yaml"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="some have engines")
@pytest.mark.parametrize("file", FILES, ids=str)
def test_check_finds_no_mistake(file: Path, tmp_path, monkeypatch, capsys) -> None:
    prepare(tmp_path, monkeypatch)
    assert main(["check", "--config", str(file)]) == 0, capsys.readouterr().err


def test_the_readme_names_each_file_and_folder() -> None:
    text = (CONFIGS / "README.md").read_text()
    names = [each.name + "/" * each.is_dir() for each in CONFIGS.iterdir()]
    names.remove("README.md")
    assert [name for name in names if f"`{name}`" not in text] == []
