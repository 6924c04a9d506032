"""compressed-tensors `int-quantized`, which transformers and vLLM load; a copy for others.

Linear layers keep r1ray's own integers and scales: int8 per output channel, activations int8 per
token at run time. Embeddings and head are float16, norms and biases float32.

These libraries divide a token's largest activation by 127.5 where r1ray divides by 127, so logits
agree up to the rounding of activations, not bit for bit.

Source: https://github.com/vllm-project/compressed-tensors
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import WEIGHTS_NAME, copy_tokenizer, load_model
from r1ray.models.config import CONFIG_NAME
from r1ray.models.decoder import Decoder
from r1ray.models.gates import is_gate
from r1ray.ops.int8 import Int8Embedding, Int8Linear

__all__ = ["write_compressed_tensors"]


def write_compressed_tensors(model_dir: str | Path, out_dir: str | Path) -> None:
    """Write the quantized model in `model_dir` with its tokenizer into `out_dir`.

    Raises:
        ArtifactError: the model is not quantized.
    """
    model, out_dir = load_model(model_dir), Path(out_dir)
    if model.scheme is None:
        raise ArtifactError(f"{model_dir}: is not quantized; give the compressed model")
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(_list_tensors(model), out_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    config = model.config.to_hf() | {"quantization_config": _describe_quantization()}
    (out_dir / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(model_dir, out_dir)


def _list_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(("model.embed_tokens.", "lm_head.")) and not is_gate(name):
            tensors[name] = tensor[:, None] if name.endswith(".weight_scale") else tensor
    ends: dict[str, Any] = {"model.embed_tokens": model.model.embed_tokens}
    if not model.config.tie_embeddings:
        ends["lm_head"] = model.lm_head
    for name, module in ends.items():
        assert isinstance(module, Int8Embedding | Int8Linear)
        tensors[f"{name}.weight"] = (module.weight * module.weight_scale[:, None]).half()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _describe_quantization() -> dict[str, Any]:
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel", "dynamic": False},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
