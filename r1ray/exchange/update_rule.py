"""How a mean gradient changes weights: AdamW at a scheduled rate, after clipping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UpdateRule"]


@dataclass(frozen=True)
class UpdateRule:
    """Attributes:
    learning_rate_at: the rate of an update by its number, from 0.
    num_steps: length of the run in steps.
    betas: Adam's decay rates of the first and second moment.
    weight_decay: decoupled, on matrices alone.
    max_grad_norm: global norm that larger gradients are scaled down to.
    """

    learning_rate_at: Callable[[int], float]
    num_steps: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def build_optimizer(
        self, matrices: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> torch.optim.AdamW:
        """AdamW on `matrices`, with weight decay, and `vectors`, without."""
        groups = [
            {"params": list(matrices), "weight_decay": self.weight_decay},
            {"params": list(vectors), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=self.betas, fused=True
        )

    def clip_factor(self, grad_norm: float) -> float:
        """What a gradient of this norm is multiplied by."""
        return min(1.0, self.max_grad_norm / (grad_norm + 1e-6))

    def set_rate(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Let the optimizer's next step run at `learning_rate`."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
