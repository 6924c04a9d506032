from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from r1ray.compression.codebook import fit_rows, measure_fisher, quantize_to_codebooks
from r1ray.models import load_model, save_model
from r1ray.ops.int8 import Int8Linear
from r1ray.training.loss import summed_loss
from tests.fakes import tiny_model
from tests.unit.oracle import random_ids
from tests.unit.training.batches import random_batch


def _weights(rows: int = 8, columns: int = 576, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _error(weight: Tensor, importance: Tensor, outlier_share: float = 0.0) -> float:
    q, scale = fit_rows(weight, importance, outlier_share=outlier_share)
    return float((importance * (q * scale[:, None] - weight).square()).mean())


def test_a_row_has_sixteen_values_and_its_share_of_outliers() -> None:
    weight = _weights()
    q, scale = fit_rows(weight, torch.ones_like(weight), outlier_share=0.0)
    assert max(len(row.unique()) for row in q) <= 16
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    q, _ = fit_rows(weight, torch.ones_like(weight), outlier_share=0.01)
    _, counts = zip(*(row.unique(return_counts=True) for row in q), strict=True)
    extra = sum(int(count.sort(descending=True).values[16:].sum()) for count in counts)
    assert extra <= round(0.01 * weight.numel())


def test_gaussian_weights_come_near_the_best_quantizer_of_16_levels() -> None:
    """Lloyd and Max: a mean squared error of 0.009501 of the variance (Max 1960, table 1)."""
    weight = _weights(rows=4, columns=20_000)
    assert 0.0090 < _error(weight, torch.ones_like(weight)) < 0.0105


def test_errors_go_where_they_cost_little() -> None:
    weight = _weights()
    importance = torch.where(weight > 0, 100.0, 1.0)
    q, scale = fit_rows(weight, importance, outlier_share=0.0)
    error = (q * scale[:, None] - weight).square()
    assert error[weight > 0].mean() < 0.5 * error[weight <= 0].mean()
    even = _error(weight, torch.ones_like(weight))
    assert _error(weight, importance) < 0.9 * 50.5 * even


def test_outliers_are_kept_to_half_an_int8_step() -> None:
    weight = _weights()
    weight[:, 7] = 8.0
    q, scale = fit_rows(weight, torch.ones_like(weight), outlier_share=0.005)
    step = scale[:, None]
    assert torch.all((q[:, 7:8] * step - 8.0).abs() <= 0.51 * step)
    with_outliers = _error(weight, torch.ones_like(weight), outlier_share=0.005)
    assert with_outliers < 0.95 * _error(weight, torch.ones_like(weight))


@pytest.mark.parametrize("columns", [1, 7])
def test_rows_of_few_values_are_exact_to_half_a_step(columns: int) -> None:
    weight = _weights(columns=columns)
    q, scale = fit_rows(weight, torch.ones_like(weight), outlier_share=0.0)
    assert torch.all((q * scale[:, None] - weight).abs() <= 0.51 * scale[:, None])


def test_rows_of_zeros_and_rows_without_importance_are_quantized_all_the_same() -> None:
    weight = _weights(rows=3)
    weight[1] = 0.0
    importance = torch.ones_like(weight)
    importance[2] = 0.0
    q, scale = fit_rows(weight, importance, outlier_share=0.001)
    assert torch.all(q[1] == 0)
    assert scale[1] == 1.0
    assert (q[2] * scale[2] - weight[2]).square().mean() < 0.012


def test_outliers_are_kept_where_they_matter_and_not_in_rows_without_importance() -> None:
    weight = _weights(rows=6)
    importance = torch.full_like(weight, 1e-8)
    importance[::2] = 0.0
    q, _ = fit_rows(weight, importance, outlier_share=0.01)
    for row in q[::2]:
        assert len(row.unique()) <= 16
    assert all(len(row.unique()) > 16 for row in q[1::2])


def test_fisher_is_the_sum_of_squared_gradients() -> None:
    model = tiny_model()
    batches = [random_batch(2, 8, seed=seed) for seed in range(3)]
    fisher = measure_fisher(model, batches)
    layer = model.model.layers[0].mlp.up_proj
    expected = torch.zeros_like(layer.weight)
    for batch in batches:
        (gradient,) = torch.autograd.grad(summed_loss(model, batch), layer.weight)
        expected += gradient.square()
    torch.testing.assert_close(fisher[layer], expected)
    assert len(fisher) == 14
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_codebooks_is_small_close_and_round_trips(tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(2, 24)
    save_model(model, tmp_path / "float")
    with torch.inference_mode():
        expected = model(ids)
    fisher = measure_fisher(model, [random_batch(4, 16, seed=0)])
    quantize_to_codebooks(model, fisher, outlier_share=0.0045)
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, Int8Linear)
    save_model(model, tmp_path / "codebook4")
    again = load_model(tmp_path / "codebook4")
    assert again.scheme == "codebook4"
    with torch.inference_mode():
        found = model(ids)
        assert torch.equal(again(ids), found)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert not any(isinstance(module, nn.Linear) for module in again.modules())
