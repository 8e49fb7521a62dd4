"""The reference of the configuration: it says all, and is what it describes."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from jsonschema import Draft202012Validator

from server.cli import main
from server.config.load import load
from server.config.reference import json_schema, reference
from server.config.schema import Config
from tests.server.config.test_config import sections

FILE = Path("configs/reference.yaml")
EXAMPLE = re.compile(r"^( *)#(?! )", re.MULTILINE)
FIELDS = [(section, name) for section in dict.fromkeys(sections()) for name in section.model_fields]


def uncommented(text: str) -> str:
    """Return the text with its examples in effect, those within examples too."""
    while EXAMPLE.search(text):
        text = EXAMPLE.sub(r"\1", text)
        # Within an example, prose and values are indented by a `#` that isn't at the margin.
        text = re.sub(r"^( *)#(  +)", r"\1\2", text, flags=re.MULTILINE)
    return text


def test_the_shipped_file_is_what_the_command_prints(capsys) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == FILE.read_text() == reference()
    assert main(["config", "--schema"]) == 0
    assert orjson.loads(capsys.readouterr().out) == json_schema()


def test_it_is_a_configuration_with_all_defaults(tmp_path: Path) -> None:
    (empty := tmp_path / "empty.yaml").touch()
    (tmp_path / "reference.yaml").write_text(reference())
    assert load(tmp_path / "reference.yaml") == load(empty)


def test_each_example_is_valid(tmp_path: Path) -> None:
    fields: dict[str, Any] = yaml.safe_load(uncommented(reference()))
    # Of those that exclude each other, one goes.
    ((name, model),) = fields["models"].items()
    del fields["tenants"]["key"], fields["tiers"]["disk"]["encryption_key"]
    hosted = {each: model.pop(each) for each in ("upstreams", "routing", "vllm", "api_key")}
    fields["models"]["hosted"] = hosted
    fields["models"]["of a hub"] = {"source": "Org/Model", "revision": model.pop("revision")}
    fields["models"][model["fallback"]] = {"source": name}
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(fields))
    Draft202012Validator(json_schema()).validate(fields)
    config = load(file)
    for section, name in (("server", "tls"), ("tiers", "shared"), ("cache", "rules")):
        assert getattr(getattr(config, section), name)
    assert config.tracing is not None


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_each_field_is_described(section, name: str) -> None:
    field = section.model_fields[name]
    holds = section is Config or name in {
        "engine",
        "memory",
        "disk",
        "shared",
        "prefix",
        "tls",
        "audit",
    }
    assert field.description or (holds and section.__doc__)
    assert re.search(rf"^[ #]*{name}:", reference(), re.MULTILINE)


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=str)
def test_the_schema_takes_what_is_shipped(file: Path) -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "{server: {prot: 1}}",
        "{server: {port: 70000}}",
        "{server: {max_body_bytes: 1}}",
        "{tiers: {memory: {policy: best}}}",
        "{tiers: {shared: {}}}",
        "{models: {}}",
    ],
)
def test_the_schema_refuses_mistakes(text: str) -> None:
    assert not Draft202012Validator(json_schema()).is_valid(yaml.safe_load(text))
