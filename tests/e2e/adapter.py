"""A LoRA adapter for the embedded model."""

from pathlib import Path

import numpy
import orjson
from safetensors.numpy import save_file

from server.engine.weights import embedded_folder

_RANK = 8


def make_adapter(folder: Path, seed: int = 0) -> None:
    """Write an adapter that changes by chance what the embedded model says."""
    model = orjson.loads((embedded_folder() / "config.json").read_bytes())
    width, chance = model["hidden_size"], numpy.random.default_rng(seed)
    heads = model["num_attention_heads"] * model["head_dim"]
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{{}}.weight"
        for part, shape in (("A", (_RANK, width)), ("B", (heads, _RANK))):
            tensors[name.format(part)] = chance.normal(0, 0.5, shape).astype(numpy.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_bytes(orjson.dumps(config))
