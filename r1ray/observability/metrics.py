"""The metrics that r1ray exports, in one table; Ray puts `ray_` before their names."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["TRAIN_METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """Attributes:
    kind: a gauge is the last value, a counter the sum over steps.
    field: of the training stage's step record.
    is_shared: the same on all workers; rank 0 alone exports it, so that sums are right.
    """

    name: str
    kind: Literal["gauge", "counter"]
    field: str
    description: str
    is_shared: bool = False


TRAIN_METRICS = (
    Metric(
        "r1ray_train_step", "gauge", "step", "Steps done, skipped ones included.", is_shared=True
    ),
    Metric(
        "r1ray_train_loss",
        "gauge",
        "loss",
        "Mean cross-entropy per target token, nats.",
        is_shared=True,
    ),
    Metric(
        "r1ray_train_learning_rate", "gauge", "learning_rate", "Of the last update.", is_shared=True
    ),
    Metric(
        "r1ray_train_grad_norm", "gauge", "grad_norm", "Global, before clipping.", is_shared=True
    ),
    Metric("r1ray_train_step_seconds", "gauge", "seconds", "Wall time of the last step."),
    Metric(
        "r1ray_train_tokens",
        "counter",
        "num_tokens",
        "Tokens of all workers' batches.",
        is_shared=True,
    ),
    Metric(
        "r1ray_train_skipped_steps",
        "counter",
        "was_skipped",
        "Steps that changed nothing.",
        is_shared=True,
    ),
    Metric("r1ray_train_stall_seconds", "counter", "exchange_wait_s", "Waited for the exchange."),
    Metric("r1ray_train_sent_bytes", "counter", "sent_bytes", "Payload out of this worker."),
    Metric("r1ray_train_received_bytes", "counter", "received_bytes", "Payload to this worker."),
    Metric(
        "r1ray_train_residual_norm", "gauge", "residual_norm", "Error feedback this worker keeps."
    ),
    Metric("r1ray_train_staleness_steps", "gauge", "staleness_steps", "Age of the last gradient."),
    Metric("r1ray_train_gate_recall", "gauge", "recall", "Attention in blocks that gates choose."),
    Metric(
        "r1ray_train_loss_scale",
        "gauge",
        "loss_scale",
        "What the loss is multiplied by.",
        is_shared=True,
    ),
    Metric(
        "r1ray_train_promoted_groups",
        "gauge",
        "num_promoted",
        "Tensor groups back in fp32.",
        is_shared=True,
    ),
)
