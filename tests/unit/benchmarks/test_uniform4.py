import pytest
import torch
from torch import Tensor

from jobs.benchmarks.uniform4 import best_uniform, group_size_for
from r1ray.compression.codebook import fit_rows


def _weights(rows: int = 16, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spare", [0.1, 0.25, 0.2778, 1.0, 5.0])
@pytest.mark.parametrize("bits", [16, 32])
def test_groups_never_spend_fewer_bits_than_the_codebooks(spare: float, bits: int) -> None:
    size = group_size_for(spare, 576, bits)
    num_groups = -(-576 // size)
    assert num_groups * bits >= spare * 576
    kind = "symmetric" if bits == 16 else "asymmetric"
    _, found = best_uniform(_weights(columns=576), torch.zeros(16, 576).bool(), spare)[kind]
    assert found >= 4 + spare


def test_weights_on_a_grid_come_back_exactly() -> None:
    steps = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0)).float()
    steps[:, 0], steps[:, 1] = 0.0, 15.0
    weight = steps * 0.125 - 0.5
    decoded, _ = best_uniform(weight, torch.zeros_like(weight).bool(), 0.5)["asymmetric"]
    torch.testing.assert_close(decoded, weight, rtol=0, atol=1e-3)


def test_clipping_is_better_than_the_largest_weight() -> None:
    weight = _weights()
    weight[:, 5] = 6.0
    nothing = torch.zeros_like(weight).bool()
    decoded, _ = best_uniform(weight, nothing, 0.25)["symmetric"]
    scale = weight.abs().amax(1, keepdim=True) / 7
    plain = (weight / scale).round() * scale
    assert (decoded - weight).square().sum() < 0.8 * (plain - weight).square().sum()


def test_outliers_stay_as_they_are_and_do_not_widen_their_group() -> None:
    weight = _weights()
    weight[:, 5] = 50.0
    mask = torch.zeros_like(weight).bool()
    mask[:, 5] = True
    decoded, _ = best_uniform(weight, mask, 0.25)["symmetric"]
    assert torch.all(decoded[:, 5] == 50.0)
    assert (decoded - weight).abs().max() < 0.6


@pytest.mark.parametrize(("has_heavy_tails", "most"), [(False, 0.9), (True, 0.75)])
def test_codebooks_lose_less_than_the_best_uniform_of_equal_bits(
    has_heavy_tails: bool, most: float
) -> None:
    """The squared error, weighted by importance, is at most this share of the best rival's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 576, generator=generator)
    if has_heavy_tails:
        weight = weight * weight.abs()
    importance = torch.randn(64, 576, generator=generator).exp()
    q, scale = fit_rows(weight, importance, outlier_share=0.0)
    spare = (16 * 8 + 32) / 576  # a row's values and its scale
    nothing = torch.zeros_like(weight).bool()

    def loss(decoded: Tensor) -> float:
        return float((importance * (decoded - weight).square()).sum())

    rivals = best_uniform(weight, nothing, spare).values()
    assert all(bits >= 4 + spare for _, bits in rivals)
    assert loss(q * scale[:, None]) < most * min(loss(decoded) for decoded, _ in rivals)
