from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import load_model, save_model
from r1ray.models.decoder import Decoder
from r1ray.models.lora import ADAPTERS_NAME, LoraLinear, attach_adapters, merge_adapters
from tests.fakes import tiny_model
from tests.unit.oracle import random_ids


def _adapted(family: str = "llama", *, is_trained: bool = True) -> Decoder:
    model = tiny_model(family)  # type: ignore[arg-type]
    torch.manual_seed(0)
    attach_adapters(model, rank=4, alpha=8.0)
    if is_trained:
        for module in model.modules():
            if isinstance(module, LoraLinear):
                torch.nn.init.normal_(module.lora_b, std=0.1)
    return model


def test_fresh_adapters_change_nothing_and_alone_are_trained() -> None:
    ids_BT = random_ids(2, 12, seed=0)
    model = _adapted(is_trained=False)
    assert torch.equal(model(ids_BT), tiny_model()(ids_BT))
    trained = {
        name.rsplit(".", 1)[1] for name, item in model.named_parameters() if item.requires_grad
    }
    assert trained == {"lora_a", "lora_b"}
    count = sum(item.numel() for item in model.parameters() if item.requires_grad)
    # Two layers: q, o 32 x 32; k, v 16 x 32; gate, up, down 64 x 32; rank 4.
    assert count == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_logits_are_those_of_the_adapters(family: str) -> None:
    ids_BT = random_ids(2, 12, seed=0)
    model = _adapted(family)
    before = model(ids_BT)
    assert (before - tiny_model(family)(ids_BT)).abs().max() > 0.01  # type: ignore[arg-type]
    merge_adapters(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(item.requires_grad for item in model.parameters())
    assert model.state_dict().keys() == tiny_model(family).state_dict().keys()  # type: ignore[arg-type]
    # (W + sBA)x against Wx + sB(Ax): float32 rounding of sums of at most 64 terms, two layers.
    torch.testing.assert_close(model(ids_BT), before, atol=2e-5, rtol=1e-4)


def test_adapters_lie_beside_the_weights_until_they_are_merged(tmp_path: Path) -> None:
    model = _adapted()
    save_model(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == tiny_model().state_dict().keys()
    ids_BT = random_ids(2, 12, seed=0)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(ids_BT), model(ids_BT))
    merge_adapters(loaded)
    save_model(loaded, tmp_path)
    assert not (tmp_path / ADAPTERS_NAME).exists()
    plain = load_model(tmp_path)
    assert not any(isinstance(module, LoraLinear) for module in plain.modules())


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    save_model(_adapted(), tmp_path)
    file = tmp_path / ADAPTERS_NAME
    tensors = load_file(file)
    save_file(tensors, file)  # without the scale
    with pytest.raises(ArtifactError, match="no readable adapters"):
        load_model(tmp_path)
    name = next(name for name in tensors if name.endswith("lora_b"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, metadata={"scale": "2.0"})
    with pytest.raises(ArtifactError, match=rf"{name} has the shape \(31, 4\)"):
        load_model(tmp_path)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ArtifactError, match="no readable adapters"):
        load_model(tmp_path)
