"""The configuration: every mistake at once, each with its path and what would be right."""

from pathlib import Path

import orjson
import pytest

from server.chain import build
from server.cli import main
from server.config import ConfigError, SharedTier, Tiers, load


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


URLS = [
    "redis://h", "redis://h:6379/3", "redis://u:p@h:1/", "rediss://:p@h?ssl_cert_reqs=none",
    "unix:///run/redis.sock?db=2", "unix://u:p@/run/redis.sock", "memcached://h", "redis://[::1]:1",
    "memcached://127.0.0.1:11211",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_shared_tier_is_named_by_a_url(tmp_path: Path, url: str) -> None:
    config = load(write(tmp_path, f"tiers: {{shared: {{url: '{url}'}}}}"))
    assert config.tiers.shared is not None
    assert config.tiers.shared.url == url
    chain, _ = build(
        config.model_copy(update={"tiers": Tiers(disk=None, shared=SharedTier(url=url))})
    )
    assert [tier.name for tier in chain.tiers] == ["memory", "shared"]


def test_files_for_tls_have_to_be_there(tmp_path: Path) -> None:
    shared = SharedTier(url=f"rediss://h?ssl_ca_certs={tmp_path}/none.pem")
    config = load(write(tmp_path, ""))
    with pytest.raises(
        ConfigError, match=r"tiers.shared.url: its TLS files can't be used: .*No such"
    ):
        build(config.model_copy(update={"tiers": Tiers(disk=None, shared=shared)}))


@pytest.mark.parametrize(
    "url",
    ["", "h:6379", "http://h", "redis://", "redis://h/db", "redis://h:99999", "redis://h:x",
     "redis://h?decode_responses=true", "redis://[::1", "redis://h#1", "rediss://h?ssl_x=1",
     "rediss://h?ssl_keyfile", "unix:r", "unix:///s?password=p", "memcached://u:p@h",
     "memcached://h/1", "memcached:///s"],
)  # fmt: skip
def test_says_how_a_shared_tier_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"tiers.shared.url: should be as redis://.* memcached://"
    ):
        load(write(tmp_path, f"tiers: {{shared: {{url: '{url}'}}}}"))


@pytest.mark.parametrize(
    "url", ["redis://me:s3cr3t@h:1", "unix://:s3cr3t@/s", "redis://:a/s3cr3t?#@h", "oops://s3cr3t@h",
            "redis://h?password=s3cr3t", "redis://:s3cr3t@h:port"],
)  # fmt: skip
def test_secrets_are_not_shown(tmp_path: Path, capsys, url: str) -> None:
    file = write(tmp_path, f"tiers: {{shared: {{url: '{url}'}}}}")
    status = main(["check", "--config", str(file)])
    told = capsys.readouterr()
    assert "s3cr3t" not in told.out + told.err
    assert "***" in told.out + told.err
    if status == 0:
        assert "s3cr3t" not in repr(load(file))


@pytest.mark.parametrize(
    ("url", "extra"),
    [("redis://h", "redis"), ("unix:///s", "redis"), ("memcached://h", "memcached")],
)
def test_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch, url: str, extra: str) -> None:
    monkeypatch.setattr("server.shared.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=f"tiers.shared.url: needs the extra {extra}, as scripts/"
    ):
        load(write(tmp_path, f"tiers: {{shared: {{url: '{url}'}}}}"))


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


def test_check_shows_no_secrets(tmp_path: Path, capsys) -> None:
    file = tmp_path / "config.yaml"
    for engine in (
        {"args": {"api_key": "s3cr3t", "max_model_len": 99}, "env": {"HF_TOKEN": "s3cr3t"}},
        {"upstreams": ["http://user:s3cr3t@host:8000"]},
    ):
        file.write_text(orjson.dumps({"engine": engine}).decode())
        assert main(["check", "--config", str(file)]) == 0
        shown = capsys.readouterr().out
        assert "s3cr3t" not in shown
        assert "***" in shown


def test_an_empty_host_is_no_host(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("server: {host: ''}")
    with pytest.raises(ConfigError, match=r"server\.host"):
        load(file)
