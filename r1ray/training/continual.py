"""One data set of a sequence: what training on it begins with, and what is left of it for the next.

1. `begin`: with `lora`, adapters are attached, and nothing else is trained.
2. `hold`: with `ewc`, the objective gets the penalty of what the data sets before have left behind.
3. `finish`: adapters are merged, and with `averaging` the weights averaged with the old ones.
4. `remember`: with `ewc`, the Fisher information of this data set is added to that of the others.

Replay is not here: `prepare` has mixed it into the batches (`r1ray.data.reservoir`). What the next
data set needs lies beside the model, in `memory/`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from r1ray.config.continual import ContinualConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.models.decoder import Decoder
from r1ray.models.lora import attach_adapters, merge_adapters
from r1ray.models.memory import FISHER_NAME, memory_path
from r1ray.training.consolidation import (
    Consolidation,
    add_fisher,
    load_fisher,
    measure_fisher,
    save_fisher,
)
from r1ray.training.objective import Objective

__all__ = ["average", "begin", "finish", "hold", "remember"]


def begin(model: Decoder, config: ContinualConfig) -> None:
    """Make `model` train as `config` says."""
    if config.lora is not None:
        attach_adapters(model, rank=config.lora.rank, alpha=config.lora.alpha)


def hold(objective: Objective, model: Decoder, config: ContinualConfig, start: Path) -> Objective:
    """`objective`, with the penalty if `config` has one and there is something to hold.

    Args:
        model: with the weights of `start`.
        start: model directory that training begins with.
    Raises:
        ArtifactError: what lies there does not fit the model.
    """
    if config.ewc is None:
        return objective
    fisher = load_fisher(memory_path(start, FISHER_NAME), model)
    if fisher is None:
        return objective
    return Consolidation(objective, model, fisher, config.ewc.strength)


def finish(model: Decoder, config: ContinualConfig, start: Mapping[str, Tensor]) -> None:
    """Turn what was trained into the model that is kept, in place.

    Args:
        start: state dict of the model that training began with.
    """
    if config.lora is not None:
        merge_adapters(model)
    if config.averaging is not None:
        average(model, start, config.averaging.start_share)


@torch.no_grad()
def average(model: Decoder, other: Mapping[str, Tensor], other_share: float) -> None:
    """Move every parameter of `model` to (1 - other_share) · its own + other_share · other's.

    Source: Wortsman et al. 2022, arXiv:2109.01903.
    """
    for name, item in model.named_parameters():
        item.lerp_(other[name].to(item), other_share)


def remember(
    model: Decoder, batches: Iterable[MicroBatch], start: Path, out_dir: Path, *, seed: int
) -> None:
    """Write the Fisher information of `batches`, and of what `start` remembers, beside `out_dir`'s
    model.
    """
    fisher = measure_fisher(model, batches, seed=seed)
    old = load_fisher(memory_path(start, FISHER_NAME), model)
    save_fisher(add_fisher(old, fisher), memory_path(out_dir, FISHER_NAME))
