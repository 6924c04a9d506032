"""Step times and final loss of four arms, taken in turn in one process.

Decoders of four layers, with SmolLM2's sizes and with smaller ones, and one of SmolLM2's whole size
learn the same batches in fp32, in plain bf16 autocast, in bf16 with GradScaler's loss scale, and in
bf16 under the range controller. So that the controller has something to do where bfloat16's range
suffices, the output of one layer is NaN in two batches, in every arm: all skip those, and the
controller runs that layer in fp32 until it has been clean.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

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
from r1ray.training.memory import KEEP_FREED_MEMORY

__all__ = ["SHAPES", "STEP_ARMS", "measure_steps", "run_steps"]

STEP_ARMS: tuple[Arm, ...] = ("fp32", "plain", "gradscaler", "range")
_LAYER = {"width": 576, "intermediate": 1536, "num_heads": 9, "num_kv_heads": 3}  # SmolLM2's
_SMALL_LAYER = {"width": 256, "intermediate": 704, "num_heads": 4, "num_kv_heads": 2}
SHAPES = {
    "layers": Shape(**_LAYER, num_layers=4, vocab_size=512),
    "width_256": Shape(**_SMALL_LAYER, num_layers=4, vocab_size=512),
    "smollm2": Shape(**_LAYER, num_layers=30, vocab_size=49_152),
}
ROWS, TOKENS, BATCHES_PER_STEP = 4, 128, 2
WARMUP_STEPS = 3  # not timed
PATIENCE = (10, 30)
POISONED_STEPS, POISONED_LAYER = (12, 14), 1
_HELDOUT_BATCHES = 16


def measure_steps(shape: str, num_steps: int) -> dict[str, Any]:
    """`run_steps` in a process with the malloc settings of workers."""
    command = [sys.executable, "-m", "jobs.benchmarks.precision_steps", shape, str(num_steps)]
    finished = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **KEEP_FREED_MEMORY},
    )
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def run_steps(
    shape: Shape,
    num_steps: int,
    *,
    rows: int = ROWS,
    tokens: int = TOKENS,
    patience: tuple[int, int] = PATIENCE,
) -> dict[str, Any]:
    """From arm -> seconds and controller's seconds of the timed steps, final loss, promotions."""
    targets = BATCHES_PER_STEP * rows * (tokens - 1)
    states = {}
    for arm in STEP_ARMS:
        model = build_model(shape, max_positions=tokens)
        config = _build_config(arm, num_steps)
        states[arm] = ArmState(model, arm, "bf16", config, patience=patience, targets=targets)
    language = {"rows": rows, "tokens": tokens, "vocab_size": shape.vocab_size}
    results: dict[str, Any] = {arm: {"seconds": [], "controller": []} for arm in STEP_ARMS}
    promoted: dict[Arm, list[int]] = {arm: [] for arm in STEP_ARMS}
    for step in range(num_steps):
        turn = step % len(STEP_ARMS)
        for arm in STEP_ARMS[turn:] + STEP_ARMS[:turn]:
            state, result = states[arm], results[arm]
            before = state.controller_seconds
            poison = _poison(state) if step in POISONED_STEPS else None
            record = state.run_step(draw_batches(BATCHES_PER_STEP, seed=step, **language))
            if poison is not None:
                poison.remove()
            promoted[arm].append(record.num_promoted)
            if step >= WARMUP_STEPS:
                result["seconds"].append(record.seconds)
                result["controller"].append(state.controller_seconds - before)
    heldout = draw_batches(_HELDOUT_BATCHES, seed=num_steps, **language)
    for arm, state in states.items():
        changes = [after - before for before, after in itertools.pairwise([0, *promoted[arm]])]
        results[arm] |= {
            "final_loss": heldout_loss(state.model, heldout),
            "num_updates": state.exchange.num_updates,
            "fp32_share": sum(promoted[arm]) / (num_steps * state.num_product_groups),
            "num_promotions": sum(max(0, change) for change in changes),
            "num_demotions": sum(max(0, -change) for change in changes),
        }
    return {"arms": results, "step_tokens": BATCHES_PER_STEP * rows * tokens}


def _build_config(arm: Arm, num_steps: int) -> TrainConfig:
    return TrainConfig(
        num_steps=num_steps,
        learning_rate=2e-3,
        precision="fp32" if arm == "fp32" else "bf16",
        precision_policy="none",
    )


def _poison(state: ArmState) -> Any:
    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * math.nan

    mlp = state.model.model.layers[POISONED_LAYER].get_submodule("mlp")
    return mlp.register_forward_hook(spoil)


if __name__ == "__main__":
    print(json.dumps(run_steps(SHAPES[sys.argv[1]], int(sys.argv[2]))))
