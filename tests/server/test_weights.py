"""Where weights are, and that they are part of what an answer is known by."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from server.config import Config, ConfigError, Model
from server.identity import Identity, fingerprint, identity
from server.weights import Weights, locate

CONFIG = Config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(40 * 1024**2))
    return tmp_path


def test_a_folder_is_itself(folder: Path) -> None:
    assert locate(Model(source=str(folder))) == Weights(str(folder))


def test_other_weights_are_known_by_another_name(folder: Path) -> None:
    weights = Weights(str(folder))
    before = identity(CONFIG, weights)
    assert identity(CONFIG, weights) == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(20 * 1024**2 + 1)
        file.write(b"x")
    changed = identity(CONFIG, weights)
    assert changed != before
    (folder / "config.json").write_text('{"a": 1}')
    assert identity(CONFIG, weights) != changed


def test_the_name_of_the_folder_does_not_matter(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder.rename(folder.parent / "moved")) == before


def test_options_that_change_output_are_known(folder: Path) -> None:
    def known(**args) -> str:
        return identity(Config.model_validate({"engine": {"args": args}}), Weights(str(folder)))

    assert known() != known(dtype="float32")
    assert known() == known(max_num_seqs=3)
    assert known() != identity(Config(model=Model(version="2")), Weights(str(folder)))


def test_files_that_options_name_are_known_by_their_content(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("a")
    args = {"chat_template": str(template), "lora_modules": [f"name={template}"]}
    for name, value in args.items():
        config = Config.model_validate({"engine": {"args": {name: value}}})
        template.write_text("a")
        before = identity(config, Weights(str(folder / "model.safetensors")))
        template.write_text("b")
        assert identity(config, Weights(str(folder / "model.safetensors"))) != before


def test_the_engines_environment_is_known(folder: Path) -> None:
    def known(**env) -> str:
        return identity(Config.model_validate({"engine": {"env": env}}), Weights(str(folder)))

    assert known() != known(VLLM_ATTENTION_BACKEND="x")
    assert known() == known(VLLM_CPU_KVCACHE_SPACE="3", HF_TOKEN="secret")


def test_a_template_that_tells_the_date_gives_other_keys_each_day(folder, monkeypatch) -> None:
    day = SimpleNamespace(today=lambda: "Monday")
    monkeypatch.setattr("server.identity.date", day)
    known = Identity(CONFIG, Weights(str(folder)))
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    dated = Identity(CONFIG, Weights(str(folder)))
    before = known(), dated()
    assert dated() == before[1]
    day.today = lambda: "Tuesday"
    assert known() == before[0]
    assert dated() != before[1]


def test_a_hubs_model_is_pinned_to_the_local_commit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    model = Model(source="some/model")
    assert locate(model) == Weights("some/model", commit)
    assert locate(Model(source="some/other")) == Weights("some/other", None)
    known = identity(CONFIG, locate(model))
    assert commit in known
    assert known != identity(CONFIG, Weights("some/model", "f" * 40))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("embedded", "the embedded model isn't prepared; run scripts/serve"),
        ("./nowhere", "should be a folder with a config.json"),
        ("{empty}", "should be a folder with a config.json"),
        ("a b", "should be 'embedded', a folder, or a hub's name, not 'a b'"),
    ],
)
def test_what_is_no_model_is_said(tmp_path: Path, monkeypatch, source: str, said: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        locate(Model(source=source.format(empty=tmp_path)))


def test_serve_says_it_and_ends(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {source: ./nowhere}\n")
    command = [sys.executable, "-m", "server.cli", "serve", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "model.source: ./nowhere should be a folder with a config.json\n"
