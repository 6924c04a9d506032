"""One training step, free of Ray: accumulate gradients, exchange.

1. Each of the worker's micro-batches adds the gradient of its summed loss.
2. The exchange turns the workers' sums into updated weights, the same on all of them, or says skip:
   weights, optimizer and schedule stay as they were, only the data goes on.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r1ray.config.schema import Scheme
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.exchange import Exchange, StepTotals, Transport, UpdateRule
from r1ray.models.decoder import Decoder
from r1ray.models.quantization import fake_quantize_modules
from r1ray.models.rotation import rotated
from r1ray.training.objective import CrossEntropy, Objective
from r1ray.training.precision import Precision, PrecisionName

__all__ = ["StepRecord", "TrainState", "learning_rate_at"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all workers.

    Sums are over all workers, or this worker's own where the step is local (`Exchange.is_local`).

    The first block is of the updates that finished in this step: its own with a synchronous
    exchange, an earlier one's with an asynchronous one, none at its first step, two where a
    checkpoint waits for what is under way.

    Attributes:
        loss: mean of the objective per target token, in nats; None where nothing finished, or
            where it is not finite.
        learning_rate, grad_norm: the latter before clipping; None where nothing was applied.
        was_skipped: a gradient was not finite and nothing was changed.
        precision: number format of the matrix products, the same on all workers.
        loss_scale: what this step's loss was multiplied by before its backward.
        num_promoted: tensor groups that ran in fp32 instead.
        seconds: wall time of the step on this worker; exchange_wait_s is the part spent waiting.
        sent_bytes, received_bytes: payload of this worker in this step.
        residual_norm: of the error feedback that this worker keeps.
        staleness_steps: age of the applied gradient in updates.
        recall: of this worker's last micro-batch, as in `Objective`.
        is_local: sums are this worker's own.
    """

    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    num_tokens: int
    num_targets: int
    was_skipped: bool
    precision: PrecisionName
    loss_scale: float
    num_promoted: int
    seconds: float
    exchange_wait_s: float
    sent_bytes: int
    received_bytes: int
    residual_norm: float
    staleness_steps: int
    recall: float | None = None
    is_local: bool = False

    def describe(self) -> str:
        """A few words for the progress line."""
        if self.was_skipped:
            return "not finite, skipped"
        if self.loss is None or self.learning_rate is None:
            return "the first update is under way"
        recall = "" if self.recall is None else f"recall {100 * self.recall:.1f}%  "
        return (
            f"loss {self.loss:.3f}  {recall}lr {self.learning_rate:.1e}  "
            f"{self.num_tokens / self.seconds:.0f} tokens/s  "
            f"stalled {100 * self.exchange_wait_s / self.seconds:.0f}%"
        )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to its final share; updates count from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    share = config.final_learning_rate_share
    return config.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


class TrainState:
    """Model and exchange of one worker.

    Args:
        objective: what is minimised; cross-entropy with the targets if None.

    Attributes:
        step: steps done, skipped ones included: the data cursor.
    """

    def __init__(
        self,
        model: Decoder,
        config: TrainConfig,
        exchange: Exchange,
        transport: Transport,
        objective: Objective | None = None,
    ) -> None:
        self.model = model.train()
        self._objective = objective or CrossEntropy()
        self.config = config
        self.step = 0
        self._is_rotated = False
        self._device = model.model.norm.weight.device
        self._precision = Precision(model, config, transport)
        self.exchange = exchange
        parameters = [item for item in model.parameters() if item.requires_grad]
        self.exchange.setup(parameters, transport, _build_rule(config))

    def run_step(self, batches: Iterable[MicroBatch], *, flush: bool = False) -> StepRecord:
        """One step over this worker's micro-batches; every worker calls it equally often.

        Args:
            batches: each is used up before the next one is asked for: they may share memory.
            flush: finish what the exchange has under way, as before a checkpoint.
        Raises:
            ExchangeError: the workers could not be brought together.
            DivergenceError: the gradient was not finite for several steps in a row.
        """
        started = time.perf_counter()
        before = self.exchange.stats()
        loss_scale, num_promoted = self._precision.loss_scale, self._precision.num_promoted
        totals = self._accumulate(batches)
        was_local = self.exchange.is_local
        outcomes = [self.exchange.step(totals)]
        is_local = was_local or self.exchange.is_local  # it may begin or end with a step
        if flush:
            outcomes.append(self.exchange.flush())
            is_local = is_local or self.exchange.is_local  # or with a flush
        self.model.zero_grad(set_to_none=True)
        for outcome in outcomes:
            self._precision.update(outcome, is_local=is_local)
        if is_local and (flush or not self.exchange.is_local):
            self._precision.agree()
        self.step += 1
        after = self.exchange.stats()
        applied = [item for item in outcomes if item.verdict == "apply"]
        num_targets = sum(item.totals.num_targets for item in outcomes)
        return StepRecord(
            step=self.step,
            loss=_mean_loss(sum(item.totals.loss_sum for item in outcomes), num_targets),
            learning_rate=applied[-1].learning_rate if applied else None,
            grad_norm=applied[-1].grad_norm if applied else None,
            num_tokens=sum(item.totals.num_tokens for item in outcomes),
            num_targets=num_targets,
            was_skipped=any(item.verdict == "skip" for item in outcomes),
            precision=self._precision.name,
            loss_scale=loss_scale,
            num_promoted=num_promoted,
            seconds=time.perf_counter() - started,
            exchange_wait_s=after.wait_s - before.wait_s,
            sent_bytes=after.sent_bytes - before.sent_bytes,
            received_bytes=after.received_bytes - before.received_bytes,
            residual_norm=after.residual_norm,
            staleness_steps=after.staleness_steps,
            recall=self._objective.recall,
            is_local=is_local,
        )

    def begin_rounding(self, scheme: Scheme, *, is_rotated: bool) -> None:
        """From the next step on, train through the rounding of `scheme`.

        Args:
            is_rotated: round in the basis of `r1ray.models.rotation`.
        """
        fake_quantize_modules(self.model, scheme)
        self._is_rotated = is_rotated

    def _accumulate(self, batches: Iterable[MicroBatch]) -> StepTotals:
        loss_sum, num_targets, num_tokens = 0.0, 0, 0
        with rotated(self.model) if self._is_rotated else contextlib.nullcontext():
            for batch in batches:
                drawn = self._objective.draw(self.model, batch.to(self._device), self.step)
                with self._precision.autocast():
                    loss = self._objective.loss(self.model, drawn)
                (loss * self._precision.loss_scale).backward()
                loss_sum += loss.item()
                num_targets += drawn.num_targets
                num_tokens += drawn.num_tokens
        return StepTotals(loss_sum, num_targets, num_tokens, self._precision.measure())

    def shared_state_dict(self) -> dict[str, Any]:
        """What is the same on every worker, but for the weights: plain values."""
        return {"step": self.step, "precision": self._precision.state_dict()}

    def load_state_dict(self, shared: dict[str, Any], exchange: Sequence[dict[str, Any]]) -> None:
        """Continue from a checkpoint; the model's weights are loaded before.

        Args:
            shared: `shared_state_dict` of any worker.
            exchange: the exchange states of all workers of the saved run, in rank order.
        """
        self.step = shared["step"]
        self._precision.load_state_dict(shared["precision"])
        self.exchange.load_state_dict(exchange)


def _mean_loss(loss_sum: float, num_targets: int) -> float | None:
    if num_targets == 0 or not math.isfinite(loss_sum):
        return None
    return loss_sum / num_targets


def _build_rule(config: TrainConfig) -> UpdateRule:
    return UpdateRule(
        learning_rate_at=lambda update: learning_rate_at(update, config),
        num_steps=config.num_steps,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
