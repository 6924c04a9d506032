"""What the continual benchmark trains: a small model on four families in a row, by every method.

All methods are those that `train` uses, in one process: the same step, reservoir, penalty, adapters
and averaging. The first family is learned once for all methods of a seed.
"""

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from jobs.benchmarks.continual_tasks import (
    FAMILIES,
    VOCAB_SIZE,
    StringProblem,
    accuracy,
    draw,
    encode,
    to_batch,
)
from r1ray.config.continual import (
    AveragingConfig,
    ContinualConfig,
    EwcConfig,
    LoraConfig,
    ReplayConfig,
)
from r1ray.config.exchange import DenseExchangeConfig
from r1ray.config.training import TrainConfig
from r1ray.data.reservoir import Replay, Reservoir
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, ModelConfig
from r1ray.models.checkpoint import load_model, save_model
from r1ray.models.config import RopeConfig
from r1ray.training.continual import begin, finish, hold, remember
from r1ray.training.objective import CrossEntropy
from r1ray.training.step import TrainState

__all__ = [
    "ARMS",
    "DEFAULT",
    "FIRST",
    "JOINT",
    "Scale",
    "build_model",
    "learn",
    "learn_all",
    "score",
]

_ROWS = 64  # of a step
_POOL = 8192  # samples of a family
_FISHER_BATCHES = 64
_RESERVOIR_ROWS = 4096
_NONE = ContinualConfig(replay=None)


def _replay(share: float) -> ContinualConfig:
    return ContinualConfig(replay=ReplayConfig(share=share, reservoir_rows=_RESERVOIR_ROWS))


ARMS: dict[str, ContinualConfig] = {
    "naive": _NONE,
    "replay_5": _replay(0.05),
    "replay_10": _replay(0.10),
    "replay_30": _replay(0.30),
    "replay_50": _replay(0.50),
    "ewc": ContinualConfig(
        replay=None, ewc=EwcConfig(strength=100.0, fisher_batches=_FISHER_BATCHES)
    ),
    "lora": ContinualConfig(replay=None, lora=LoraConfig(rank=16, alpha=32.0)),
    "averaging": ContinualConfig(replay=None, averaging=AveragingConfig(start_share=0.5)),
}
JOINT = "joint"
DEFAULT = "replay_50"  # what `continual: {}` does
FIRST = dataclasses.replace(_replay(0.5), ewc=ARMS["ewc"].ewc)
"""The first family: nothing is there to be replayed or held yet, but all is kept."""


class Scale:
    """How much is trained and asked.

    Args:
        num_steps: of every family.
        num_problems: held out, of every family.
    """

    def __init__(self, num_steps: int, num_problems: int, device: str) -> None:
        self.num_steps, self.num_problems = num_steps, num_problems
        self.device = torch.device(device)

    def heldout(self, family: str) -> list[StringProblem]:
        """The same for all arms and seeds."""
        return draw(family, self.num_problems, seed=10**6)


def build_model(seed: int) -> Decoder:
    """A decoder of 3 layers and 0.6 million parameters with seeded weights."""
    width = 128
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_positions=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=width**-0.5, generator=generator)
    return model


def score(model_dir: Path, scale: Scale) -> dict[str, float]:
    """Accuracy on the held-out problems of every family."""
    model = load_model(model_dir).to(scale.device)
    return {family: accuracy(model, scale.heldout(family)) for family in FAMILIES}


def learn(
    start: Path,
    families: Sequence[str],
    config: ContinualConfig,
    scale: Scale,
    seed: int,
    out: Path,
) -> float:
    """Train the model in `start` on `families` together; writes a model directory, returns seconds.

    As the stages do it: replay is mixed into the samples, then come the steps, then what the next
    data set needs.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    problems = [
        problem
        for family in families
        for problem in draw(family, _POOL, seed=seed, without=scale.heldout(family))
    ]
    samples = _mix(_to_table(problems), start, config, seed, out)
    chance = random.Random(f"{seed}-{families}")

    def batches(count: int) -> list[Any]:
        return [to_batch(chance.sample(samples, _ROWS)) for _ in range(count)]

    model = load_model(start).to(scale.device)
    begin(model, config)
    objective = hold(CrossEntropy(), model, config, start)
    num_steps = scale.num_steps * len(families)
    state = _build_state(model, objective, num_steps)
    for _ in range(num_steps):
        state.run_step(batches(1))
    finish(model, config, load_model(start).state_dict())
    if config.ewc is not None:
        some = (batch.to(scale.device) for batch in batches(config.ewc.fisher_batches))
        remember(model, some, start, out, seed=seed)
    save_model(model.cpu(), out)
    return time.perf_counter() - started


def _build_state(model: Decoder, objective: Any, num_steps: int) -> TrainState:
    config = TrainConfig(
        num_steps=num_steps,
        batches_per_step=1,
        learning_rate=2e-3,
        warmup_steps=min(20, num_steps - 1),
        precision="fp32",
        precision_policy="none",
    )
    exchange = build_exchange(DenseExchangeConfig(type="dense"))
    return TrainState(model, config, exchange, LocalTransport(), objective)


def _to_table(problems: Sequence[StringProblem]) -> pa.Table:
    ids, is_target = zip(*map(encode, problems), strict=True)
    return pa.table({"input_ids": ids, "is_target": is_target}, schema=SAMPLE_SCHEMA)


def _mix(
    new: pa.Table, start: Path, config: ContinualConfig, seed: int, out: Path
) -> list[tuple[list[int], list[bool]]]:
    if config.replay is not None:
        reservoir = Reservoir.recall(start, config.replay.reservoir_rows, seed=seed)
        replay = Replay(reservoir, config.replay.share, seed=seed, max_tokens=64)
        new = replay.mix(new)
        reservoir.save(out)
    return list(zip(new["input_ids"].to_pylist(), new["is_target"].to_pylist(), strict=True))


def learn_all(arm: str, first: Path, scale: Scale, seed: int, work: Path) -> dict[str, Any]:
    """Learn the other families after the first one, by the method `arm`.

    Args:
        first: model directory that has learned the first family, with its memory.
    Returns:
        accuracies[i][family] after i + 1 families, and what they took.
    """
    accuracies, seconds = [score(first, scale)], []
    start = first
    for number, family in enumerate(list(FAMILIES)[1:], start=2):
        out = work / f"{number}"
        seconds.append(learn(start, [family], ARMS[arm], scale, seed, out))
        accuracies.append(score(out, scale))
        start = out
    return {"accuracies": accuracies, "seconds": seconds, "memory_bytes": _memory_bytes(start)}


def _memory_bytes(model_dir: Path) -> int:
    """What is kept beside the model for further data."""
    return sum(file.stat().st_size for file in (model_dir / "memory").glob("*"))
