import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch

from r1ray.compression.gguf import write_gguf
from r1ray.errors import ArtifactError
from r1ray.models import load_model, save_model
from r1ray.models.config import Family, RopeConfig
from r1ray.models.gguf import load_gguf_model, save_gguf_tokenizer
from r1ray.models.quantization import quantize_modules
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.oracle import FAMILIES, random_ids

TEXT = "The quick fox said: it's 12 + 345, isn't it?\n\n  <|im_start|>user"


def _write(tmp_path: Path, family: Family = "llama", **changes: Any) -> Path:
    """A model directory with a tokenizer, and random biases and norms."""
    write_tiny_model(tmp_path)
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()))
    save_model(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_file_is_read_to_the_precision_of_q8_0(
    family: Family, tie_embeddings: bool, tmp_path: Path
) -> None:
    model_dir = _write(tmp_path / "model", family, tie_embeddings=tie_embeddings)
    write_gguf(model_dir, tmp_path / "m.gguf")
    model, again = load_model(model_dir), load_gguf_model(tmp_path / "m.gguf")
    assert dataclasses.replace(again.config, bos_token_id=0, pad_token_id=0) == model.config
    for name, tensor in model.state_dict().items():
        found = again.state_dict()[name]
        if tensor.dim() == 1:
            assert torch.equal(found, tensor), name
        elif name.startswith("model.layers."):
            # One float16 scale a block of 32: half a step off, and the scale rounded to 11 bits.
            bound = tensor.abs().max() * (0.5 / 127 + 2**-11)
            assert (found - tensor).abs().max() <= bound, name
        else:
            assert torch.equal(found, tensor.half().float()), name
    input_ids = random_ids(2, 20)
    with torch.inference_mode():
        expected, found = model(input_ids), again(input_ids)
    assert (found - expected).norm() / expected.norm() < 0.02


def test_the_gguf_library_reads_q8_0_blocks_and_the_vocabulary(tmp_path: Path) -> None:
    model_dir = _write(tmp_path / "model")
    write_gguf(model_dir, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = next(item for item in reader.tensors if item.name == "blk.1.ffn_up.weight")
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    weight = load_model(model_dir).model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(stored.data, expected)
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert types[3] == gguf.TokenType.NORMAL
    assert len(types) == 300
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert "im_start" in reader.get_field("tokenizer.chat_template").contents()


def test_the_tokenizer_comes_back_with_the_same_ids(tmp_path: Path) -> None:
    model_dir = _write(tmp_path / "model")
    write_gguf(model_dir, tmp_path / "m.gguf")
    (tmp_path / "again").mkdir()
    save_gguf_tokenizer(tmp_path / "m.gguf", tmp_path / "again", max_tokens=256)
    assert Tokenizer(tmp_path / "again").encode(TEXT) == Tokenizer(model_dir).encode(TEXT)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_of_a_quantized_model_the_served_values_are_written(
    scheme: Literal["w8a8", "w4a8"], tmp_path: Path
) -> None:
    model_dir = _write(tmp_path / "model")
    model = load_model(model_dir)
    quantize_modules(model, scheme)
    save_model(model, model_dir)
    write_gguf(model_dir, tmp_path / "m.gguf")
    found = load_gguf_model(tmp_path / "m.gguf").model.layers[0].mlp.up_proj.weight
    layer = model.model.layers[0].mlp.up_proj
    served = layer.weight * layer.weight_scale[:, None]
    assert (found - served).abs().max() <= served.abs().max() * (0.5 / 127 + 2**-11)


def test_layers_that_do_not_divide_into_blocks_stay_16_bit(tmp_path: Path) -> None:
    model_dir = _write(tmp_path / "model")
    config = load_model(model_dir).config
    config = dataclasses.replace(config, intermediate_size=48)
    model = type(tiny_model())(config)
    save_model(model, model_dir)
    write_gguf(model_dir, tmp_path / "m.gguf")
    kinds = {item.name: item.tensor_type for item in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] == gguf.GGMLQuantizationType.Q8_0


_SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "use_regex": True},
                ],
            },
            "smollm",
        ),
        (r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*", "qwen2"),
        (r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+", "llama-bpe"),
    ],
)
def test_pre_tokenizers_are_named_by_what_they_do(
    pre_tokenizer: Any, name: str, tmp_path: Path
) -> None:
    if isinstance(pre_tokenizer, str):
        split = {"type": "Split", "pattern": {"Regex": pre_tokenizer}}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
    model_dir = _write(tmp_path / "model")
    _edit_tokenizer(model_dir, pre_tokenizer=pre_tokenizer)
    write_gguf(model_dir, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == name


@pytest.mark.parametrize("pre_tokenizer", [None, {"type": "Whitespace"}, _SPLIT])
def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(
    pre_tokenizer: Any, tmp_path: Path
) -> None:
    model_dir = _write(tmp_path / "model")
    _edit_tokenizer(model_dir, pre_tokenizer=pre_tokenizer)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: the pre-tokenizer"):
        write_gguf(model_dir, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    model_dir = _write(tmp_path / "rope")
    model = load_model(model_dir)
    rope = RopeConfig(theta=1e4, type="linear", parameters={"factor": 2.0})
    scaled = type(model)(dataclasses.replace(model.config, rope=rope))
    save_model(scaled, model_dir)
    with pytest.raises(ArtifactError, match=r"positions are scaled \(linear\)"):
        write_gguf(model_dir, tmp_path / "m.gguf")
    model_dir = _write(tmp_path / "tokenizer")
    (model_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no readable tokenizer"):
        write_gguf(model_dir, tmp_path / "m.gguf")


def _edit_tokenizer(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | changes), encoding="utf-8")
