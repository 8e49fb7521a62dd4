"""Section `tiers.prefix`: its paths, its limits, and what can't be beside it."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from server.cli import main
from server.config.base import ConfigError
from server.config.folders import cache_folder
from server.config.load import load
from tests.server.conftest import prepare


class Room(NamedTuple):
    """Of a disk."""

    free: int


@pytest.fixture(autouse=True)
def prepared(tmp_path_factory, monkeypatch) -> None:
    prepare(tmp_path_factory.mktemp("cache"), monkeypatch)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


def prefix_of(file: Path):
    prefix = load(file).tiers.prefix
    assert prefix is not None
    return prefix


def test_it_is_off_unless_it_is_configured(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")).tiers.prefix is None
    assert load(write(tmp_path, "tiers: {prefix: null}")).tiers.prefix is None
    caches = cache_folder()
    assert caches is not None
    for text in ("tiers: {prefix: {}}", "tiers:\n  prefix:\n"):
        prefix = prefix_of(write(tmp_path, text))
        assert prefix.path == caches / "prefix"
        assert (prefix.max_bytes, prefix.store_after, prefix.min_tokens) == (8 * 1024**3, 2, 256)
    assert load(Path("configs/laptop.yaml")).tiers.prefix is not None


def test_its_path_begins_at_the_file_and_the_environment_overrides(
    tmp_path: Path, monkeypatch
) -> None:
    file = write(tmp_path, "tiers: {prefix: {path: p}}")
    assert prefix_of(file).path == tmp_path / "p"
    monkeypatch.setenv("TIERSERVE__TIERS__PREFIX__MAX_BYTES", "1GiB")
    monkeypatch.setenv("TIERSERVE__TIERS__PREFIX__STORE_AFTER", "1")
    assert (prefix_of(file).max_bytes, prefix_of(file).store_after) == (1024**3, 1)
    for name in ("MAX_BYTES", "STORE_AFTER"):
        monkeypatch.delenv(f"TIERSERVE__TIERS__PREFIX__{name}")
    monkeypatch.setenv("TIERSERVE__TIERS__PREFIX", "null")
    assert load(file).tiers.prefix is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("max_bytes: 1MiB", "tiers.prefix.max_bytes: should be"),
        ("store_after: 0", "tiers.prefix.store_after: should be greater than or equal to 1, not 0"),
        ("store_after: 16", "tiers.prefix.store_after: should be less than or equal to 15"),
        ("ttl_s: 0", "tiers.prefix.ttl_s: should be greater than 0"),
        ("min_tokens: 0", "tiers.prefix.min_tokens: should be"),
        ("warm_share: 1.5", "tiers.prefix.warm_share: should be less than or equal to 1"),
        ("warm_shar: 1", "tiers.prefix.warm_shar: unknown key; did you mean warm_share?"),
    ],
)
def test_mistakes_name_the_field(tmp_path: Path, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load(write(tmp_path, f"tiers: {{prefix: {{{field}}}}}"))


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("kv_transfer_config: {kv_connector: X}", "left out"),
        ("kv_offloading_size: 4", "left out"),
        ("prefix_caching_hash_algo: sha256", "sha256_cbor"),
        ("enable_prefix_caching: false", "true"),
        ("no_enable_prefix_caching: true", "left out"),
    ],
)
def test_an_engine_has_no_other_store(tmp_path: Path, option: str, right: str) -> None:
    models = f"models: {{m: {{source: embedded, engine: {{args: {{{option}}}}}}}}}"
    load(write(tmp_path, models))
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, f"{models}\ntiers: {{prefix: {{}}}}"))
    name = option.partition(":")[0]
    should = f"should be {right} while tiers.prefix is on"
    assert caught.value.mistakes == [f"models.m.engine.args.{name}: {should}"]


def test_what_fits_beside_it_is_no_mistake(tmp_path: Path) -> None:
    args = "{enable_prefix_caching: true, prefix_caching_hash_algo: sha256_cbor}"
    of_upstream = "{upstreams: ['http://h:1'], vllm: {enable_prefix_caching: false}}"
    load(
        write(
            tmp_path,
            f"models: {{m: {{source: embedded, engine: {{args: {args}}}}}, u: {of_upstream}}}\n"
            "tiers: {prefix: {}}",
        )
    )


@pytest.mark.parametrize("place", ["the configuration", "the environment"])
def test_an_allocator_that_vllm_refuses_beside_it_is_a_mistake(
    tmp_path: Path, place: str, monkeypatch
) -> None:
    name, value = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    env = ""
    if place == "the environment":
        monkeypatch.setenv(name, value)
    else:
        env = f", engine: {{env: {{{name}: '{value}'}}}}"
    models = f"models: {{m: {{source: embedded{env}}}}}"
    load(write(tmp_path, models))
    with pytest.raises(ConfigError, match=f"models.m.engine.env.{name}: should be without"):
        load(write(tmp_path, f"{models}\ntiers: {{prefix: {{}}}}"))


def test_check_says_which_folder_would_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        ("file/p", "tiers.prefix.path: should be a folder for us alone, not"),
        ("./d", "tiers.prefix.path: should be another folder than tiers.disk.path"),
    ):
        text = f"tiers: {{prefix: {{path: {path}}}, disk: {{path: d}}}}"
        assert main(["check", "--config", str(write(tmp_path, text))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


def test_check_notes_where_the_disk_has_less_room(tmp_path: Path, monkeypatch, capsys) -> None:
    file = write(tmp_path, "tiers: {prefix: {path: p, max_bytes: 1GiB}}")
    for free, notes in ((2**31, 0), (2**29, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Room(free))
        assert main(["check", "--config", str(file)]) == 0
        printed = capsys.readouterr().out
        assert printed.count("# tiers.prefix.max_bytes: there is room for 512.0MiB of") == notes
        assert yaml.safe_load(printed)["tiers"]["prefix"]["min_tokens"] == 256
    assert not (tmp_path / "p").exists()
