"""Real training steps over a sample of every arm's batches.

A 4-layer decoder of the demo's family takes one optimizer step a batch. Each arm's sample is spread
evenly over its batches sorted by mean length, since attention makes long rows dearer; the steps of
all arms are mixed in a seeded order, so that a drift of the machine's speed meets all alike.

Throughput is real tokens over seconds, summed over the sample. Its interval is a bootstrap within
pairs of neighbouring batches of that sorted order, 2,000 draws.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmarks.batching_arms import ARMS, BY_ROWS, Shape, plan_arm
from jobs.benchmarks.batching_data import (
    ROWS_PER_BATCH,
    SCALED_BY,
    STEP_TOKENS,
    build_micro_batch,
    load_lengths,
)
from r1ray.config.exchange import DenseExchangeConfig
from r1ray.config.training import TrainConfig
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, ModelConfig
from r1ray.models.config import RopeConfig
from r1ray.training.memory import KEEP_FREED_MEMORY
from r1ray.training.step import TrainState

__all__ = ["ArmTimes", "build_state", "measure_steps", "read_times", "sample_shapes", "time_steps"]

VOCAB_SIZE = 4096
_WARMUP_STEPS = 3
_DRAWS = 2000


@dataclass(frozen=True)
class ArmTimes:
    """Timed steps of one arm, in the sorted order of its sample."""

    real: NDArray[np.float64]
    computed: NDArray[np.float64]
    seconds: NDArray[np.float64]

    @property
    def tokens_per_s(self) -> float:
        return float(self.real.sum() / self.seconds.sum())

    def bootstrap(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Tokens a second of `_DRAWS` resamples: one of each pair of neighbours, counted twice.

        Drawing both members anew would halve the variance: a stratum of two has one degree of
        freedom.
        """
        count = len(self.real)
        chosen = (
            np.arange(count) // 2 * 2
            + rng.integers(0, 2, (_DRAWS, -(-count // 2))).repeat(2, axis=1)[:, :count]
        )
        chosen = np.minimum(chosen, count - 1)
        rates: NDArray[np.float64] = self.real[chosen].sum(1) / self.seconds[chosen].sum(1)
        return rates


def build_state(max_positions: int) -> TrainState:
    """A seeded 4-layer model of the demo's family (Llama, grouped queries, tied head) and AdamW."""
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=max_positions,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        eos_token_ids=(2,),
        bos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    train = TrainConfig(num_steps=1_000_000, precision="fp32", learning_rate=1e-4)
    exchange = build_exchange(DenseExchangeConfig(type="dense"))
    return TrainState(Decoder(config), train, exchange, LocalTransport())


def sample_shapes(shapes: list[Shape], count: int, seed: int) -> list[Shape]:
    """`count` batches at even distances in the order of mean length, from a seeded start."""
    by_length = sorted(shapes, key=lambda shape: shape.real / len(shape.lengths))
    if len(by_length) <= count:
        return by_length
    start = random.Random(seed).random()
    step = len(by_length) / count
    return [by_length[int((index + start) * step)] for index in range(count)]


def measure_steps(key: str, num_batches: int, path: Path, base_dir: Path) -> dict[str, ArmTimes]:
    """Time the steps of set `key` in a process with the malloc settings of workers."""
    command = [sys.executable, "-m", "jobs.benchmarks.batching_throughput"]
    arguments = [key, str(num_batches), str(path), str(base_dir)]
    subprocess.run([*command, *arguments], check=True, env={**os.environ, **KEEP_FREED_MEMORY})
    return read_times(path)


def time_steps(
    lengths: NDArray[np.int64],
    *,
    num_batches: int,
    path: Path,
    on_step: Callable[[str], None] = lambda _: None,
) -> None:
    """Time `num_batches` steps of every arm into `path` (JSONL), where finished ones are found."""
    memory = ROWS_PER_BATCH * int(lengths.max())
    samples = {}
    for arm in ARMS:
        budget = memory if arm in BY_ROWS else min(memory, STEP_TOKENS)
        samples[arm] = sample_shapes(plan_arm(arm, lengths, budget, seed=0), num_batches, seed=0)
    done = {(row["arm"], row["index"]) for row in _read_lines(path)}
    steps = [(arm, index) for arm in ARMS for index in range(len(samples[arm]))]
    random.Random(0).shuffle(steps)
    todo = [step for step in steps if step not in done]
    if not todo:
        return
    state = build_state(int(lengths.max()))
    for arm in ARMS:
        for _ in range(_WARMUP_STEPS):
            state.run_step([build_micro_batch(samples[arm][-1], VOCAB_SIZE, seed=0)])
    with path.open("a", encoding="utf-8") as stream:
        for number, (arm, index) in enumerate(todo, start=1):
            shape = samples[arm][index]
            batch = build_micro_batch(shape, VOCAB_SIZE, seed=index)
            started = time.perf_counter()
            state.run_step([batch])
            seconds = time.perf_counter() - started
            row = {"arm": arm, "index": index, "real": shape.real, "computed": shape.computed}
            stream.write(json.dumps({**row, "seconds": seconds}) + "\n")
            stream.flush()
            on_step(f"{number}/{len(todo)} {arm} {shape.real / seconds:.0f} tokens/s")


def read_times(path: Path) -> dict[str, ArmTimes]:
    """The timed steps of every arm, in the order of their sample."""
    rows = sorted(_read_lines(path), key=lambda row: row["index"])
    return {
        arm: ArmTimes(
            *(
                np.array([row[name] for row in rows if row["arm"] == arm])
                for name in ("real", "computed", "seconds")
            )
        )
        for arm in ARMS
    }


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line that a kill cut off is removed from it."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    return [json.loads(line) for line in lines]


def _main(key: str, num_batches: str, path: str, base_dir: str) -> None:
    lengths = np.maximum(load_lengths(key, Path(base_dir)) // SCALED_BY[key], 2)
    time_steps(
        lengths,
        num_batches=int(num_batches),
        path=Path(path),
        on_step=lambda note: print(f"  {key}: {note}", flush=True),
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
