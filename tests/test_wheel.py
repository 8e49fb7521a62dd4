"""The wheel and the source archive: what they hold, and what the installed wheel does elsewhere."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.server.conftest import CHAT, Front, Upstream

UV = (sys.executable, "-m", "uv")
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
LEFT_OUT = {".ci/run", ".pre-commit-config.yaml"}


class Built(NamedTuple):
    wheel: Path
    sdist: Path

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {*archive.namelist()}

    def read(self, name: str) -> str:
        """Return a file of the wheel's metadata."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(f"tierserve-{self.version}.dist-info/{name}").decode()

    @property
    def version(self) -> str:
        return self.wheel.name.split("-")[1]


def build(folder: Path, *options: str) -> None:
    subprocess.run([*UV, "build", "--quiet", "--out-dir", folder, *options], check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Both archives; the wheel is built from the other."""
    build(folder := tmp_path_factory.mktemp("dist"))
    return Built(*folder.glob("*.whl"), *folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory) -> Path:
    """The command of a wheel that is installed without extras: all that it needs is declared."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    options = ["--python", folder / "bin/python", "--constraint", "scripts/constraints-cpu.txt"]
    subprocess.run([*UV, "pip", "install", "--quiet", *options, built.wheel], check=True)
    return folder / "bin/tierserve"


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A folder of a user's, who has modules with the names of ours."""
    folder = tmp_path_factory.mktemp("empty")
    for name in ("server.py", "tiers.py"):
        (folder / name).write_text("raise SystemExit('not ours')\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder / "home"), "PATH": os.environ["PATH"]}


def run(command: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [command, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True
    )


def test_two_builds_are_the_same_bytes(built: Built, tmp_path: Path) -> None:
    # Both from the tree, while the other wheel is from the source archive.
    build(tmp_path, "--sdist", "--wheel")
    assert (tmp_path / built.sdist.name).read_bytes() == built.sdist.read_bytes()
    assert (tmp_path / built.wheel.name).read_bytes() == built.wheel.read_bytes()


@pytest.mark.skipif(not Path(".git").exists(), reason="git knows what is versioned")
def test_they_hold_what_is_versioned_and_no_more(built: Built) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    lines = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines()
    # Removed files stay listed until the next commit.
    versioned = {line for line in lines if Path(line).exists()}
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held == versioned - LEFT_OUT | {"PKG-INFO"}
    ours = {name for name in built.wheel_names() if ".dist-info/" not in name}
    assert ours == {name for name in versioned if name.startswith(("server/", "tiers/"))}


def test_licences_of_all_that_is_embedded(built: Built) -> None:
    metadata = email.message_from_string(built.read("METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    files = metadata.get_all("License-File")
    # Each set of data that isn't ours has its licence beside it.
    others = [name for name in built.wheel_names() if Path(name).name.startswith("LICENSE.")]
    assert {"LICENSE", *(name for name in others if ".dist-info/" not in name)} == {*files}
    for name in files:
        assert built.read(f"licenses/{name}") == Path(name).read_text()


def test_extras_that_are_missing_are_named(installed: Path, empty: Path) -> None:
    (empty / "engine.yaml").write_text("tracing: {endpoint: 'http://h:1'}\n")
    ran = run(installed, empty, "check", "--config", "engine.yaml")
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [
        "tracing: needs the extra tracing: install tierserve[tracing]",
        "models.smollm2-135m-instruct: needs vLLM, which isn't installed: install tierserve[cpu],"
        " or tierserve[cuda] for NVIDIA GPUs",
    ]
    ran = run(installed, empty, "bench", "http://127.0.0.1:9")
    needed = "httptools and matplotlib and numpy"
    assert ran.stderr == f"bench: needs {needed}: install tierserve[bench]\n"


class Installed(Front):
    """A front that the wheel's command serves from a folder, with a configuration of its own."""

    def __init__(self, temporary: Path, program: Path, folder: Path, config: str) -> None:
        super().__init__(temporary, {})
        variables = environment(folder) | {"TIERSERVE__SERVER__PORT": str(self.port)}
        self._command = [
            "env", "--ignore-environment", f"--chdir={folder}",
            *(f"{name}={value}" for name, value in variables.items()),
            str(program), "serve", "--config", config,
        ]  # fmt: skip

    @property
    def command(self) -> list[str]:
        return self._command


async def test_it_serves_from_an_empty_folder(installed: Path, empty: Path, tmp_path: Path) -> None:
    ran = run(installed, empty, "init")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "install tierserve[cpu,model]" in ran.stdout
    assert run(installed, empty, "config").stdout == Path("configs/reference.yaml").read_text()
    (empty / "trace.csv").write_text("time,key,size\n1,a,10\n2,a,10\n")
    ran = run(installed, empty, "simulate", "--config", "tierserve.yaml", "trace.csv")
    assert (ran.returncode, ran.stderr) == (0, "")
    front = Installed(tmp_path, installed, empty, "tierserve.yaml")
    upstream = Upstream()
    await upstream.start()
    config = empty / "tierserve.yaml"
    config.write_text(config.read_text().replace("http://127.0.0.1:8001", upstream.url))
    try:
        async with front:
            for page in ("/", "/pages/home.js", "/docs", "/openapi.json"):
                async with front.session.get(page) as response:
                    assert (response.status, page) == (200, page)
                    await response.read()
            assert "fwd=miss" in (await front.ask_alone(QUESTION))[1]
            assert "hit" in (await front.ask_alone(QUESTION))[1]
    finally:
        await upstream.stop()
    assert len([each for each in upstream.asked if each.path == CHAT]) == 1
