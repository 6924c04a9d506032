from typing import Any

import pytest
import torch

from r1ray.training.loss import summed_loss
from r1ray.training.precision import autocast, resolve_precision
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_f": True, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_multiplies_it(
    capabilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_bf16_keeps_float32_weights_gradients_and_loss() -> None:
    model, batch = tiny_model(), random_batch(2, 12, seed=0)
    exact = summed_loss(model, batch)
    with autocast("bf16", CPU):
        loss = summed_loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits of every product; the loss sums some ten targets.
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert loss.item() != exact.item()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_fp32_changes_nothing() -> None:
    model, batch = tiny_model(), random_batch(2, 12, seed=0)
    with autocast("fp32", CPU):
        assert torch.equal(summed_loss(model, batch), summed_loss(model, batch))
