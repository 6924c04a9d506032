import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1ray.errors import ArtifactError
from r1ray.models import Decoder
from r1ray.models.config import Family
from r1ray.models.gguf import load_gguf_model
from tests.fakes import tiny_model
from tests.unit.oracle import random_ids

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{kind}"


def _permute(array: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """llama.cpp's convert_hf_to_gguf.py: LlamaModel.permute."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _write(
    path: Path,
    model: Decoder,
    *,
    architecture: str | None = None,
    quantization: gguf.GGMLQuantizationType | None = None,
    keys: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture or config.family)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges([])
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        writer.add_string(key, value)
    for name, tensor in model.state_dict().items():
        if config.tie_embeddings and name.startswith("lm_head."):
            continue
        array = tensor.numpy()
        if config.family == "llama" and "self_attn.q_proj" in name:
            array = _permute(array, config.num_heads)
        if config.family == "llama" and "self_attn.k_proj" in name:
            array = _permute(array, config.num_kv_heads)
        if quantization is not None and array.ndim == 2:
            packed = gguf.quants.quantize(array, quantization)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(_gguf_name(name), array)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(
    family: Family, tie_embeddings: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_embeddings=tie_embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()))
    loaded = load_gguf_model(_write(tmp_path / "m.gguf", model))
    assert loaded.config == model.config.__class__(
        **{**vars(model.config), "bos_token_id": None, "pad_token_id": None}
    )
    input_ids = random_ids(2, 20)
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids), model(input_ids))


def test_quantized_weights_are_read_to_the_precision_they_are_stored_in(tmp_path: Path) -> None:
    model = tiny_model()
    path = _write(tmp_path / "m.gguf", model, quantization=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_gguf_model(path)
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        # Q8_0: one float16 scale per 32 values, |max| / 127 a step, half a step off, and the
        # scale itself rounded to 11 bits.
        bound = tensor.abs().max() * (0.5 / 127 + 2**-11) if tensor.dim() == 2 else 0.0
        assert (found - tensor).abs().max() <= bound, name


@pytest.mark.parametrize("keep_bytes", [0, 3, 40, 5000, -64])
def test_a_truncated_file_is_an_artifact_error(keep_bytes: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", tiny_model())
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(ArtifactError, match=r"m\.gguf"):
        load_gguf_model(path)


def _gguf(*, num_keys: int, keys: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys


def _key(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q1sI", 1, b"k", kind) + value


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (_gguf(num_keys=2**60), "bytes are to follow where the file has 0"),
        (_gguf(num_keys=0, num_tensors=2**60), "bytes are to follow where the file has 0"),
        (_gguf(num_keys=1, keys=_key(9, struct.pack("<IQ", 4, 2**30))), "more than 4000000 entr"),
        (_gguf(num_keys=1, keys=_key(9, struct.pack("<IQ", 4, 2**20))), "4194304 bytes are to"),
        (_gguf(num_keys=1, keys=_key(9, struct.pack("<IQ", 8, 2**20))), "8 bytes are to follow"),
        (_gguf(num_keys=1, keys=_key(9, struct.pack("<IQ", 9, 1))), "an array in an array"),
        (_gguf(num_keys=1, keys=_key(8, struct.pack("<Q", 2**63))), "bytes are to follow"),
        (_gguf(num_keys=1, keys=_key(99, b"")), "a value is of kind 99"),
        (
            _gguf(num_keys=0, num_tensors=1) + struct.pack("<Q1sI", 1, b"t", 2**31) + bytes(99),
            "2147483648 dimensions, more than 4",
        ),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1, not 2 or 3"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(
    data: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"m\.gguf: cannot be read as GGUF .*{complaint}"):
        load_gguf_model(tmp_path / "m.gguf")


def test_keys_that_do_not_fit_the_tensors_are_an_artifact_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", tiny_model())
    data = path.read_bytes()
    count = data.index(b"attention.head_count") + len(b"attention.head_count") + 4
    path.write_bytes(data[:count] + struct.pack("<I", 8) + data[count + 4 :])
    with pytest.raises(ArtifactError, match=r"m\.gguf: cannot be read as GGUF .*shape"):
        load_gguf_model(path)
    path.write_bytes(data.replace(b"t17", b"\xfft7"))
    with pytest.raises(ArtifactError, match=r"m\.gguf: cannot be read as GGUF .*Unicode"):
        load_gguf_model(path)


def test_a_file_that_is_no_gguf_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 50)
    with pytest.raises(ArtifactError, match="cannot be read as GGUF"):
        load_gguf_model(tmp_path / "m.gguf")
    with pytest.raises(ArtifactError, match="cannot be read as GGUF"):
        load_gguf_model(tmp_path / "absent.gguf")


def test_unsupported_contents_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    path = _write(tmp_path / "a.gguf", model, architecture="gemma3")
    with pytest.raises(ArtifactError, match="architecture 'gemma3'"):
        load_gguf_model(path)
    path = _write(tmp_path / "b.gguf", model, keys={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ArtifactError, match="rope scaling 'yarn'"):
        load_gguf_model(path)
    extra = {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    path = _write(tmp_path / "c.gguf", model, extra_tensors=extra)
    with pytest.raises(ArtifactError, match="rope frequency factors"):
        load_gguf_model(path)
    extra = {"blk.0.ffn_gate_exps.weight": np.ones((2, 4), dtype=np.float32)}
    path = _write(tmp_path / "d.gguf", model, extra_tensors=extra)
    with pytest.raises(ArtifactError, match=r"blk\.0\.ffn_gate_exps\.weight"):
        load_gguf_model(path)
