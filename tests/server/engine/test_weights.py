"""Where weights are, and that they are part of what an answer is known by."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from server.config.base import ConfigError
from server.config.models import ModelConfig
from server.engine.identity import adapter_identity, depends_on_date, fingerprint, identity
from server.engine.weights import Weights, locate

MODEL = ModelConfig(source="s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        # It takes no room on the disk.
        file.truncate(40 * 1024**2)
    return tmp_path


def test_a_folder_is_itself(folder: Path) -> None:
    assert locate("m", ModelConfig(source=str(folder))) == Weights(str(folder))


def test_where_a_link_leads_later_is_no_matter(folder: Path, tmp_path_factory) -> None:
    link = tmp_path_factory.mktemp("linked") / "current"
    link.symlink_to(folder)
    assert locate("m", ModelConfig(source=str(link))) == Weights(str(folder))


def test_other_weights_are_known_by_another_name(folder: Path) -> None:
    weights = Weights(str(folder))
    before = identity(MODEL, weights)
    assert identity(MODEL, weights) == before
    model = folder / "model.safetensors"
    with model.open("r+b") as file:
        file.seek(20 * 1024**2 + 1)
        file.write(b"x")
    # Between the samples only the time tells, and a file system's clock may tick slowly.
    os.utime(model, ns=(0, model.stat().st_mtime_ns + 1))
    changed = identity(MODEL, weights)
    assert changed != before
    (folder / "config.json").write_text('{"a": 1}')
    assert identity(MODEL, weights) != changed


def test_the_name_of_the_folder_does_not_matter(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder.rename(folder.parent / "moved")) == before


def test_options_that_change_output_are_known(folder: Path) -> None:
    def known(**args) -> str:
        return identity(
            ModelConfig.model_validate({"source": "s", "engine": {"args": args}}),
            Weights(str(folder)),
        )

    assert known() != known(dtype="float32")
    assert known() == known(max_num_seqs=3)
    assert known() != identity(ModelConfig(source="s", version="2"), Weights(str(folder)))


def test_files_that_options_name_are_known_by_their_content(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("a")
    args = {"chat_template": str(template), "default_mm_loras": {"audio": str(template)}}
    for name, value in args.items():
        model = ModelConfig.model_validate({"source": "s", "engine": {"args": {name: value}}})
        template.write_text("a")
        before = identity(model, Weights(str(folder / "model.safetensors")))
        template.write_text("b")
        assert identity(model, Weights(str(folder / "model.safetensors"))) != before


def test_the_engines_environment_is_known(folder: Path) -> None:
    def known(**env) -> str:
        return identity(
            ModelConfig.model_validate({"source": "s", "engine": {"env": env}}),
            Weights(str(folder)),
        )

    assert known() != known(VLLM_ATTENTION_BACKEND="x")
    assert known() == known(VLLM_CPU_KVCACHE_SPACE="3", HF_TOKEN="secret")


def test_a_template_with_the_date_is_noticed(folder: Path) -> None:
    assert not depends_on_date(MODEL, Weights(str(folder)))
    assert not depends_on_date(MODEL, None)
    assert depends_on_date(MODEL, Weights("a/hubs"))
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert depends_on_date(MODEL, Weights(str(folder)))


def test_an_adapter_is_known_by_its_content(folder: Path, tmp_path_factory) -> None:
    def known(adapter: str | None) -> str:
        weights = locate("m", model)
        base = identity(model, weights)
        return base if adapter is None else adapter_identity(base, adapter, model, weights)

    adapters = {}
    for name in ("one", "other"):
        adapters[name] = tmp_path_factory.mktemp(name)
        (adapters[name] / "adapter_config.json").write_text("{}")
        (adapters[name] / "adapter_model.safetensors").write_text("a")
    model = ModelConfig(source=str(folder), adapters={n: str(path) for n, path in adapters.items()})
    base, one, other = known(None), known("one"), known("other")
    assert base == identity(MODEL, Weights(str(folder)))
    assert one == other != base
    (adapters["one"] / "adapter_model.safetensors").write_text("b")
    assert known("one") != one
    assert (known("other"), known(None)) == (other, base)


def test_an_adapter_that_somebody_else_runs_is_known_by_its_source() -> None:
    model = ModelConfig(upstreams=("http://h",), adapters={"one": "v1", "other": "v2"})
    base = identity(model, None)
    assert (
        len({base, *(adapter_identity(base, name, model, None) for name in ("one", "other"))}) == 3
    )


def test_a_hubs_adapter_is_a_folder_too(folder: Path, tmp_path_factory, monkeypatch) -> None:
    hub = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    snapshot = hub / "models--some--adapter/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (hub / "models--some--adapter/refs").mkdir()
    (hub / "models--some--adapter/refs/main").write_text("a" * 40)
    model = ModelConfig(source=str(folder), adapters={"poet": "some/adapter"})
    assert locate("m", model).adapters == {"poet": snapshot}
    missing = ModelConfig(source=str(folder), adapters={"poet": "some/other"})
    with pytest.raises(
        ConfigError, match=r"^models.m.adapters.poet: some/other can't be downloaded"
    ):
        locate("m", missing)


def test_a_hubs_model_is_pinned_to_the_local_commit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    model = ModelConfig(source="some/model")
    assert locate("m", model) == Weights("some/model", commit)
    assert locate("m", ModelConfig(source="some/other")) == Weights("some/other", None)
    known = identity(MODEL, locate("m", model))
    assert commit in known
    assert known != identity(MODEL, Weights("some/model", "f" * 40))


@pytest.mark.parametrize(
    ("source", "mistake"),
    [
        ("embedded", "the embedded model isn't prepared"),
        ("./nowhere", "should be a folder with a config.json"),
        ("{empty}", "should be a folder with a config.json"),
        ("a b", "should be 'embedded', a folder, or a hub's name, not 'a b'"),
    ],
)
def test_what_is_no_model_is_a_mistake(
    tmp_path: Path, monkeypatch, source: str, mistake: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=mistake):
        locate("m", ModelConfig(source=source.format(empty=tmp_path)))


def test_serve_prints_the_mistakes_and_ends(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("models: {m: {source: ./nowhere}, n: {source: ./none}}\n")
    command = [sys.executable, "-m", "server.cli", "serve", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "models.m.source: ./nowhere should be a folder with a config.json",
        "models.n.source: ./none should be a folder with a config.json",
    ]
