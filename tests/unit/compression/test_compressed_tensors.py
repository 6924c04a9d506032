from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from r1ray.compression.compressed_tensors import write_compressed_tensors
from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError
from r1ray.models import save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.config import Family
from r1ray.models.quantization import SCHEMES, quantize_modules
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.oracle import FAMILIES, random_ids

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_integers_and_gives_the_same_answers(
    family: Family, scheme: Scheme, tie_embeddings: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_embeddings=tie_embeddings)
    quantize_modules(model, scheme)
    save_model(model, tmp_path / "int8")
    write_compressed_tensors(tmp_path / "int8", tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    layer = theirs.model.layers[0].mlp.up_proj
    mine = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, mine.weight)
    assert torch.equal(layer.weight_scale.squeeze(1), mine.weight_scale)
    input_ids = random_ids(2, 24)
    with torch.inference_mode():
        expected, found = model(input_ids), theirs(input_ids).logits
    # Activations are rounded to 1/127 of the largest here and 1/127.5 there.
    assert (found - expected).norm() / expected.norm() < 0.02


def test_the_export_has_the_tokenizer_and_16_bit_embeddings(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "float")
    model = tiny_model()
    quantize_modules(model)
    save_model(model, tmp_path / "int8")
    copy_tokenizer(tmp_path / "float", tmp_path / "int8")
    write_compressed_tensors(tmp_path / "int8", tmp_path / "export")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert Tokenizer(tmp_path / "export").encode("the fox") == Tokenizer(tmp_path / "float").encode(
        "the fox"
    )


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    with pytest.raises(ArtifactError, match="is not quantized"):
        write_compressed_tensors(tmp_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()
