"""The metrics that r1ray exports, in tables.

Training's go through Ray, which puts `ray_` before their names. Serving's have the names that vLLM
gives to the same things, with `r1ray:` for `vllm:`, and are at `/metrics` of the endpoint.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "SERVE_HISTOGRAMS",
    "SERVE_METRICS",
    "SPEED_METRICS",
    "TRAIN_METRICS",
    "Histogram",
    "Metric",
]


@dataclass(frozen=True)
class Metric:
    """Attributes:
    kind: a gauge is the last value, a counter the sum over steps.
    field: of the training stage's step record, or of an engine's statistics.
    is_shared: the same on all workers; rank 0 alone exports it, so that sums are right. Counters
            are exported by all where a step is a worker's own (`StepRecord.is_local`).
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
    Metric("r1ray_train_gate_recall", "gauge", "recall", "Of what is needed, in gates' blocks."),
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

SERVE_METRICS = (
    Metric("r1ray:num_requests_running", "gauge", "num_running", "Requests that hold memory."),
    Metric("r1ray:num_requests_waiting", "gauge", "num_waiting", "Requests that do not."),
    Metric("r1ray:kv_cache_usage_perc", "gauge", "kv_used_share", "Of the pages; 1 is all."),
    Metric(
        "r1ray:sparse_kv_share",
        "gauge",
        "sparse_kv_share",
        "Of the cached blocks, those that the latest tokens attended to by gates; 1 is all.",
    ),
    Metric(
        "r1ray:num_tokens_due",
        "gauge",
        "num_tokens_due",
        "Tokens to be read, and to be written as far as predicted.",
    ),
    Metric("r1ray:num_preemptions", "counter", "num_preempted", "Memory given up for others."),
    Metric("r1ray:prompt_tokens", "counter", "num_prompt_tokens", "Of requests that began."),
    Metric("r1ray:generation_tokens", "counter", "num_new_tokens", "Tokens written."),
    Metric(
        "r1ray:prefix_cache_queries", "counter", "num_prompt_tokens", "Prompt tokens looked up."
    ),
    Metric("r1ray:prefix_cache_hits", "counter", "num_cached_tokens", "Prompt tokens known."),
)

# What a replica of a group has measured of itself: from a field of its speed to name, label of each
# value, and description.
SPEED_METRICS = {
    "step_s": (
        "r1ray:measured_step_seconds",
        "sequences",
        "A step that writes a token for each of so many sequences.",
    ),
    "token_s": (
        "r1ray:measured_prompt_token_seconds",
        "position",
        "A token of a prompt, before that position.",
    ),
}


@dataclass(frozen=True)
class Histogram:
    """Attributes:
    buckets: upper ends, in seconds.
    """

    name: str
    description: str
    buckets: tuple[float, ...]


_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_NEXT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 5)
_WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
SERVE_HISTOGRAMS = {
    "first": Histogram(
        "r1ray:time_to_first_token_seconds", "From arrival at the engine to the first.", _FIRST
    ),
    "next": Histogram("r1ray:inter_token_latency_seconds", "Between tokens of a request.", _NEXT),
    "whole": Histogram(
        "r1ray:e2e_request_latency_seconds", "From arrival at the engine to the last.", _WHOLE
    ),
}
