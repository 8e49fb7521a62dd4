"""The configuration: every mistake at once, each with its path and what would be right."""

from pathlib import Path

import pytest

from server.cli import main
from server.config import ConfigError, load


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


def test_shipped_configurations_are_right() -> None:
    files = list(Path("configs").glob("*.yaml"))
    assert files
    for file in files:
        load(file)


def test_names_every_mistake_at_once(tmp_path: Path, capsys) -> None:
    file = write(tmp_path, "server: {prot: 1, port: 70000}\ntiers: {memory: {max_bytes: lots}}\n")
    assert main(["check", "--config", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "server.prot: unknown key; did you mean port?" in said
    assert any(line.startswith("server.port: ") and "65535, not 70000" in line for line in said)
    assert any(line.startswith("tiers.memory.max_bytes: ") for line in said)


def test_the_environment_overrides_single_fields(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__PORT", "9000")
    monkeypatch.setenv("TIERSERVE__TIERS__DISK__MAX_BYTES", "2MiB")
    config = load(write(tmp_path, "server: {port: 1, host: 127.0.0.2}\n"))
    assert (config.server.port, config.server.host) == (9000, "127.0.0.2")
    assert config.tiers.disk is not None
    assert config.tiers.disk.max_bytes == 2 * 1024**2


@pytest.mark.parametrize("name", ["TIERSERVE__SERVR__PORT", "TIERSERVE__SERVER__PROT"])
def test_unknown_variables_are_mistakes(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"(?i)serv"):
        load(write(tmp_path, ""))


def test_a_variable_that_should_be_json_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__PORT", "many")
    monkeypatch.setenv("TIERSERVE__ENGINE__ARGS", "max_model_len=4")
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, ""))
    named = [line.split(":")[0] for line in caught.value.mistakes]
    assert named == ["TIERSERVE__ENGINE__ARGS", "server.port"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {upstreams: ['http://h:1/v1']}", r"engine.upstreams.0: should .* without /v1"),
        ("engine: {upstreams: ['h:1']}", "engine.upstreams.0: should be as http://"),
        (
            "engine: {upstreams: ['http://h:1'], args: {dtype: half}}",
            "engine: args and env are for",
        ),
        ("cache: {rules: [{stale_if_error: 1}]}", "cache.rules.0.stale_if_error: unknown key; did"),
        ("cache: {ttl_s: .inf}", "cache.ttl_s: Input should be less"),
        ("cache: {ttl_s: .nan}", "cache.ttl_s: Input should be"),
        ("cache: {ttl_s: 1, ttl_s: 2}", "ttl_s stands twice"),
        ("tiers: {memory: {policy: best}}", "tiers.memory.policy: should be one of arc, fifo"),
        ("model: m", "model: should hold keys of name, revision, source, version, not 'm'"),
    ],
)
def test_says_what_would_be_right(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, text))


@pytest.mark.parametrize("text", ["- a\n", "{", "1: 2\n"])
def test_refuses_what_is_not_sections(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, text))


def test_engine_args_that_we_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine.args: model, port: set by tierserve"):
        load(write(tmp_path, "engine: {args: {port: 1, model: m}}"))


def test_the_engines_environment_may_hold_numbers(tmp_path: Path) -> None:
    config = load(write(tmp_path, "engine: {env: {VLLM_CPU_KVCACHE_SPACE: 2}}"))
    assert config.engine.env == {"VLLM_CPU_KVCACHE_SPACE": "2"}


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, "tiers: {disk: {path: d}}"))
    assert config.tiers.disk is not None
    assert config.tiers.disk.path == tmp_path / "d"


def test_check_prints_the_effective_configuration(tmp_path: Path, capsys) -> None:
    file = write(tmp_path, "")
    assert main(["check", "--config", str(file)]) == 0
    printed = write(tmp_path, capsys.readouterr().out)
    assert load(printed) == load(write(tmp_path, "{}"))
