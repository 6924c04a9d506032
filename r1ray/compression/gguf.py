"""GGUF for llama.cpp: linear layers as Q8_0 (int8, one float16 scale for 32 weights), a copy for
others; r1ray serves its own format.

Embeddings and head are float16, norms and biases float32, as llama.cpp's own converter has them.
Query and key rows of Llama models are interleaved, tokens carry their type, and the name of the
pre-tokenizer is found by what it does: llama.cpp has one implementation a name.

Price: 0.30 of the float32 bytes on SmolLM2, whose embedding is a fifth of it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1ray.errors import ArtifactError
from r1ray.files import TABLE_BYTES, read_json
from r1ray.models.checkpoint import load_model
from r1ray.models.config import ModelConfig
from r1ray.models.gates import is_gate
from r1ray.models.gguf import BLOCK_NAMES, OUTER_NAMES, interleave

__all__ = ["check_gguf", "write_gguf"]

_BLOCK_SIZE = 32  # columns of Q8_0
_GGUF_NAMES = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
_GGUF_OUTER_NAMES = {ours: theirs for theirs, ours in OUTER_NAMES.items()}
# What tells the pre-tokenizers of the supported families apart, most special first.
_SPLIT_NAMES = ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}|", "qwen2"))


def write_gguf(model_dir: str | Path, path: str | Path) -> None:
    """Write the model in `model_dir` with its tokenizer to the GGUF file `path`.

    Of a quantized model these are the values that it is served with, rounded once more.

    Raises:
        ArtifactError: as `check_gguf`.
    """
    model_dir = Path(model_dir)
    check_gguf(model_dir)
    model = load_model(model_dir)
    config = model.config
    writer = gguf.GGUFWriter(path, config.family)
    _add_shape(writer, config)
    _add_tokenizer(writer, model_dir, config)
    for name, tensor in _float_tensors(model.state_dict()).items():
        if is_gate(name) or (config.tie_embeddings and name.startswith("lm_head.")):
            continue
        stored_name = _translate(name)
        _add_tensor(writer, stored_name, interleave(stored_name, tensor.float(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(model_dir: Path) -> None:
    """Whether what is trained from this model can be written, before it is.

    Raises:
        ArtifactError: a rope scaling or tokenizer that cannot be written.
    """
    if (kind := ModelConfig.load(model_dir).rope.type) != "default":
        raise ArtifactError(
            f"{model_dir}: positions are scaled ({kind}), which cannot be written as GGUF; leave "
            "gguf out of compress.exports, or base.context"
        )
    _read_tokenizer(model_dir)


def _float_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor * tensors[f"{name}_scale"][:, None] if tensor.dtype == torch.int8 else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".weight_scale")
    }


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _read_tokenizer(model_dir: Path) -> tuple[Any, Any, str]:
    """(vocabulary, added tokens, llama.cpp's name for what comes before them)."""
    path = model_dir / "tokenizer.json"
    try:
        raw = read_json(path, max_bytes=TABLE_BYTES)
        vocabulary, added = raw["model"]["vocab"], raw["added_tokens"]
        kind, pre_tokenizer = raw["model"]["type"], raw["pre_tokenizer"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: no readable tokenizer ({error!r})") from error
    if kind != "BPE":
        raise ArtifactError(
            f"{path}: a {kind} tokenizer cannot be written as GGUF, only BPE; leave gguf out of "
            "compress.exports"
        )
    return vocabulary, added, _name_pre_tokenizer(pre_tokenizer, path)


def _add_tokenizer(writer: Any, model_dir: Path, config: ModelConfig) -> None:
    vocabulary, added, pre_name = _read_tokenizer(model_dir)
    # Rows of the embedding that no token has are filled up, as llama.cpp wants one name each.
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for entry in added:
        is_special = entry["special"]
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(False)  # chat templates write it where a model wants it
    special = gguf.SpecialVocab(model_dir, load_merges=True, n_vocab=config.vocab_size)
    special.add_special_token = {}  # one of them is set above
    special.add_to_gguf(writer, quiet=True)


def _name_pre_tokenizer(pre_tokenizer: Any, path: Path) -> str:
    """llama.cpp's name for what `pre_tokenizer`, of a tokenizer.json, does."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0].get("pattern", {}).get("Regex", ""))
        for part, name in _SPLIT_NAMES:
            if part in pattern:
                return name
    raise ArtifactError(
        f"{path}: the pre-tokenizer {kinds} has no counterpart in llama.cpp that r1ray knows; "
        "leave gguf out of compress.exports"
    )


def _add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    array: NDArray[Any] = tensor.detach().contiguous().numpy()
    kind = None
    if array.ndim == 2:
        is_layer = name.startswith("blk.") and array.shape[1] % _BLOCK_SIZE == 0
        if is_layer:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        else:
            array = array.astype(np.float16)
    writer.add_tensor(name, array, raw_dtype=kind)


def _translate(name: str) -> str:
    if name in _GGUF_OUTER_NAMES:
        return _GGUF_OUTER_NAMES[name]
    _, _, layer, *inner, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(inner)]}.{kind}"
