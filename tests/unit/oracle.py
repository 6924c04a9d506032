"""Tiny random transformers models: the oracle that r1ray's decoder is compared with."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from r1ray.models.config import Family

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")


def build_oracle(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 transformers model with random weights, biases and norms."""
    config_class, model_class = _CLASSES[family]
    settings = {**SHAPE, "rope_parameters": dict(DEFAULT_ROPE), **changes}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + spread if "norm" in name else 2.0 * spread)
    return model


def save_oracle(model: Any, path: Path) -> Path:
    """`model` as a Hugging Face directory without the files that greedy decoding does not need."""
    model.save_pretrained(path)
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of `path/config.json`; a value of None removes the key."""
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids outside the control tokens 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], shape, generator=generator)
