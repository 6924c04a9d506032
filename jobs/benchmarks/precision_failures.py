"""Provoked failures: what each arm does with them in fp16 autocast on a CPU.

Each failure is caused in the model, in a way that does fp32 no harm: the function that it computes
stays the same, but for one batch, and Adam undoes the scale of gradients. An arm *survives* if
training runs to its end, all weights are finite, and its loss on held-out text is at most 2% above
that of the fp32 arm on the same data, under the same provocation.

- `overflow`: from step 60 on, the gradient at the logits is 2^20 times as large (clipping and Adam
  undo that in fp32).
- `underflow`: from the start, it is 2^-24 times as large (Adam undoes that).
- `nan`: in step 60 a layer's output is NaN.
- `wide_activations`: from step 60 on, inside one layer activations are 2^20 times as large and the
  gradients 2^-20 times: the next multiplication takes it back.
- `wide_gradients`: from the start, the gradients inside one layer's MLP are 2^20 times as large.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jobs.benchmarks.precision_arms import (
    Arm,
    ArmState,
    Shape,
    build_model,
    draw_batches,
    heldout_loss,
)
from r1ray.config.training import TrainConfig
from r1ray.errors import DivergenceError
from r1ray.exchange import DenseExchange
from r1ray.models import Decoder

__all__ = ["FAILURES", "KINDS", "NUM_STEPS", "Failure", "has_survived", "run_failure"]

Failure = Literal["overflow", "underflow", "nan", "wide_activations", "wide_gradients"]
FAILURES: tuple[Failure, ...] = (
    "overflow",
    "underflow",
    "nan",
    "wide_activations",
    "wide_gradients",
)
KINDS: dict[str, tuple[Failure, ...]] = {
    "overflow": ("overflow",),
    "underflow": ("underflow",),
    "NaN": ("nan",),
    "wide range": ("wide_activations", "wide_gradients"),
}
"""The four kinds; one is survived if all its forms are."""
NUM_STEPS, ONSET = 400, 60
PATIENCE = (10, 60)
VOCAB_SIZE, ROWS, TOKENS = 16, 8, 32
SHAPE = Shape(
    width=32, intermediate=88, num_heads=4, num_kv_heads=2, num_layers=3, vocab_size=VOCAB_SIZE
)
LAYER = 1  # where it happens
MAX_LOSS_RATIO = 1.02


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Provocation:
    """Hooks in `model` that cause `failure` in its steps; the caller sets `step`."""

    def __init__(self, model: Decoder, failure: Failure) -> None:
        self.step = 0
        mlp = model.model.layers[LAYER].get_submodule("mlp")
        if failure == "overflow":
            self._change_output(model.lm_head, lambda x: _scale_gradient(x, 2.0**20), ONSET)
        elif failure == "underflow":
            self._change_output(model.lm_head, lambda x: _scale_gradient(x, 2.0**-24), 0)
        elif failure == "nan":
            self._change_output(mlp, lambda x: x * math.nan, ONSET, num_steps=1)
        elif failure == "wide_activations":
            up, down = mlp.get_submodule("up_proj"), mlp.get_submodule("down_proj")
            self._change_output(up, lambda x: x * 2.0**20, ONSET)
            self._change_output(down, lambda x: x * 2.0**-20, ONSET)
        else:
            self._change_output(mlp, lambda x: _scale_gradient(x, 2.0**20), 0)
            mlp.register_forward_pre_hook(
                lambda _, inputs: (_scale_gradient(inputs[0], 2.0**-20), *inputs[1:])
            )

    def _change_output(
        self,
        module: nn.Module,
        change: Callable[[Tensor], Tensor],
        onset: int,
        num_steps: int = NUM_STEPS,
    ) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return change(output) if onset <= self.step < onset + num_steps else output

        module.register_forward_hook(hook)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return ScaledGradient.apply(x, factor)


def run_failure(failure: Failure, arm: Arm, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Train under `failure` in `arm`: how it ended, and what it did on the way."""
    targets = ROWS * (TOKENS - 1)
    model = build_model(SHAPE, max_positions=TOKENS)
    config = TrainConfig(
        num_steps=num_steps,
        learning_rate=2e-2,
        precision="fp32" if arm == "fp32" else "fp16",
        precision_policy="none",
    )
    provocation = Provocation(model, failure)
    state = ArmState(model, arm, "fp16", config, patience=PATIENCE, targets=targets)
    assert isinstance(state.exchange, DenseExchange)
    for group in state.exchange.optimizer.param_groups:
        group["eps"] = 1e-20  # Adam undoes the scale of gradients far below its usual 1e-8
    shape = {"rows": ROWS, "tokens": TOKENS, "vocab_size": VOCAB_SIZE}
    records, error = [], None
    for step in range(num_steps):
        provocation.step = step
        try:
            records.append(state.run_step(draw_batches(1, seed=step, **shape)))
        except DivergenceError as stop:
            error = str(stop)
            break
    provocation.step = num_steps
    promoted = [record.num_promoted for record in records]
    return {
        "error": error,
        "is_finite": all(bool(tensor.isfinite().all()) for tensor in model.parameters()),
        "final_loss": heldout_loss(model, draw_batches(16, seed=num_steps, **shape)),
        "num_updates": state.exchange.num_updates,
        "num_skipped": sum(record.was_skipped for record in records),
        "loss_scales": [min(r.loss_scale for r in records), max(r.loss_scale for r in records)],
        "max_promoted": max(promoted),
        "fp32_share": sum(promoted) / (len(records) * state.num_product_groups),
    }


def has_survived(run: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """The definition above; `reference` is the fp32 arm's run."""
    if run["error"] is not None or not run["is_finite"] or run["final_loss"] is None:
        return False
    return bool(run["final_loss"] <= MAX_LOSS_RATIO * reference["final_loss"])  # False for NaN
