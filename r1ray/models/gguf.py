"""GGUF as a source: weights are dequantized to float32, the tokenizer goes through transformers.

llama.cpp stores the query and key rows of Llama models with the two halves of each rotary pair
interleaved; `_uninterleave` puts them back into Hugging Face's order. Qwen models are stored as is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import assign_weights
from r1ray.models.config import Family, ModelConfig, RopeConfig
from r1ray.models.decoder import Decoder
from r1ray.models.gguf_header import check_gguf_header

__all__ = ["BLOCK_NAMES", "OUTER_NAMES", "interleave", "load_gguf_model", "save_gguf_tokenizer"]

_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def load_gguf_model(path: str | Path) -> Decoder:
    """The float32 decoder stored in the GGUF file `path`.

    Raises:
        ArtifactError: not a GGUF file, a damaged one, or an architecture or rope scaling that is
            not supported.
    """
    check_gguf_header(path)
    try:
        return _load(path)
    # Whatever the gguf library and numpy make of keys and tensors that do not fit together.
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(f"{path}: cannot be read as GGUF ({error!r:.300})") from error


def _load(path: str | Path) -> Decoder:
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    config = _read_config(reader, names, where=path)
    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        if stored.name == "rope_freqs.weight":
            raise ArtifactError(
                f"{path}: rope frequency factors are not supported; use the original"
            )
        array = gguf.quants.dequantize(stored.data, stored.tensor_type)
        # A copy: float32 tensors are views of the read-only file.
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        tensors[_translate(stored.name, where=path)] = _uninterleave(stored.name, tensor, config)
    with torch.device("meta"):
        model = Decoder(config)
    assign_weights(model, tensors, where=Path(path))
    return model.eval()


def save_gguf_tokenizer(path: str | Path, target: str | Path, *, max_tokens: int) -> None:
    """Write the tokenizer and chat template inside the GGUF file `path` as Hugging Face files."""
    from transformers import AutoTokenizer

    path = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(target)


def _read_config(reader: Any, names: set[str], *, where: str | Path) -> ModelConfig:
    def read_optional(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    def read(key: str, default: Any = None) -> Any:
        value = read_optional(key)
        if value is None and default is None:
            raise ArtifactError(f"{where}: GGUF key {key} is missing")
        return default if value is None else value

    architecture = read("general.architecture")
    if architecture not in _FAMILIES:
        raise ArtifactError(f"{where}: architecture {architecture!r} is not llama, qwen2 or qwen3")
    scaling = read(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ArtifactError(f"{where}: rope scaling {scaling!r} in GGUF is not supported")
    get: Callable[..., Any] = lambda key, default=None: read(f"{architecture}.{key}", default)  # noqa: E731
    hidden_size, num_heads = get("embedding_length"), get("attention.head_count")
    return ModelConfig(
        family=_FAMILIES[architecture],
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=get("attention.key_length", hidden_size // num_heads),
        max_positions=get("context_length"),
        # GGUF keeps float32; the checkpoints' own values are short decimals.
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        rope=RopeConfig(theta=float(get("rope.freq_base", 10_000.0))),
        tie_embeddings="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        eos_token_ids=(read("tokenizer.ggml.eos_token_id"),),
        bos_token_id=read_optional("tokenizer.ggml.bos_token_id"),
        pad_token_id=read_optional("tokenizer.ggml.padding_token_id"),
    )


def _translate(name: str, *, where: str | Path) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in BLOCK_NAMES:
        raise ArtifactError(f"{where}: tensor {name!r} has no place in a Llama or Qwen decoder")
    return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"


def interleave(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The tensor as GGUF has it under `name`: rotary halves next to each other, where it is so."""
    heads = _count_interleaved(name, config)
    if heads is None:
        return tensor
    pairs = tensor.reshape(heads, 2, config.head_dim // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _uninterleave(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    heads = _count_interleaved(name, config)
    if heads is None:
        return tensor
    pairs = tensor.reshape(heads, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _count_interleaved(name: str, config: ModelConfig) -> int | None:
    """Heads in the tensor `name` if its rotary halves are interleaved, else None."""
    kind = name.split(".")[-2]
    if config.family != "llama" or kind not in ("attn_q", "attn_k"):
        return None
    return config.num_heads if kind == "attn_q" else config.num_kv_heads
