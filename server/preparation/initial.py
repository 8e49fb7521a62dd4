"""The configuration that `tierserve init` writes: for this machine, with comments.

Its sizes are shares of what the machine has. The model is one that the installed vLLM can run
here, or else stands for servers that the user runs.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from server.config.base import ConfigError
from server.config.folders import NO_HOME, cache_folder
from server.config.models import EMBEDDED, EMBEDDED_NAME
from server.engine.dtype import vllm_build
from server.engine.weights import lacks_what_prepares
from server.preparation.machine import Machine, this_machine

_GIB, _MIB = 1024**3, 1024**2
# Models by the memory that a GPU has to have, and the tokens of a prompt that it then has room for.
_FOR_GPUS = (
    (40 * _GIB, "Qwen/Qwen3-8B", 32_768),
    (22 * _GIB, "Qwen/Qwen3-8B", 8_192),
    (0, "Qwen/Qwen3-0.6B", 8_192),
)
_SMALL = "Qwen/Qwen3-0.6B"


class InstalledEngine(NamedTuple):
    """The engine that is installed."""

    build: str
    """Name and version of vLLM; empty if there is none."""
    can_embed: bool
    """Whether the embedded model can be prepared."""


def write(file: Path) -> Iterator[str]:
    """Write a configuration for this machine to `file`; yields lines that say what to do next.

    Raises:
        ConfigError: the file is there already, or can't be written.
    """
    if (caches := cache_folder()) is None:
        raise ConfigError([NO_HOME])
    machine = this_machine(caches)
    engine = InstalledEngine(vllm_build(), not lacks_what_prepares())
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(initial(machine, engine))
    except FileExistsError:
        raise ConfigError([f"{file}: should be a new file; this one is there already"]) from None
    except OSError as exc:
        raise ConfigError([f"{file}: can't be written: {exc.strerror}"]) from exc
    yield f"{file}: a configuration for {machine}"
    yield from _advice(machine, engine)
    yield f"Look through it, then: tierserve serve --config {quote(_as_argument(file))}"


def _as_argument(file: Path) -> str:
    """Return a path so that it isn't taken for an option."""
    return f"./{file}" if str(file).startswith("-") else str(file)


def initial(machine: Machine, engine: InstalledEngine) -> str:
    """Return a configuration for a machine, as commented YAML."""
    on_gpu, on_cpu = _runs_on_gpu(machine, engine), _runs_on_cpu(engine)
    model = _UPSTREAM
    if on_gpu:
        model = _gpu_model(machine)
    elif on_cpu:
        model = _cpu_model(machine, engine)
    prefix = _PREFIX.format(size=_size(machine.free_disk_bytes // 8, 64 * _MIB, 256 * _GIB))
    if not on_cpu:
        prefix = _NO_PREFIX + textwrap.indent(textwrap.dedent(prefix), "  # ")
    return _TEXT.format(
        machine=machine,
        model=model.rstrip("\n"),
        memory=_size(machine.memory_bytes // 32, 64 * _MIB, 8 * _GIB),
        disk=_size(machine.free_disk_bytes // 16, 64 * _MIB, 64 * _GIB),
        prefix=prefix.rstrip("\n"),
    )


def _runs_on_cpu(engine: InstalledEngine) -> bool:
    return "cpu" in engine.build


def _runs_on_gpu(machine: Machine, engine: InstalledEngine) -> bool:
    return bool(engine.build and machine.gpus) and not _runs_on_cpu(engine)


def _advice(machine: Machine, engine: InstalledEngine) -> Iterator[str]:
    """Yield what the user should know about the model, or has to change."""
    if _runs_on_cpu(engine):
        if machine.gpus:
            yield "vLLM's CPU build is installed; for the GPU install tierserve[cuda] in its place."
        if not engine.can_embed:
            yield f"The model is {_SMALL} of Hugging Face; with tierserve[model] the embedded one."
    elif _runs_on_gpu(machine, engine):
        yield "The model comes from Hugging Face; name another, or a folder, as you like."
    elif engine.build:
        yield "vLLM for GPUs is installed and nvidia-smi finds none: name a server of yours in it."
    else:
        yield "vLLM isn't installed: name a server of yours in it, or install tierserve[cpu,model]"
        yield "(tierserve[cuda] for NVIDIA GPUs) and write another file."


def _cpu_model(machine: Machine, engine: InstalledEngine) -> str:
    source = EMBEDDED if engine.can_embed else _SMALL
    name = EMBEDDED_NAME if engine.can_embed else _SMALL.rpartition("/")[2]
    return _CPU_MODEL.format(
        name=name.lower(),
        source=source,
        kv=max(1, min(machine.memory_bytes // _GIB // 8, 16)),
    )


def _gpu_model(machine: Machine) -> str:
    memory = machine.gpus[0].memory_bytes
    source, tokens = next(each[1:] for each in _FOR_GPUS if memory >= each[0])
    several = _SEVERAL_GPUS.format(gpus=count) if (count := len(machine.gpus)) > 1 else ""
    name = source.rpartition("/")[2].lower()
    return _GPU_MODEL.format(name=name, source=source, tokens=tokens, several=several)


def _size(size: int, least: int, most: int) -> str:
    """Return the greatest power of two up to `size`, within a range of such, with its unit."""
    power = 1 << (max(least, min(size, most)).bit_length() - 1)
    return f"{power // _GIB}GiB" if power >= _GIB else f"{power // _MIB}MiB"


_TEXT = """\
# For {machine}.
# `tierserve config` prints every field; `tierserve check --config FILE` finds mistakes.
server:
  host: 127.0.0.1 # of this machine alone; 0.0.0.0 for other machines, and then with tenants
  port: 8000
  workers: auto # processes that answer clients: as many as engines leave CPUs

# Who may send requests: without this, everybody who can connect. `tierserve keys new NAME` makes
# keys, and prints their lines for the file.
# tenants: {{file: tenants.yaml}}

models: # by the names that clients use; a request that names none is for the first
{model}

cache:
  ttl_s: 604800 # a week; `rules` has others by model and route
  stale_if_error_s: 3600 # seconds after `ttl_s` in which a stale answer replaces a failing engine

tiers: # nearest first
  memory:
    max_bytes: {memory}
  disk: # in the cache folder unless `path` is given, as the prefix tier
    max_bytes: {disk}
{prefix}
  # For several servers that share answers, with tierserve[redis] or tierserve[memcached]:
  # shared: {{url: "redis://127.0.0.1:6379/0"}}
"""
_PREFIX = """\
  prefix: # what the engine computed of prompts' beginnings, kept over restarts
    max_bytes: {size}
"""
_NO_PREFIX = """\
  # For engines of ours; it hasn't run on a GPU yet:
"""
_CPU_MODEL = """\
  {name}:
    source: {source} # or a folder, or a Hugging Face name
    engine:
      args: # vLLM's own options
        max_model_len: 4096
        enforce_eager: true # starts in half a minute instead of two
        enable_prompt_tokens_details: true # reports reused prompt tokens in `usage`
      env:
        VLLM_CPU_KVCACHE_SPACE: "{kv}" # GiB of memory for the engine's own cache
        # Without this, the first request for logprobs waits 10 s for a compiler:
        TORCHDYNAMO_DISABLE: "1"
  # A model on servers that you run yourself:
  # big: {{upstreams: ["http://host:8000"]}}
"""
_GPU_MODEL = """\
  {name}:
    source: {source} # or a folder, or another Hugging Face name
    engine:
      args: # vLLM's own options
        max_model_len: {tokens}
        gpu_memory_utilization: 0.9
        enable_prompt_tokens_details: true # reports reused prompt tokens in `usage`
{several}\
  # A model on servers that you run yourself:
  # big: {{upstreams: ["http://host:8000"]}}
"""
_SEVERAL_GPUS = """\
        # tensor_parallel_size: {gpus} # one engine over all GPUs, for a larger model
"""
_UPSTREAM = """\
  my-model: # the upstream knows the model by this name
    upstreams: ["http://127.0.0.1:8001"] # servers that you run yourself, one or more
    # vllm: {} # their options, if they are vLLM 0.32
    # api_key: … # by TIERSERVE__MODELS__MY_MODEL__API_KEY rather than here
"""
