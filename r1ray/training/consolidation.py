"""Elastic weight consolidation: how much each weight matters, and a penalty on moving it.

1. After a data set was learned, the diagonal of the Fisher information is measured on it: the
   square of the gradient of log p(y), where y is drawn from the model itself. Such gradients have
   mean zero and are independent from one position to the next, so that the squared gradient of a
   whole micro-batch is, in the mean, the sum of its positions' squares. The targets of the data
   would give the "empirical" Fisher, which is another matrix, and near 0 where a model fits.
2. It is added to that of the data sets before. The weights at that moment are the anchor θ*.
3. While the next data set is learned, every target token's loss grows by
   strength / 2 · Σ F (θ - θ*)².

Price: two more copies of the weights on every worker (F and θ*), and a pass over the three for each
micro-batch; to measure, one backward for each of `fisher_batches`.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796; one anchor and a running sum: Schwarz et al.
2018, arXiv:1805.06370; why y is drawn: Kunstner et al. 2019, arXiv:1905.12558.

Shape legend: P target positions, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1ray.compression.distillation import target_logits
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ArtifactError, ShapeError
from r1ray.models.decoder import Decoder
from r1ray.training.objective import Objective

__all__ = ["Consolidation", "add_fisher", "load_fisher", "measure_fisher", "save_fisher"]

Fisher = Mapping[str, Tensor]
"""From a parameter's name to its share of the diagonal, float32, of its shape."""


def measure_fisher(
    model: Decoder, batches: Iterable[MicroBatch], *, seed: int
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a target token, the mean over `batches`.

    Gradients that `model` has are lost.

    Args:
        seed: of the tokens that are drawn.
    Raises:
        ShapeError: no batch has a target.
    """
    parameters = dict(model.named_parameters())
    fisher = {
        name: torch.zeros_like(item, dtype=torch.float32) for name, item in parameters.items()
    }
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(seed)
    num_targets = 0
    for batch in batches:
        model.zero_grad(set_to_none=True)
        logits_PV = target_logits(model, batch).float()
        drawn_P = torch.multinomial(logits_PV.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits_PV, drawn_P, reduction="sum").backward()
        num_targets += len(drawn_P)
        for name, item in parameters.items():
            if item.grad is not None:
                fisher[name].addcmul_(item.grad, item.grad)
    model.zero_grad(set_to_none=True)
    if num_targets == 0:
        raise ShapeError("the Fisher information is measured on target tokens, and there are none")
    return {name: total.div_(num_targets) for name, total in fisher.items()}


def add_fisher(old: Fisher | None, new: Fisher) -> dict[str, Tensor]:
    """The sum of both; `new` alone where there was none before."""
    return {name: item if old is None else item + old[name].to(item) for name, item in new.items()}


def save_fisher(fisher: Fisher, path: Path) -> None:
    """Write `fisher` to the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: item.contiguous() for name, item in fisher.items()}, path)


def load_fisher(path: Path, model: Decoder) -> dict[str, Tensor] | None:
    """What `save_fisher` wrote to `path`; None where nothing lies there.

    Raises:
        ArtifactError: it is damaged, or of another model than `model`.
    """
    if not path.is_file():
        return None
    try:
        fisher = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error})") from error
    for name, item in model.named_parameters():
        if name not in fisher or fisher[name].shape != item.shape:
            raise ArtifactError(f"{path}: has no {name} of shape {tuple(item.shape)}; remove it")
    return fisher


class Consolidation:
    """`inner` and the penalty; the anchor is `model` as it is given.

    Args:
        fisher: of all parameters of `model`.
        strength: of the penalty.
    """

    def __init__(self, inner: Objective, model: Decoder, fisher: Fisher, strength: float) -> None:
        self._inner, self._strength = inner, strength
        self._held = [
            (name, item.detach().clone(), fisher[name].to(item.device))
            for name, item in model.named_parameters()
        ]

    @property
    def recall(self) -> float | None:
        return self._inner.recall

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:
        return self._inner.draw(model, batch, step)

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        """The inner loss, and the penalty once for each of its target tokens."""
        return self._inner.loss(model, batch) + batch.num_targets * self.penalty(model)

    def penalty(self, model: Decoder) -> Tensor:
        """strength / 2 · Σ F (θ - θ*)²: a float32 scalar."""
        parameters = dict(model.named_parameters())
        terms = [
            (fisher * (parameters[name] - anchor).square()).sum()
            for name, anchor, fisher in self._held
        ]
        return 0.5 * self._strength * torch.stack(terms).sum()
