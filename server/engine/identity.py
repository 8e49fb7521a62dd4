"""What gives an answer, beside the request: weights, engine, and options that change output.

The identity is part of every key, so swapped weights or another engine can't serve old answers.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from server.config.models import ModelConfig
from server.engine.dtype import vllm_build
from server.engine.weights import Weights

# Where Hugging Face models keep them.
_TEMPLATES = ("tokenizer_config.json", "*chat_template*", "additional_chat_templates/*")
_WHOLE_BYTES = 32 * 1024**2
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_CHANGES_NO_ANSWER = frozenset(
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
    """Return what gives the answers of a model.

    `weights` are what an engine of ours is to load; `None` where somebody else runs it.
    """
    about: dict[str, Any] = {"version": model.version}
    if weights is None:
        about["model"] = [model.source, model.revision]
        if model.vllm is not None:
            about["vllm"] = _of_answers(model.vllm)
    else:
        about["model"] = [_content(weights.source), weights.revision]
        about["engine"] = vllm_build()
        about["args"] = _relevant(model.engine.args)
        about["env"] = _relevant(model.engine.env)
    return orjson.dumps(about, option=orjson.OPT_SORT_KEYS).decode()


def adapted(base: str, adapter: str, model: ModelConfig, weights: Weights | None) -> str:
    """Return what gives the answers of an adapter, given the identity of its model.

    Other adapters have no part in it.
    """
    content = model.adapters[adapter] if weights is None else fingerprint(weights.adapters[adapter])
    return f"{base} {content}"


def fingerprint(path: Path) -> str:
    """Return a digest of a file, or of the files of a folder.

    Small files are read whole; of large ones the size, the time of change, and samples spread
    over the file, since reading all weights would take minutes.
    """
    state = hashlib.blake2b(digest_size=32)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        stat = file.stat()
        state.update(f"{file.relative_to(path)}\0{stat.st_size}\0".encode())
        with file.open("rb") as stream:
            if stat.st_size <= _WHOLE_BYTES:
                state.update(stream.read())
                continue
            state.update(b"%d" % stat.st_mtime_ns)
            for sample in range(_SAMPLES):
                stream.seek(sample * (stat.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _relevant(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _content(value) for name, value in _of_answers(args).items()}


def _of_answers(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in _CHANGES_NO_ANSWER}


def _content(value: Any) -> Any:
    """Return the value, with digests of what is there in place of paths."""
    if isinstance(value, dict):
        return {name: _content(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_content(each) for each in value]
    if isinstance(value, str) and (
        Path(value).is_file() or ("/" in value and Path(value).is_dir())
    ):
        return [fingerprint(Path(value))]
    return value


def tells_time(model: ModelConfig, weights: Weights | None) -> bool:
    """Whether a chat template tells the time, as far as we can see it; if we can't, it may.

    Then it gives other prompts each day. What somebody else runs is theirs to see to.
    """
    if weights is None:
        return False
    if (folder := weights.folder) is None:
        return True
    given = str(model.engine.args.get("chat_template", ""))
    files = [Path(given)] if given and Path(given).is_file() else []
    files += [file for name in _TEMPLATES for file in folder.glob(name)]
    texts = [given, *(file.read_text(encoding="utf-8", errors="replace") for file in files)]
    return any("strftime_now" in text for text in texts)
