"""What it saves to allocate once: child processes take the same training steps in three modes.

- `fresh`: new tensors for every batch, as long as its longest row; freed memory goes back to the
  system (the C library's default).
- `buffers`: every batch in one buffer, at its bucket's ceiling.
- `reused`: the same, and freed memory is kept for the next step (`training.memory`), as in r1ray's
  workers.

The model is the demo's own, SmolLM2-135M, on the demo's traces and batches; the children run one
after the other, in an order that rotates.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.batching_arms import plan_arm
from jobs.benchmarks.batching_data import build_micro_batch, load_lengths
from r1ray.config.exchange import DenseExchangeConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import IGNORED, BatchBuffers, MicroBatch
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import load_model
from r1ray.training.memory import KEEP_FREED_MEMORY
from r1ray.training.step import TrainState

__all__ = ["MODES", "measure_preallocation"]

MODES = ("fresh", "buffers", "reused")
_NUM_STEPS = 4
_WARMUP_STEPS = 1
_BATCHES_PER_STEP = 2
_BATCH_TOKENS = 384  # the demo's
_TIMEOUT_S = 600


def measure_preallocation(mode: str, base_dir: Path) -> dict[str, Any]:
    """Seconds of the timed steps and peak memory of one child process."""
    command = [sys.executable, "-m", "jobs.benchmarks.batching_preallocation", mode, str(base_dir)]
    environment = {**os.environ, **(KEEP_FREED_MEMORY if mode == "reused" else {})}
    finished = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        env=environment,
    )
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def run_steps(mode: str, base_dir: Path) -> dict[str, Any]:
    """The child: time the steps of one mode."""
    model = load_model(base_dir, dtype=torch.float32)
    shapes = plan_arm(
        "r1ray_ceilings", load_lengths("demo_traces", base_dir), _BATCH_TOKENS, seed=0
    )
    random.Random(0).shuffle(shapes)
    batches = [
        build_micro_batch(shape, model.config.vocab_size, seed=0)
        for shape in shapes[: (_NUM_STEPS + _WARMUP_STEPS) * _BATCHES_PER_STEP]
    ]
    state = TrainState(
        model,
        TrainConfig(num_steps=1000, precision="fp32", learning_rate=1e-5),
        build_exchange(DenseExchangeConfig(type="dense")),
        LocalTransport(),
    )
    buffers = None if mode == "fresh" else BatchBuffers(_BATCH_TOKENS)
    started = time.perf_counter()
    for step in range(_NUM_STEPS + _WARMUP_STEPS):
        if step == _WARMUP_STEPS:
            started = time.perf_counter()
        begin = step * _BATCHES_PER_STEP
        state.run_step(
            _place(batch, buffers) for batch in batches[begin : begin + _BATCHES_PER_STEP]
        )
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "mode": mode,
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
        "page_faults": usage.ru_minflt,
    }


def _place(batch: MicroBatch, buffers: BatchBuffers | None) -> MicroBatch:
    """The batch in the shared buffer at its ceiling, or in new tensors of its longest row."""
    if buffers is None:
        columns = int((batch.labels_BT != IGNORED).sum(1).max()) + 1
        input_ids_BT = batch.input_ids_BT[:, :columns].clone()
        labels_BT = batch.labels_BT[:, :columns].clone()
    else:
        input_ids_BT, labels_BT = buffers.take(*batch.input_ids_BT.shape)
        input_ids_BT.copy_(batch.input_ids_BT)
        labels_BT.copy_(batch.labels_BT)
    return MicroBatch(input_ids_BT, labels_BT, batch.num_tokens, batch.num_targets)


if __name__ == "__main__":
    print(json.dumps(run_steps(sys.argv[1], Path(sys.argv[2]))))
