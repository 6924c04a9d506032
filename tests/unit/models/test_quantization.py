from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError
from r1ray.models import load_model, save_model
from r1ray.models.config import Family
from r1ray.models.quantization import SCHEMES, fake_quantize_modules, quantize_modules
from r1ray.ops.int8 import Int8Linear
from tests.fakes import tiny_model
from tests.unit.oracle import FAMILIES, random_ids


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fake_quant_model_has_the_logits_of_the_served_one(
    family: Family, tie_embeddings: bool, scheme: Scheme
) -> None:
    trained = tiny_model(family, tie_embeddings=tie_embeddings)
    served = tiny_model(family, tie_embeddings=tie_embeddings)
    fake_quantize_modules(trained, scheme)
    quantize_modules(served, scheme)
    input_ids = random_ids(2, 24)
    with torch.inference_mode():
        expected, found = served(input_ids), trained(input_ids)
    # The same integers; sums of products are rounded in float32 there, exact here.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_round_trips_with_identical_logits(scheme: Scheme, tmp_path: Path) -> None:
    model = tiny_model()
    quantize_modules(model, scheme)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.scheme == scheme
    input_ids = random_ids(2, 16)
    with torch.inference_mode():
        assert torch.equal(again(input_ids), model(input_ids))


def test_four_bit_weights_take_half_a_byte_and_stay_within_seven(tmp_path: Path) -> None:
    model = tiny_model()
    quantize_modules(model, "w4a8")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Int8Linear)
    assert layer.weight.abs().max() == 7
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].shape == (64, 16)
    assert stored["model.embed_tokens.weight"].dtype == torch.int8


@pytest.mark.parametrize("columns", [15, 17])
def test_packed_weights_of_another_width_are_refused(columns: int, tmp_path: Path) -> None:
    model = tiny_model()
    quantize_modules(model, "w4a8")
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    stored[name] = torch.zeros(64, columns, dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"up_proj\.weight_packed .* 32 columns"):
        load_model(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quant_keeps_parameters_and_checkpoints_as_they_are(
    scheme: Scheme, tmp_path: Path
) -> None:
    model = tiny_model(tie_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    fake_quantize_modules(model, scheme)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.scheme is None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_weight_that_is_served_in_integers_gets_a_gradient_through_the_rounding() -> None:
    model = tiny_model(tie_embeddings=True)
    fake_quantize_modules(model, "w4a8")
    model(random_ids(2, 12)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
