"""The configuration: every mistake at once, each with its path and what would be right."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import orjson
import pytest
import yaml
from pydantic import ValidationError

from server.auth.tenants import TenantRecord
from server.cache import build
from server.cli import main
from server.config.base import ConfigError, Section
from server.config.environment import choices
from server.config.load import load
from server.config.schema import Config, SharedTierConfig, TiersConfig
from server.config.yaml_loader import EMPTY
from tests.server.conftest import prepare
from tiers.disk import MIN_BYTES, DiskCache


@pytest.fixture(autouse=True)
def prepared(tmp_path_factory, monkeypatch) -> Path:
    """Return the cache folder, which is another for each test."""
    prepare(cache := tmp_path_factory.mktemp("cache"), monkeypatch)
    return cache


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
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3
    assert "server.prot: unknown key; did you mean port?" in messages
    assert any(line.startswith("server.port: ") and "65535, not 70000" in line for line in messages)
    assert any(line.startswith("tiers.memory.max_bytes: ") for line in messages)


def test_the_environment_overrides_single_fields(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__PORT", "9000")
    monkeypatch.setenv("TIERSERVE__TIERS__DISK__MAX_BYTES", "2MiB")
    config = load(write(tmp_path, "server: {port: 1, host: 127.0.0.2}\n"))
    assert (config.server.port, config.server.host) == (9000, "127.0.0.2")
    assert config.tiers.disk is not None
    assert config.tiers.disk.max_bytes == 2 * 1024**2


MODELS = """
models:
  Org/Model-1.5: {source: embedded, engine: {args: {dtype: half}}, adapters: {poet: ./poet}}
  b: {upstreams: ["http://h:1"]}
"""


def test_the_environment_finds_names_and_keeps_them(tmp_path: Path, monkeypatch) -> None:
    of_model = "TIERSERVE__MODELS__ORG_MODEL_1_5"
    for name, text in {
        f"{of_model}__ENGINE__ENV__VLLM_Some_Thing": "1",
        f"{of_model}__ENGINE__ARGS__MAX_MODEL_LEN": "77",
        f"{of_model}__ENGINE__ARGS__DTYPE": "float32",
        f"{of_model}__ENGINE__ARGS__ENFORCE_EAGER": "true",
        f"{of_model}__ADAPTERS__POET": "./other",
        f"{of_model}__VERSION": "2",
        "TIERSERVE__models__B__Max_Requests": "3",
        "TIERSERVE__MODELS__B__ALIASES": "[x, y]",
        "TIERSERVE__TIERS__MEMORY": "null",
        "TIERSERVE__ADMIN__SOCKET": "null",
    }.items():
        monkeypatch.setenv(name, text)
    config = load(write(tmp_path, MODELS))
    one, other = config.models.values()
    assert list(config.models) == ["Org/Model-1.5", "b"]
    assert one.engine.env == {"VLLM_Some_Thing": "1"}
    assert one.engine.args == {"dtype": "float32", "max_model_len": 77, "enforce_eager": True}
    assert (one.adapters, one.version) == ({"poet": "./other"}, "2")
    assert (other.max_requests, other.aliases) == (3, ("x", "y"))
    assert config.tiers.memory is config.admin.socket is None


def test_the_environment_overrides_the_model_that_there_is_by_default(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TIERSERVE__MODELS__SMOLLM2_135M_INSTRUCT__TIMEOUT_S", "5")
    (model,) = load(write(tmp_path, "")).models.values()
    assert (model.source, model.timeout_s) == ("embedded", 5)
    monkeypatch.setenv("TIERSERVE__MODELS", '{"M": {"source": "embedded"}}')
    monkeypatch.delenv("TIERSERVE__MODELS__SMOLLM2_135M_INSTRUCT__TIMEOUT_S")
    assert list(load(write(tmp_path, MODELS)).models) == ["M"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TIERSERVE__SERVR__PORT", "1", "there is no SERVR; did you mean SERVER?"),
        ("TIERSERVE__SERVER__PROT", "1", "there is no PROT; did you mean PORT?"),
        ("TIERSERVE__SERVER__HOST__X", "1", "host has no parts, so X means nothing"),
        ("TIERSERVE_SERVER__HOST", "1", "should be TIERSERVE__SERVER__HOST"),
        ("TIERSERVE__MODELS__C__SOURCE", "s", "C should be one of 'Org/Model-1.5', 'b'; more are"),
        ("TIERSERVE__MODELS__B__ALIASES", "x", "should be YAML or JSON, of a section, a list or"),
        ("TIERSERVE__MODELS__B__ENGINE__ARGS", "{", "should be YAML or JSON: "),
        ("TIERSERVE__MODELS__B__ENGINE__ARGS", "2024-13-45", "should be YAML or JSON: "),
    ],
)
def test_variables_that_mean_nothing_are_mistakes(
    tmp_path: Path, monkeypatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setenv(name, text)
    monkeypatch.setenv("TIERSERVE__SERVER__PORT", "many")
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, MODELS))
    first, second = caught.value.mistakes
    assert first.startswith(f"{name}: {message}")
    assert second.startswith("server.port: ")


def test_what_others_set_is_not_ours(tmp_path: Path, monkeypatch) -> None:
    # As Kubernetes does for a service that is named so.
    for name in ("TIERSERVE_SERVER_PORT", "TIERSERVE_PORT_80_TCP", "TIERSERVE_LONG"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    assert load(write(tmp_path, "")).server.port == 8000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {m: {upstreams: ['http://h:1/v1']}}", r"m.upstreams.0: should .* without /v1"),
        (
            "models: {m: {upstreams: ['http://h:1', 'http://u:p@h:1/']}}",
            "models.m: upstreams should name each server once; http://h:1 is there twice",
        ),
        ("models: {m: {upstreams: ['h:1']}}", "models.m.upstreams.0: should be as http://"),
        ("server: {workers: .inf}", "server.workers: should be a number from 1 to 256, or auto"),
        (
            "models: {m: {upstreams: ['http://h:1'], engine: {args: {dtype: half}}}}",
            "models.m: should have an engine of ours or upstreams, and not both",
        ),
        (
            "models: {m: {source: embedded, vllm: {}}}",
            "models.m: vllm is for upstreams; the options of an engine of ours are engine.args",
        ),
        ("models: {m: {source: s, routing: prefix}}", "models.m: routing is among upstreams; an"),
        ("models: {m: {source: ./s, revision: x}}", "models.m: revision is of a source at Hugging"),
        ("models: {m: {upstreams: ['http://h:1'], revision: x}}", "models.m: revision is of a sou"),
        (
            "models: {m: {source: s, fallback: n}}",
            "should be another model, and there is none, not",
        ),
        (
            "models: {m: {source: s, fallback: x}, n: {source: s, aliases: [a]}}",
            "models.m.fallback: should be one of n, a, not 'x'",
        ),
        (
            "models: {m: {source: s, aliases: [a], fallback: a}}",
            "models.m.fallback: should lead to another model, and not back: m to m",
        ),
        (
            "models: {m: {source: s, fallback: n}, n: {source: s, fallback: m}, o: {source: s, "
            "fallback: m}}",
            "(?s)models.m.fallback: .* not back: m to n to m\n.*n.fallback: [^\n]* n to m to n$",
        ),
        (
            "models: {m: {upstreams: ['http://h:1'], vllm: {max-model-len: 1}}}",
            "models.m.vllm: max-model-len should be written as vLLM's options with underscores",
        ),
        ("models: {m: {}}", r"models.m: should have a source \(embedded, .* or upstreams"),
        ("models: {m: {source: s, alias: [a]}}", "models.m.alias: unknown key; did you mean alias"),
        ("models: {m: {source: s, engine: {arg: 1}}}", "engine.arg: unknown key; did you mean arg"),
        ("models: {m: s}", r"models.m: should hold keys of adapters, aliases, .*, not 's'"),
        ("models: {no: {source: s}}", "models.0: should be text, in quotes if .*, not False"),
        ("models: {m: {upstreams: 'http://h'}}", "models.m.upstreams: should be a list, not 'http"),
        ("models: {1: {source: s}}", "models.1: should be text, in quotes if YAML takes .*, not 1"),
        (
            "models: {m: {source: s, engine: {args: {allowed_origins: ['*']}}}}",
            "allowed_origins: set by tierserve; use section server",
        ),
        ("server: {allowed_origins: [app.example]}", "allowed_origins.0: should be as https://app"),
        (
            "server: {allowed_origins: ['https://a/']}",
            "allowed_origins.0: should be as https://app",
        ),
        ("models: {}", "models: should have at least one entry"),
        ("models: {m: {source: s}, m: {source: t}}", "m stands twice"),
        ('models: {"a\\nb": {source: s}}', "should have 1 to 128 printable characters"),
        (
            "models: {m: {source: s, aliases: [n]}, n: {source: s}}",
            "models: each name should mean one thing; n is an alias of m and a model",
        ),
        (
            "models: {m: {source: s, aliases: [a]}, n: {source: s, adapters: {a: f, m: f}}}",
            "; m is a model and an adapter of n; a is an alias of m and an adapter of n",
        ),
        (
            "models: {m: {source: s, adapters: {audio: f}}}",
            r"models.m.adapters.audio: vLLM would apply it to .* default_mm_loras, not 'audio'",
        ),
        (
            "models: {m: {source: s, engine: {env: {VLLM_ALLOW_RUNTIME_LORA_UPDATING: 1}}}}",
            "models.m.engine.env: should be without VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        ),
        ("cache: {rules: [{stale_if_error: 1}]}", "cache.rules.0.stale_if_error: unknown key; did"),
        ("cache: {ttl_s: .inf}", "cache.ttl_s: should be less"),
        ("cache: {ttl_s: .nan}", "cache.ttl_s: should be"),
        ("cache: {ttl_s: 1, ttl_s: 2}", "ttl_s stands twice"),
        ("cache: {ttl_s: 2024-13-45}", "can't be read as YAML"),
        (
            "tiers: {memory: {policy: adaptive}}",
            "tiers.memory.policy: should be one of arc, fifo",
        ),
        ("model: m", r"model: unknown key; did you mean models\?"),
    ],
)
def test_says_what_would_be_right(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def sections(kind: type[Section] = Config) -> Iterator[type[Section]]:
    """Yield all kinds of sections that there are."""
    yield kind
    for field in kind.model_fields.values():
        for each in parts(field.annotation):
            if isinstance(each, type) and issubclass(each, Section):
                yield from sections(each)


def parts(annotation: Any) -> Iterator[Any]:
    """Yield the types that a field may have, and those of what it may hold."""
    for kind in choices(annotation):
        yield kind
        if get_origin(kind) in (dict, tuple):
            yield from (
                inner for each in get_args(kind) if each is not ... for inner in parts(each)
            )


FIELDS = [
    (section, name, field.annotation)
    for section in dict.fromkeys([*sections(), *sections(TenantRecord)])
    for name, field in section.model_fields.items()
]


def mistaken(section: type[Section], name: str, value: Any) -> bool:
    """Whether the field can't have the value, whatever the others have."""
    try:
        section(**{name: value})
    except ValidationError as exc:
        return any(error["loc"][:1] == (name,) for error in exc.errors())
    return False


@pytest.mark.parametrize(("section", "name", "annotation"), FIELDS)
def test_a_boolean_is_nothing_else_and_no_value_turns_nothing_off(section, name, annotation):
    kinds, inner = choices(annotation), [*parts(annotation)]
    origins = {get_origin(kind) for kind in kinds}
    if bool not in kinds:
        assert mistaken(section, name, True)
    if Any not in inner:
        assert mistaken(section, name, {"a": True}) or tuple in origins
        assert mistaken(section, name, [True]) or dict in origins
    holds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    if not holds and origins == {None}:
        assert mistaken(section, name, EMPTY)
    elif not mistaken(section, name, {} if holds or dict in origins else ()):
        with contextlib.suppress(ValidationError):
            assert getattr(section(**{name: EMPTY}), name) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {port: yes}", "server.port: should be a number, not True"),
        ("cache: {ttl_s: on}", "cache.ttl_s: should be a number, not True"),
        ("cache: {rules: [{ttl_s: no}]}", "cache.rules.0.ttl_s: should be a number, not False"),
        ("tiers: {memory: {max_bytes: yes}}", "tiers.memory.max_bytes: should be a number"),
        (
            "tiers: {disk: {max_bytes: 128TiB}}",
            "tiers.disk.max_bytes: should be less than or equal",
        ),
        ("models: {m: {source: s, engine: {env: {A: yes}}}}", "models.m.engine.env.A: should be"),
        ("tenants:\n  key:", "tenants.key: has no value; .* or null for none"),
        ("server:\n  port:", "server.port: has no value; leave the key out for its default"),
        ("tiers:\n  disk:\n    path:", "tiers.disk.path: has no value"),
        ("tiers:\n  shared:", "tiers.shared.url: should be set"),
        ("models:", "models: should have at least one entry"),
        ("models:\n  m:", "models.m: should have a source"),
        ("models: {m: {source: s, engine: {args: {a: {b: [{c: }]}}}}}", "args: a.b.0.c: has no va"),
    ],
)
def test_a_boolean_and_no_value_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path, monkeypatch) -> None:
    text = "server:\ncache:\n  rules:\ntiers:\n  disk:\n    # path: x\n  memory: {}\nlog:"
    assert load(write(tmp_path, text)) == load(write(tmp_path, ""))
    assert load(write(tmp_path, "---\n# all of it")) == load(write(tmp_path, ""))
    for none in ("null", "~", "Null"):
        assert load(write(tmp_path, f"tiers: {{disk: {none}}}")).tiers.disk is None
    monkeypatch.setenv("TIERSERVE__TIERS", "{disk: , memory: null}")
    tiers = load(write(tmp_path, "")).tiers
    assert (tiers.disk is None, tiers.memory) == (False, None)
    monkeypatch.setenv("TIERSERVE__TIERS", "{disk: {}, disk: null}")
    with pytest.raises(ConfigError, match="TIERSERVE__TIERS: should be YAML or JSON: disk stands"):
        load(write(tmp_path, ""))
    monkeypatch.delenv("TIERSERVE__TIERS")
    monkeypatch.setenv("TIERSERVE__MODELS__M__ENGINE__ARGS__DTYPE", "")
    with pytest.raises(ConfigError, match=r"models.m.engine.args: dtype: has no value"):
        load(write(tmp_path, "models: {m: {source: s}}"))


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
        config.model_copy(
            update={"tiers": TiersConfig(disk=None, shared=SharedTierConfig(url=url))}
        )
    )
    assert [tier.name for tier in chain.tiers] == ["memory", "shared"]


def test_files_for_tls_have_to_be_there(tmp_path: Path) -> None:
    shared = SharedTierConfig(url=f"rediss://h?ssl_ca_certs={tmp_path}/none.pem")
    config = load(write(tmp_path, ""))
    with pytest.raises(
        ConfigError, match=r"tiers.shared.url: its TLS files can't be used: .*No such"
    ):
        build(config.model_copy(update={"tiers": TiersConfig(disk=None, shared=shared)}))


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
    output = capsys.readouterr()
    assert "s3cr3t" not in output.out + output.err
    assert "***" in output.out + output.err
    if status == 0:
        assert "s3cr3t" not in repr(load(file))


@pytest.mark.parametrize(
    ("url", "extra"),
    [("redis://h", "redis"), ("unix:///s", "redis"), ("memcached://h", "memcached")],
)
def test_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch, url: str, extra: str) -> None:
    monkeypatch.setattr("server.config.shared_url.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"tiers.shared.url: needs the extra {extra}: install "):
        load(write(tmp_path, f"tiers: {{shared: {{url: '{url}'}}}}"))


@pytest.mark.parametrize("text", ["- a\n", "{", "1: 2\n"])
def test_refuses_what_is_not_sections(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, text))


def test_engine_args_that_we_set_are_refused(tmp_path: Path) -> None:
    text = "models: {m: {source: s, engine: {args: {port: 1, model: m, lora_modules: []}}}}"
    with pytest.raises(ConfigError, match=r"m.engine.args: lora_modules, model, port: set by"):
        load(write(tmp_path, text))


def test_the_engines_environment_may_hold_numbers(tmp_path: Path) -> None:
    text = "models: {m: {source: s, engine: {env: {VLLM_CPU_KVCACHE_SPACE: 2}}}}"
    config = load(write(tmp_path, text))
    assert config.models["m"].engine.env == {"VLLM_CPU_KVCACHE_SPACE": "2"}


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "tiers: {disk: {path: d}}")
    (folder := tmp_path / "folder").symlink_to(tmp_path)
    (link := tmp_path / "etc").mkdir()
    (link / "c.yaml").symlink_to("../c.yaml")
    for asked, of in ((file.parent, tmp_path), (folder, folder), (link, link / "..")):
        disk = load(asked / "c.yaml").tiers.disk
        assert disk is not None
        assert disk.path == of / "d"


def test_check_prints_the_effective_configuration(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poet").mkdir()
    (tmp_path / "poet/adapter_config.json").touch()
    for text in ("", MODELS):
        file = write(tmp_path, text)
        effective = load(file)
        assert main(["check", "--config", str(file)]) == 0
        printed = write(tmp_path, capsys.readouterr().out)
        assert load(printed) == effective


SECRETS_IN_ARGS = {
    "api_key": ["s3cr3t", "s3cr3t"],
    "hf_token": "s3cr3t",
    "ssl_key_password": 73577357,
    "otlp_traces_endpoint": "grpc://me:s3cr3t@h:4317",
    "kv_transfer_config": {"kv_connector_extra_config": {"awsSecretKey": "s3cr3t", "port": 77}},
    "hf_overrides": '{"headers": {"Authorization": "s3cr3t"}, "url": "http://h?s3cr3t"}',
    "max_num_batched_tokens": 2048,
    "generation_config": "vllm",
    "token": {"value": "s3cr3t"},
    "model_loader_extra_config": ' {"api_key": "s3cr3t"}',
    "headers": ["Authorization: Basic s3cr3t", "x-api-key=s3cr3t", "Bearer s3cr3t"],
}


def test_check_shows_no_secrets(tmp_path: Path, capsys) -> None:
    file = tmp_path / "config.yaml"
    env = {"HF_TOKEN": "s3cr3t", "ANYTHING": "s3cr3t", "PIN": 73577357}
    for model in (
        {"source": "s", "engine": {"args": SECRETS_IN_ARGS, "env": env}},
        {"upstreams": ["http://user:s3cr3t@host:8000", "dns+http://user:s3cr3t@pods"]},
        {"upstreams": ["http://host:8000"], "api_key": "s3cr3t"},
    ):
        file.write_text(orjson.dumps({"models": {"env": model}}).decode())
        assert main(["check", "--config", str(file)]) == 0
        shown = capsys.readouterr().out
        assert "s3cr3t" not in shown
        assert "7357" not in shown
        assert "***" in shown
        masked = yaml.safe_load(shown)["models"]["env"]
        assert masked["upstreams"][1:] in ([], ["dns+http://***@pods"])
        if "source" in model:
            assert masked["engine"]["env"] == dict.fromkeys(env, "***")
            assert masked["engine"]["args"]["max_num_batched_tokens"] == 2048
            assert masked["engine"]["args"]["generation_config"] == "vllm"
            nested = masked["engine"]["args"]["kv_transfer_config"]["kv_connector_extra_config"]
            assert nested["port"] == 77


@pytest.mark.parametrize(
    "engine", ["{env: HF_TOKEN=s3cr3t}", "{args: --hf-token s3cr3t}", "{args: {'x y': s3cr3t}}",
               "{env: {x: [s3cr3t]}}", "{args: {port: s3cr3t}}", "--hf-token s3cr3t"],
)  # fmt: skip
def test_mistakes_show_nothing_of_what_an_engine_is_given(
    tmp_path: Path, capsys, engine: str
) -> None:
    file = write(tmp_path, f"models: {{m: {{source: s, engine: {engine}}}}}")
    assert main(["check", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert "models.m.engine" in message
    assert "s3cr3t" not in message


WRONG = """
server: {host: 192.0.2.1, port: 20001, tls: {certificate_file: no.pem, key_file: no.key}}
tenants: {file: no.yaml}
models:
  a: {source: ./no, aliases: [x], adapters: {p: ./no, q: "a b"}}
  b: {source: a b, aliases: [x], timeout_s: never}
  c: {upstreams: ["http://127.0.0.1:20001"], engine: {args: {dtype: half}}}
tiers:
  disk: {path: c.yaml/disk, encryption_key_file: no.key, max_bytes: few}
  shared: {url: "rediss://h?ssl_ca_certs=/no.pem"}
admin: {socket: c.yaml/admin.sock, port: 20001}
log: {trace: no/trace.jsonl}
"""


def test_check_names_what_serve_would_name_at_once(tmp_path: Path, capsys) -> None:
    file = write(tmp_path, WRONG)
    before = sorted(tmp_path.rglob("*"))
    for command in ("check", "serve"):
        assert main([command, "--config", str(file)]) == 2
        messages = capsys.readouterr().err.splitlines()
        assert [line.partition(": ")[0] for line in messages] == [
            "models.b.timeout_s",
            "models.c",
            "tiers.disk.max_bytes",
            "admin",
            "models",
            "tenants.file",
            "server.tls.certificate_file",
            "server.tls.key_file",
            "server.host",
            "models.a.source",
            "models.a.adapters.p",
            "models.a.adapters.q",
            "models.b.source",
            "tiers.disk.path",
            "tiers.disk.encryption_key_file",
            "tiers.shared.url",
            "log.trace",
        ]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{server: {port: 20001}, admin: {port: 20001, key: 0123456789abcdef}}",
            "admin.port: should be another than server.port, not 20001",
        ),
        pytest.param(
            "{server: {port: 20001, host: '::'}, admin: {port: 20001, key: 0123456789abcdef}}",
            "admin.port: should be another than server.port, not 20001",
            marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6"),
        ),
        (
            "{server: {host: no.such.invalid}}",
            "server.host: should be a name or an address of this machine, not 'no.such.invalid'",
        ),
        (
            "{models: {m: {upstreams: ['http://h:65536']}}}",
            "models.m.upstreams.0: should be as http://host:8000",
        ),
        ("{models: {m: {upstreams: ['http://:80']}}}", "models.m.upstreams.0: should be as http:"),
        ("{models: {m: {upstreams: ['http://me@']}}}", "models.m.upstreams.0: should be as http:"),
        (
            "{server: {port: many}, models: {m: {upstreams: ['http://127.0.0.1:8000']}}}",
            "server.port: should be a valid integer",
        ),
        (
            "{tiers: {disk: {path: ~no.such.user/disk}}}",
            "tiers.disk.path: should be without ~, or name a user who has a home, not '~no.such.us",
        ),
        (
            "{models: {m: {source: ~no.such.user/m}}}",
            "models.m.source: should be without ~, or name a user who has a home",
        ),
        (
            f"{{tiers: {{disk: {{path: {'a' * 300}}}}}}}",
            "tiers.disk.path: should be a folder for us",
        ),
        (f"{{log: {{trace: {'a' * 300}.jsonl}}}}", "log.trace: should be a file that we can write"),
        (
            "{admin: {socket: .}}",
            "admin.socket: should be a path where a socket can be made, or null, not {}: something",
        ),
        ("{log: {trace: ./t.jsonl}}", "log.trace: should be a file that we can write, not {}/t"),
        (
            "{log: {audit: {file: ./t.jsonl}}}",
            "log.audit.file: should be a file that we can write, not {}/t",
        ),
        ("{log: {audit: {file: a.log}}}", "log.audit.file: should end in .jsonl, not"),
        (
            "{log: {audit: {file: a.jsonl, key_file: no.key}}}",
            "log.audit.key_file: {}/no.key: No such file",
        ),
        (
            "{log: {trace: a.jsonl, audit: {file: a.jsonl}}}",
            "log: trace and audit.file: should be two files",
        ),
        (
            "{tiers: {disk: {path: sealed}}}",
            "tiers.disk.encryption_key: the file in {}/sealed stays as it is: it is encrypted, and",
        ),
    ],
)
def test_check_names_what_the_machine_does_not_have(
    tmp_path: Path, capsys, text: str, message: str
) -> None:
    (tmp_path / "t.jsonl").mkdir()
    asyncio.run(DiskCache(tmp_path / "sealed", MIN_BYTES, encryption_key=bytes(32)).close())
    before = sorted(tmp_path.rglob("*"))
    file = write(tmp_path, text)
    assert main(["check", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])


def test_folders_that_are_given_and_made_are_said(tmp_path: Path, prepared: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    for text in ("", "tiers: {disk: {path: a/b}}", "tiers: {disk: {path: a/b}}"):
        chain, _ = build(load(write(tmp_path, text)))
        asyncio.run(chain.close())
    messages = [
        each.getMessage() for each in caplog.records if each.name == "server.config.folders"
    ]
    assert messages == [f"tiers.disk.path: makes a/b in {tmp_path}"]
    assert (prepared / "tierserve/disk").is_dir()


def test_check_takes_a_port_that_a_server_has(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        file = write(tmp_path, f"server: {{port: {other.getsockname()[1]}}}")
        assert main(["check", "--config", str(file)]) == 0


def test_an_empty_host_is_no_host(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("server: {host: ''}")
    with pytest.raises(ConfigError, match=r"server\.host"):
        load(file)


@pytest.mark.parametrize(
    ("section", "mistake"),
    [
        ("{}", "tracing.endpoint: should be set"),
        ("{endpoint: localhost}", "tracing.endpoint: should be as http://host:4318"),
        ("{endpoint: 'http://me:s3cr3t@h:1'}", "tracing.endpoint: should be as http://host:4318"),
        ("{endpoint: 'http://h', protocol: udp}", "tracing.protocol: .*'grpc' or 'http'"),
        ("{endpoint: 'http://h/v1/traces', protocol: grpc}", "tracing: .*http://host:4317"),
        ("{endpoint: 'http://h', sample_ratio: 2}", "tracing.sample_ratio: .*less than or equal"),
    ],
)
def test_tracings_mistakes_are_named(tmp_path: Path, section: str, mistake: str) -> None:
    file = write(tmp_path, f"tracing: {section}")
    with pytest.raises(ConfigError, match=mistake) as caught:
        load(file)
    assert "s3cr3t" not in str(caught.value)


def test_names_the_extra_that_tracing_needs(tmp_path: Path, monkeypatch) -> None:
    file = write(tmp_path, "tracing: {endpoint: 'http://h'}")
    monkeypatch.setattr("server.config.tracing.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="tracing: needs the extra tracing: install "):
        load(file)
