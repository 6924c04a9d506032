"""What `jobs.bench_exchange` runs: arms, cells, and what a worker of a cell is told.

Every cell is one training run with its arm, workers, link rate and seed. Cells of a seed and a rate
follow one another, so that the two timings of a ratio are taken close together. Batches and their
order, the loss's normalisation, clipping, AdamW and its schedule are the same on all arms.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.benchmarks.exchange_data import ModelName

__all__ = [
    "ARMS",
    "PARTS",
    "R1RAY_ARMS",
    "RATES_MBIT",
    "SEEDS",
    "SYNCHRONOUS_ARMS",
    "Arm",
    "Cell",
    "WorkerSpec",
    "plan_cells",
    "train_values",
]


@dataclass(frozen=True)
class Arm:
    """One way of bringing workers together.

    Attributes:
        exchange: `train.exchange` of r1ray; None for torch's DDP.
        steps_factor: length of its schedule, against that of the others.
    """

    exchange: Mapping[str, Any] | None
    steps_factor: float = 1.0


ARMS = {
    "ddp_fp32": Arm(None),
    "ddp_bf16": Arm(None),
    "ddp_powersgd": Arm(None),
    "dense": Arm({"type": "dense"}),
    "delta4": Arm({"type": "delta4"}),
    "delta4_async": Arm({"type": "delta4_async"}),
    "stream": Arm(
        {"type": "stream", "local_steps": 8, "overlap_steps": 2, "tail_share": 0.02},
        steps_factor=1.6,
    ),
    "stream_h2": Arm({"type": "stream", "local_steps": 2, "overlap_steps": 1, "tail_share": 0.02}),
    "stream_h8": Arm({"type": "stream", "local_steps": 8, "overlap_steps": 2, "tail_share": 0.02}),
    "stream_h20": Arm({"type": "stream", "local_steps": 20, "tail_share": 0.02}),
    "stream_h100": Arm({"type": "stream", "local_steps": 100, "tail_share": 0.01}),
    "alone": Arm({"type": "dense"}),  # every worker by itself: the time of computing
}
SYNCHRONOUS_ARMS = ("ddp_fp32", "ddp_bf16", "ddp_powersgd", "dense", "delta4")
R1RAY_ARMS = ("delta4", "delta4_async", "stream")
RATES_MBIT = (50, 200, 1000)
SEEDS = (0, 1, 2)
PARTS = ("links", "faults", "headline", "grid", "bytes", "quality", "smollm2")
_HEADLINE_ARMS = ("ddp_fp32", "ddp_bf16", "ddp_powersgd", *R1RAY_ARMS)
_STREAM_QUALITY_ARMS = ("stream_h2", "stream_h8", "stream_h20", "stream_h100")
_BATCHES_PER_STEP = 4  # one for each worker where there are more
_TRAINING: dict[ModelName, dict[str, Any]] = {
    "small": {"learning_rate": 1.5e-3, "warmup_steps": 10},
    "smollm2": {"learning_rate": 3e-4, "warmup_steps": 2},
}


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        rate_mbit: of every link, each way; None for unlimited ones.
        num_steps: of the schedule; an arm's `steps_factor` is applied.
        eval_every: steps between the weights that are kept for validation, the last ones always
            among them; 0 judges none.
        cap_s: the run ends early after so many seconds.
    """

    part: str
    arm: str
    num_workers: int
    rate_mbit: int | None
    seed: int
    num_steps: int
    eval_every: int = 0
    cap_s: float = 900.0
    model: ModelName = "small"

    @property
    def streaming_steps(self) -> int:
        """Steps before the synchronous tail of `stream`; 0 with the other arms."""
        tail_share = (ARMS[self.arm].exchange or {}).get("tail_share", 1.0)
        return self.num_steps - math.floor(tail_share * self.num_steps)

    @property
    def name(self) -> str:
        rate = "free" if self.rate_mbit is None else f"{self.rate_mbit}mbit"
        model = "" if self.model == "small" else f"_{self.model}"
        return f"{self.part}_{self.arm}{model}_{self.num_workers}w_{rate}_seed{self.seed}"


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker of a cell reads: plain values, stored as JSON.

    Attributes:
        train: the fields of `TrainConfig`.
        address, port: where rank 0 listens.
        out_dir: where every worker writes what it measured.
    """

    cell: Cell
    train: dict[str, Any]
    address: str
    port: int
    task_dir: str
    base_dir: str
    out_dir: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "WorkerSpec":
        return cls(**{**values, "cell": Cell(**values["cell"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_cells(part: str) -> list[Cell]:
    """The cells of one part, in the order in which they run."""
    arms: tuple[str, ...]
    if part == "headline":
        return [
            _build("headline", arm, 4, rate, seed, 150, eval_every=5)
            for seed in SEEDS
            for rate in (200, 50)
            for arm in _HEADLINE_ARMS
        ]
    if part == "grid":
        arms = (*_HEADLINE_ARMS[:3], "dense", *R1RAY_ARMS)
        grid = [
            _build("grid", arm, num_workers, rate, 0, 40)
            for num_workers in (2, 4)
            for rate in RATES_MBIT
            for arm in arms
            if (num_workers, rate) not in ((4, 50), (4, 200)) or arm not in _HEADLINE_ARMS
        ]
        return [*(_build("grid", "alone", count, None, 0, 40) for count in (2, 4)), *grid]
    if part == "bytes":
        counted = [
            _build("bytes", arm, num_workers, None, 0, 150)
            for num_workers in (2, 4, 8)
            for arm in ("ddp_fp32", "delta4")
        ]
        return [*counted, _build("bytes", "stream_h100", 4, None, 0, 500)]
    if part == "quality":
        arms = ("dense", "delta4", "delta4_async", *_STREAM_QUALITY_ARMS)
        small = [
            _build("quality", arm, 4, None, seed, 400, eval_every=40)
            for seed in SEEDS
            for arm in arms
        ]
        return [
            *small,
            *(
                _build("quality", arm, 2, None, 0, 30, eval_every=30, model="smollm2", cap_s=1200)
                for arm in ("dense", "delta4", "delta4_async", "stream_h8")
            ),
        ]
    if part == "smollm2":
        arms = ("ddp_fp32", "ddp_bf16", "delta4", "delta4_async")
        return [
            _build("smollm2", "alone", 2, None, 0, 4, model="smollm2"),
            *(_build("smollm2", arm, 2, 200, 0, 4, model="smollm2") for arm in arms),
        ]
    return []


def train_values(cell: Cell) -> dict[str, Any]:
    """The fields of the cell's `TrainConfig`."""
    return {
        "num_steps": cell.num_steps,
        "batches_per_step": max(_BATCHES_PER_STEP, cell.num_workers),
        "precision": "fp32",
        **_TRAINING[cell.model],
        "exchange": dict(ARMS[cell.arm].exchange or {"type": "dense"}),
        "resources": {"num_workers": cell.num_workers},
    }


def _build(
    part: str, arm: str, num_workers: int, rate: int | None, seed: int, num_steps: int, **other: Any
) -> Cell:
    steps = round(num_steps * ARMS[arm].steps_factor)
    return Cell(part, arm, num_workers, rate, seed, steps, **other)
