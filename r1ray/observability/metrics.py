"""The metrics that r1ray exports, in one table; Ray puts `ray_` before their names."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["TRAIN_METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """Attributes:
    kind: a gauge is the last value, a counter the sum over steps.
    field: of the training stage's step record.
    """

    name: str
    kind: Literal["gauge", "counter"]
    field: str
    description: str


TRAIN_METRICS = (
    Metric("r1ray_train_step", "gauge", "step", "Steps done, skipped ones included."),
    Metric("r1ray_train_loss", "gauge", "loss", "Mean cross-entropy per target token, nats."),
    Metric("r1ray_train_learning_rate", "gauge", "learning_rate", "Of the last update."),
    Metric("r1ray_train_grad_norm", "gauge", "grad_norm", "Global, before clipping."),
    Metric("r1ray_train_step_seconds", "gauge", "seconds", "Wall time of the last step."),
    Metric("r1ray_train_tokens", "counter", "num_tokens", "Tokens of all workers' batches."),
    Metric("r1ray_train_skipped_steps", "counter", "was_skipped", "Steps that changed nothing."),
    Metric("r1ray_train_stall_seconds", "counter", "exchange_wait_s", "Waited for other workers."),
    Metric("r1ray_train_sent_bytes", "counter", "sent_bytes", "Payload out of this worker."),
    Metric("r1ray_train_received_bytes", "counter", "received_bytes", "Payload to this worker."),
    Metric(
        "r1ray_train_residual_norm", "gauge", "residual_norm", "Error feedback this worker keeps."
    ),
    Metric("r1ray_train_staleness_steps", "gauge", "staleness_steps", "Age of the last gradient."),
)
