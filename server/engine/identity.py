"""The identity of a model: its weights, its engine, and the options that change its output.

The identity is part of every key, so answers of other weights or of another engine are misses.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from server.config.models import ModelConfig
from server.engine.dtype import vllm_build
from server.engine.weights import Weights

# Files in which Hugging Face models keep their chat templates.
_TEMPLATE_FILES = ("tokenizer_config.json", "*chat_template*", "additional_chat_templates/*")
_READ_WHOLE_BYTES = 32 * 1024**2
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_NOT_IN_IDENTITY = frozenset(
    {
        "api_key", "api_server_count", "disable_log_stats", "download_dir", "enable_log_requests",
        "enable_prefix_caching", "gpu_memory_utilization", "max_num_batched_tokens",
        "max_num_seqs", "stream_interval", "uvicorn_log_level",
        "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN",
        "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_LOGGING_LEVEL",
    }
)  # fmt: skip


def identity(model: ModelConfig, weights: Weights | None) -> str:
    """Return the identity of a model.

    `weights` are those that our engine loads, `None` for upstreams that somebody else runs.
    """
    parts: dict[str, Any] = {"version": model.version}
    if weights is None:
        parts["model"] = [model.source, model.revision]
        if model.vllm is not None:
            parts["vllm"] = _output_options(model.vllm)
    else:
        parts["model"] = [_content(weights.source), weights.revision]
        parts["engine"] = vllm_build()
        parts["args"] = _output_options_by_content(model.engine.args)
        parts["env"] = _output_options_by_content(model.engine.env)
    return orjson.dumps(parts, option=orjson.OPT_SORT_KEYS).decode()


def adapter_identity(base: str, adapter: str, model: ModelConfig, weights: Weights | None) -> str:
    """Return the identity of an adapter; `base` is the identity of its model."""
    content = model.adapters[adapter] if weights is None else fingerprint(weights.adapters[adapter])
    return f"{base} {content}"


def weights_fingerprint(weights: Weights) -> str:
    """Return a digest of what the weights contain, whatever else an engine is told."""
    parts = [_content(weights.source), weights.revision]
    return hashlib.blake2b(orjson.dumps(parts), digest_size=32).hexdigest()


def fingerprint(path: Path) -> str:
    """Return a digest of a file, or of the files of a folder.

    Small files are read whole. Of large ones it has the size, the modification time, and samples
    from all over the file, since reading all weights would take minutes.
    """
    state = hashlib.blake2b(digest_size=32)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        stat = file.stat()
        state.update(f"{file.relative_to(path)}\0{stat.st_size}\0".encode())
        with file.open("rb") as stream:
            if stat.st_size <= _READ_WHOLE_BYTES:
                state.update(stream.read())
                continue
            state.update(b"%d" % stat.st_mtime_ns)
            for sample in range(_SAMPLES):
                stream.seek(sample * (stat.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _output_options_by_content(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _content(value) for name, value in _output_options(args).items()}


def _output_options(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in _NOT_IN_IDENTITY}


def _content(value: Any) -> Any:
    """Return the value, with the digests of files and folders in place of their paths."""
    if isinstance(value, dict):
        return {name: _content(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_content(each) for each in value]
    if isinstance(value, str) and (
        Path(value).is_file() or ("/" in value and Path(value).is_dir())
    ):
        return [fingerprint(Path(value))]
    return value


def depends_on_date(model: ModelConfig, weights: Weights | None) -> bool:
    """Whether a chat template inserts the date, so that its prompts differ each day.

    True where we can't see the template. False for upstreams that somebody else runs: their
    operator sets the model's version.
    """
    if weights is None:
        return False
    if (folder := weights.folder) is None:
        return True
    option = str(model.engine.args.get("chat_template", ""))
    files = [Path(option)] if option and Path(option).is_file() else []
    files += [file for name in _TEMPLATE_FILES for file in folder.glob(name)]
    texts = [option, *(file.read_text(encoding="utf-8", errors="replace") for file in files)]
    return any("strftime_now" in text for text in texts)
