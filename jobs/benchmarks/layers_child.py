"""One model in a process of its own: train one step or serve a few tokens, and say what it took.

    python -m jobs.benchmarks.layers_child '{"task": "train", ...}'   (fields of `Trial`)

Resident memory is the kernel's own peak (VmHWM, reset before), less what the process had resident
when everything was imported and a small model had run.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jobs.benchmarks.kernel_memory import read_peak, reset_peak
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import BudgetError
from r1ray.exchange import LocalTransport, OffloadedExchange, build_exchange
from r1ray.models import Decoder, ModelConfig, load_model, save_model
from r1ray.models.config import RopeConfig
from r1ray.models.kv_cache import KVCache
from r1ray.models.tiered import load_to_serve, load_to_train
from r1ray.training.step import TrainState

__all__ = ["Outcome", "Trial", "build_shape", "write_model"]

_STEPS = 6  # the first one warms up
_PROMPT, _NEW = 32, 8
_BATCH = (4, 64)  # rows, tokens


@dataclass(frozen=True)
class Trial:
    """What to run.

    Attributes:
        model_dir: of `write_model`.
        budget_bytes: of the tiers; None runs without them.
        is_cold: the files are not in the page cache when the timed part begins.
    """

    task: Literal["train", "serve"]
    model_dir: str
    budget_bytes: int | None
    is_cold: bool = False


@dataclass(frozen=True)
class Outcome:
    """What it took.

    Attributes:
        grown_bytes: peak of resident memory above the baseline.
        seconds: of the median step, or of a prompt and a few tokens.
        placement: of the tiers; empty without.
        error: why it did not run to its end; None if it did.
    """

    grown_bytes: int
    seconds: float
    placement: str
    error: str | None


def build_shape(num_layers: int, *, vocab_size: int = 4096) -> ModelConfig:
    """SmolLM2's widths, any number of layers, a small vocabulary."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=num_layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
        eos_token_ids=(2,),
    )


def write_model(directory: Path, num_layers: int) -> None:
    """A random model of `num_layers` in `directory`."""
    torch.manual_seed(0)
    save_model(Decoder(build_shape(num_layers)), directory)


def _train(trial: Trial, model_dir: Path) -> tuple[list[float], str]:
    config = TrainConfig(num_steps=_STEPS, warmup_steps=1, precision="fp32")
    tiered, exchange = None, build_exchange(config.exchange)
    if trial.budget_bytes is None:
        model = load_model(model_dir, dtype=torch.float32)
    else:
        tiered = load_to_train(model_dir, model_dir.parent, budget_bytes=trial.budget_bytes)
        model, exchange = tiered.model, OffloadedExchange(tiered, model_dir.parent)
    state = TrainState(model, config, exchange, LocalTransport())
    seconds = []
    for _ in range(_STEPS):
        if trial.is_cold:
            assert isinstance(exchange, OffloadedExchange)
            for file in exchange.files():
                file.drop_from_page_cache()
        started = time.perf_counter()
        state.run_step([_batch(model.config.vocab_size)])
        seconds.append(time.perf_counter() - started)
    return seconds[1:], "" if tiered is None else tiered.placement.describe()


def _serve(trial: Trial, model_dir: Path) -> tuple[list[float], str]:
    tiered = None
    if trial.budget_bytes is None:
        model = load_model(model_dir)
    else:
        tiered = load_to_serve(model_dir, budget_bytes=trial.budget_bytes)
        model = tiered.model
    seconds = []
    for _ in range(_STEPS):
        if trial.is_cold:
            assert tiered is not None
            for file in set(tiered.files.values()):
                file.drop_from_page_cache()
        started = time.perf_counter()
        _generate(model)
        seconds.append(time.perf_counter() - started)
    return seconds[1:], "" if tiered is None else tiered.placement.describe()


@torch.inference_mode()
def _generate(model: Decoder) -> None:
    cache = KVCache(model.config, max_rows=1, max_tokens=_PROMPT + _NEW, dtype=torch.float32)
    ids = torch.arange(_PROMPT)[None]
    rows = cache.add_rows(1)
    model.next_logits(ids, rows, [_PROMPT - 1])
    rows.advance([_PROMPT])
    for _ in range(_NEW):
        rows = cache.active()
        model.next_logits(ids[:, :1], rows, [0])
        rows.advance([1])


def _batch(vocab_size: int) -> MicroBatch:
    ids: Tensor = torch.randint(0, vocab_size, _BATCH)
    return MicroBatch(ids, ids.roll(-1, 1), ids.numel(), ids.numel())


def main(text: str) -> None:
    trial = Trial(**json.loads(text))
    run = _train if trial.task == "train" else _serve
    with tempfile.TemporaryDirectory(prefix="r1ray-warm-") as directory:
        small = Path(directory) / "model"
        write_model(small, 1)
        run(Trial(trial.task, str(small), 1 << 30), small)  # imports, thread pools, allocator
        run(Trial(trial.task, str(small), None), small)
    baseline = reset_peak()
    seconds, placement, error = [float("nan")], "", None
    try:
        seconds, placement = run(trial, Path(trial.model_dir))
    except BudgetError as problem:
        error = str(problem)
    grown = read_peak() - baseline
    outcome = Outcome(grown, sorted(seconds)[len(seconds) // 2], placement, error)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1])
