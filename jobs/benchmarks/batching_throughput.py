"""Real training steps over a sample of every arm's batches.

A 4-layer decoder of the demo's family takes one optimizer step a batch. Each arm's sample is spread
evenly over its batches sorted by mean length, since attention makes long rows dearer; the steps of
all arms are mixed in a seeded order, so that a drift of the machine's speed meets all alike.

Throughput is real tokens over seconds, summed over the sample. Its interval is a bootstrap within
pairs of neighbouring batches of that sorted order, 2,000 draws.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmarks.batching_arms import ARMS, BY_ROWS, Shape, plan_arm
from jobs.benchmarks.batching_data import ROWS_PER_BATCH, STEP_TOKENS, build_micro_batch
from r1ray.config.schema import DenseExchangeConfig, TrainConfig
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, ModelConfig
from r1ray.models.config import RopeConfig
from r1ray.training.step import TrainState

__all__ = ["ArmTimes", "build_state", "sample_shapes", "time_steps"]

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


def time_steps(
    lengths: NDArray[np.int64],
    *,
    num_batches: int,
    path: Path,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, ArmTimes]:
    """Time `num_batches` steps of every arm; finished ones are read back from `path` (JSONL)."""
    memory = ROWS_PER_BATCH * int(lengths.max())
    samples = {}
    for arm in ARMS:
        budget = memory if arm in BY_ROWS else min(memory, STEP_TOKENS)
        samples[arm] = sample_shapes(plan_arm(arm, lengths, budget, seed=0), num_batches, seed=0)
    done = {(row["arm"], row["index"]): row for row in _read_lines(path)}
    todo = [(arm, index) for arm in ARMS for index in range(len(samples[arm]))]
    random.Random(0).shuffle(todo)
    state = build_state(int(lengths.max()))
    warmup = [arm for arm in ARMS for _ in range(_WARMUP_STEPS)]
    if any(key not in done for key in todo):
        for arm in warmup:
            state.run_step([build_micro_batch(samples[arm][-1], VOCAB_SIZE, seed=0)])
    with path.open("a", encoding="utf-8") as stream:
        for number, (arm, index) in enumerate(todo):
            if (arm, index) in done:
                continue
            shape = samples[arm][index]
            batch = build_micro_batch(shape, VOCAB_SIZE, seed=index)
            started = time.perf_counter()
            state.run_step([batch])
            seconds = time.perf_counter() - started
            row = {"arm": arm, "index": index, "real": shape.real, "computed": shape.computed}
            row["seconds"] = seconds
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            done[(arm, index)] = row
            on_step(f"{number + 1}/{len(todo)} {arm} {shape.real / seconds:.0f} tokens/s")
    return {arm: _collect(done, arm, len(samples[arm])) for arm in ARMS}


def _collect(done: dict[tuple[str, int], dict[str, Any]], arm: str, count: int) -> ArmTimes:
    rows = [done[(arm, index)] for index in range(count)]
    return ArmTimes(
        *(np.array([row[name] for row in rows]) for name in ("real", "computed", "seconds"))
    )


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may have been cut off by a kill
                yield json.loads(line)
