"""One optimizer step, free of Ray: accumulate, exchange, clip, AdamW.

1. Each of the worker's micro-batches adds the gradient of its summed loss.
2. The exchange turns the workers' sums into the mean gradient per target token, or says skip.
3. The global norm is clipped and AdamW steps at the scheduled learning rate. A skipped step counts
   for nothing: weights, optimizer and schedule stay as they were, only the data goes on.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from r1ray.config.schema import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ExchangeError
from r1ray.exchange import Exchange, StepTotals, Transport, Verdict
from r1ray.models.decoder import Decoder
from r1ray.training.loss import summed_loss
from r1ray.training.precision import Precision, agree_precision, autocast

__all__ = ["StepRecord", "TrainState", "learning_rate_at"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all workers.

    Attributes:
        loss: mean cross-entropy per target token, in nats; None where it is not finite.
        grad_norm: before clipping; None where nothing was applied.
        precision: number format of the matrix products, the same on all workers.
        seconds: wall time of the step on this worker; exchange_wait_s is the part spent waiting.
        was_skipped: the gradient was not finite and nothing was changed.
    """

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    num_tokens: int
    num_targets: int
    seconds: float
    exchange_wait_s: float
    was_skipped: bool
    precision: Precision


MAX_SKIPS_IN_A_ROW = 3


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to its final share; updates count from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    share = config.final_learning_rate_share
    return config.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


class TrainState:
    """Model, optimizer and exchange of one worker.

    Attributes:
        step: steps done, skipped ones included: the data cursor.
        num_updates: steps that changed the weights: the schedule's clock.
    """

    def __init__(
        self, model: Decoder, config: TrainConfig, exchange: Exchange, transport: Transport
    ) -> None:
        self.model = model.train()
        self.config = config
        self.step = 0
        self.num_updates = 0
        self._skips_in_a_row = 0
        self._device = model.model.norm.weight.device
        self._precision = agree_precision(config.precision, self._device, transport)
        self._parameters = [item for item in model.parameters() if item.requires_grad]
        self.exchange = exchange
        self.exchange.setup(self._parameters, transport)
        self.optimizer = _build_optimizer(self._parameters, config)

    def run_step(self, batches: Iterable[MicroBatch]) -> StepRecord:
        """One step over this worker's micro-batches; every worker calls it equally often.

        Args:
            batches: each is used up before the next one is asked for: they may share memory.
        Raises:
            ExchangeError: the workers could not be brought together, or the gradient was not finite
                for several steps in a row.
        """
        started = time.perf_counter()
        waited = self.exchange.stats().wait_s
        learning_rate = learning_rate_at(self.num_updates, self.config)
        self.exchange.on_grads_ready(self._accumulate(batches))
        verdict, totals = self.exchange.before_step()
        grad_norm = None
        if verdict == "apply":
            grad_norm = float(nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.num_updates += 1
        self._count_skips(verdict)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepRecord(
            step=self.step,
            loss=_mean_loss(totals),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=totals.num_tokens,
            num_targets=totals.num_targets,
            seconds=time.perf_counter() - started,
            exchange_wait_s=self.exchange.stats().wait_s - waited,
            was_skipped=verdict == "skip",
            precision=self._precision,
        )

    def _count_skips(self, verdict: Verdict) -> None:
        self._skips_in_a_row = self._skips_in_a_row + 1 if verdict == "skip" else 0
        if self._skips_in_a_row == MAX_SKIPS_IN_A_ROW:
            raise ExchangeError(
                f"the gradient was not finite in {MAX_SKIPS_IN_A_ROW} steps in a row, the last of "
                f"them step {self.step + 1}; lower train.learning_rate or look at the data"
            )

    def _accumulate(self, batches: Iterable[MicroBatch]) -> StepTotals:
        loss_sum, num_targets, num_tokens = 0.0, 0, 0
        for batch in batches:
            moved = dataclasses.replace(
                batch,
                input_ids_BT=batch.input_ids_BT.to(self._device),
                labels_BT=batch.labels_BT.to(self._device),
            )
            with autocast(self._precision, self._device):
                loss = summed_loss(self.model, moved)
            loss.backward()
            loss_sum += loss.item()
            num_targets += batch.num_targets
            num_tokens += batch.num_tokens
        return StepTotals(loss_sum, num_targets, num_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, as tensors and plain values."""
        return {
            "step": self.step,
            "num_updates": self.num_updates,
            "skips_in_a_row": self._skips_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "exchange": self.exchange.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, world_size_changed: bool) -> None:
        """Continue from `state_dict`; the model's weights are loaded apart."""
        self.step = state["step"]
        self.num_updates = state["num_updates"]
        self._skips_in_a_row = state["skips_in_a_row"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.exchange.load_state_dict(state["exchange"], world_size_changed=world_size_changed)


def _mean_loss(totals: StepTotals) -> float | None:
    if totals.num_targets == 0 or not math.isfinite(totals.loss_sum):
        return None
    return totals.loss_sum / totals.num_targets


def _build_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    matrices = [item for item in parameters if item.dim() >= 2]
    vectors = [item for item in parameters if item.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )
