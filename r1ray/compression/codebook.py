"""Non-uniform 4-bit weights: 16 values a row, placed where errors cost most.

1. The cost of an error is an estimate of the diagonal Fisher information: squared gradients of the
   loss of a few micro-batches of the training data, added up (`measure_fisher`).
2. Each row's values are clustered by weighted k-means, in the row's own int8 steps, so that what
   is decoded at load is exactly what was fitted.
3. The weights that then cost most are kept as they are (outliers), and the clusters fitted again
   without them.

It is a storage format: decoded to int8 at load (`r1ray.ops.codebook`), it saves bytes, not time.

Price: one backward a calibration micro-batch; about a minute of clustering for 100 million weights.

Source: SqueezeLLM, Kim et al. 2024, arXiv:2306.07629.

Shape legend: O rows, I columns, C = 16 codes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from r1ray.compression.distillation import cross_entropy, target_logits
from r1ray.data.batch_set import MicroBatch
from r1ray.models.decoder import Decoder
from r1ray.models.quantization import list_linears, quantize_modules
from r1ray.ops.codebook import NUM_CODES
from r1ray.ops.int8 import Int8Linear, row_scale

__all__ = ["fit_rows", "measure_fisher", "quantize_to_codebooks"]

_ROUNDS = 12  # k-means moves little after ten


def measure_fisher(model: Decoder, batches: Iterable[MicroBatch]) -> dict[nn.Linear, Tensor]:
    """Squared gradients of every linear layer's weight, added up over `batches`.

    Gradients that `model` has are lost.
    """
    linears = [linear for _, _, linear in list_linears(model)]
    fisher = {linear: torch.zeros_like(linear.weight) for linear in linears}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        cross_entropy(target_logits(model, batch), batch).backward()
        for linear, total in fisher.items():
            if linear.weight.grad is not None:
                total.addcmul_(linear.weight.grad, linear.weight.grad)
    model.zero_grad(set_to_none=True)
    return fisher


@torch.no_grad()
def quantize_to_codebooks(
    model: Decoder, fisher: dict[nn.Linear, Tensor], *, outlier_share: float
) -> None:
    """Quantize `model` in place: int8 in memory, its layers with 16 values a row and outliers."""
    fitted = {
        (parent, name): fit_rows(linear.weight, fisher[linear], outlier_share=outlier_share)
        for parent, name, linear in list_linears(model)
    }
    quantize_modules(model, "codebook4")
    for (parent, name), (q_OI, scale_O) in fitted.items():
        layer = getattr(parent, name)
        assert isinstance(layer, Int8Linear)
        layer.weight, layer.weight_scale = q_OI, scale_O


def fit_rows(
    weight_OI: Tensor, importance_OI: Tensor, *, outlier_share: float
) -> tuple[Tensor, Tensor]:
    """(int8 [O, I], scale [O]): at most 16 values a row, but for `outlier_share` of all weights.

    Args:
        importance_OI: what a squared error costs, at least 0; a row of zeros counts evenly.
    """
    scale_O1 = row_scale(weight_OI, 127)
    x_OI = weight_OI.float() / scale_O1
    true_cost_OI = importance_OI.float() * scale_O1.square()
    is_dead_O1 = true_cost_OI.sum(dim=1, keepdim=True) == 0
    cost_OI = true_cost_OI.masked_fill(is_dead_O1, 1.0)
    fitted_OI = _cluster(x_OI, cost_OI)
    num_outliers = round(outlier_share * x_OI.numel())
    if num_outliers:
        damage = (true_cost_OI * (x_OI - fitted_OI).square()).flatten()
        is_outlier_OI = torch.zeros_like(damage, dtype=torch.bool)
        is_outlier_OI[damage.topk(num_outliers).indices] = True
        is_outlier_OI = is_outlier_OI.view_as(x_OI)
        fitted_OI = _cluster(x_OI, cost_OI.masked_fill(is_outlier_OI, 0.0))
        fitted_OI = torch.where(is_outlier_OI, x_OI.round(), fitted_OI)
    return fitted_OI.to(torch.int8), scale_O1.squeeze(1)


def _cluster(x_OI: Tensor, cost_OI: Tensor) -> Tensor:
    """x with every row's values moved to the nearest of 16 integers, by weighted k-means.

    In the best quantizer of many levels, these lie as densely as (density of x · cost)^(1/3)
    (Panter and Dite 1951): there the clusters begin. A density is read off the distance between
    the neighbours of a sorted value.
    """
    ordered_OI, order_OI = x_OI.sort(dim=1)
    columns, reach = x_OI.shape[1], max(1, x_OI.shape[1] // (4 * NUM_CODES))
    places_I = torch.arange(columns)
    after_OI = ordered_OI[:, (places_I + reach).clamp(max=columns - 1)]
    spacing_OI = after_OI - ordered_OI[:, (places_I - reach).clamp(min=0)]
    levels_OI = (spacing_OI.square() * cost_OI.gather(1, order_OI)).pow(1 / 3).cumsum(dim=1)
    shares_C = (torch.arange(NUM_CODES) + 0.5) / NUM_CODES
    places_OC = torch.searchsorted(levels_OI, levels_OI[:, -1:] * shares_C)
    centers_OC = ordered_OI.gather(1, places_OC.clamp(max=columns - 1))
    for _ in range(_ROUNDS):
        nearest_OI = _nearest(x_OI, centers_OC)
        mass_OC = torch.zeros_like(centers_OC).scatter_add_(1, nearest_OI, cost_OI)
        total_OC = torch.zeros_like(centers_OC).scatter_add_(1, nearest_OI, cost_OI * x_OI)
        moved_OC = torch.where(mass_OC > 0, total_OC / mass_OC, centers_OC)
        centers_OC = moved_OC.sort(dim=1).values
    centers_OC = centers_OC.round().clamp(-127, 127)
    return centers_OC.gather(1, _nearest(x_OI, centers_OC))


def _nearest(x_OI: Tensor, centers_OC: Tensor) -> Tensor:
    """Index of the nearest of each row's ascending centers."""
    between = (centers_OC[:, 1:] + centers_OC[:, :-1]) / 2
    return torch.searchsorted(between, x_OI)
