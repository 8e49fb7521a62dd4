"""The Containerfile and the compose file."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from server.app import CLOSING_S
from server.config.load import load

FOLDER = Path("configs", "container")
CONTAINERFILE = FOLDER / "Containerfile"
TEXT = CONTAINERFILE.read_text().replace("\\\n", " ")
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def stages() -> dict[str, str]:
    """Return the instructions of each stage, by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint isn't there")
    ran = subprocess.run([program, "--no-color", CONTAINERFILE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_images_belong_to_nobody_and_front_is_the_default() -> None:
    made = stages()
    assert [*made][-1] == "front"
    for name in ("front", "cpu", "cuda"):
        assert re.findall("^USER (.*)$", made[name], re.MULTILINE) == ["10001:10001"]


def test_what_images_are_made_of_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE)
    named = {path for line in copied for path in line.split()}
    assert [path for path in named if not Path(path).exists()] == []
    kept = re.findall(r"^!(.+)$", Path(f"{CONTAINERFILE}.dockerignore").read_text(), re.MULTILINE)
    kept_paths = {str(path) for pattern in kept for path in Path().glob(pattern)}
    assert named <= kept_paths


def test_images_are_of_this_version_and_its_extras() -> None:
    (version,) = re.findall(r'image\.version="(.*?)"', TEXT)
    assert version == PROJECT["version"]
    assert set(re.findall(r"--extra (\S+)", TEXT)) <= PROJECT["optional-dependencies"].keys()


def test_the_compose_file_is_valid() -> None:
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas")
    from jsonschema import Draft202012Validator

    schema = schemas.get_builtin_schema("vendor.compose-spec")
    errors = Draft202012Validator(schema).iter_errors(COMPOSE)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_what_the_compose_file_names_is_there() -> None:
    assert (FOLDER / SERVICES["tierserve"]["build"]["context"] / CONTAINERFILE).is_file()
    assert SERVICES["tierserve"]["build"]["target"] in stages()
    for service in SERVICES.values():
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert source in COMPOSE["volumes"] or (FOLDER / source).exists()
        for config in service.get("configs", ()):
            assert yaml.safe_load(COMPOSE["configs"][config["source"]]["content"])
        assert set(service.get("depends_on", ())) <= SERVICES.keys()


def test_a_stop_has_time_to_end() -> None:
    server = load(FOLDER / "config.yaml").server
    grace_s = int(SERVICES["tierserve"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= server.drain_s + server.shutdown_grace_s + CLOSING_S


def test_prometheus_scrapes_as_it_does_elsewhere(tmp_path: Path) -> None:
    text = COMPOSE["configs"]["prometheus"]["content"]
    made, other = (
        {job["job_name"]: job.get("metrics_path") for job in yaml.safe_load(each)["scrape_configs"]}
        for each in (text, Path("configs", "prometheus", "scrape.yaml").read_text())
    )
    assert made == other
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(Path("configs", "prometheus", "alerts.yaml"), tmp_path)
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True)


def test_grafana_finds_the_dashboard() -> None:
    dashboards = yaml.safe_load(COMPOSE["configs"]["dashboards"]["content"])
    (provider,) = dashboards["providers"]
    assert f"../grafana:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    assert json.loads(Path("configs", "grafana", "tierserve.json").read_text())["uid"]
