"""The ways of making batches that are compared, as shapes: who is padded to what.

Every arm keeps the same memory bound: rows x columns never exceed `batch_tokens`. The two that take
a fixed number of rows (random, group_by_length) take as many as fit when all are of the longest
length. A batch is as long as its longest row; with `r1ray_ceilings` (`pad_to: ceiling`) as its
bucket's ceiling, for few shapes.

Lengths come in the order of the data set, and every arm shuffles or sorts them itself.
"""

import random
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1ray.config.prepare import (
    BucketsConfig,
    PackingConfig,
    PrepareConfig,
    TaskSourceConfig,
)
from r1ray.data.batch_writer import WINDOW_SAMPLES, WINDOW_TOKENS
from r1ray.data.length_sketch import LengthSketch
from r1ray.data.planners import BatchPlanner, FixedBuckets, PackingPlanner, fit_ceilings

__all__ = [
    "ARMS",
    "BY_ROWS",
    "LHOTSE_BUCKETS",
    "PEERS",
    "R1RAY",
    "Shape",
    "padding_share",
    "plan_arm",
]

PEERS = ("group_by_length", "lhotse")
R1RAY = ("r1ray_ceilings", "r1ray_buckets", "r1ray_packing")
ARMS = ("random", *PEERS, *R1RAY)
BY_ROWS = ("random", "group_by_length")  # take a number of rows; the others take tokens
LHOTSE_BUCKETS = (10, 30, 64, 128)  # tried in turn; 10 is its default


@dataclass(frozen=True)
class Shape:
    """One batch: the lengths of its rows, or of the documents of its only row, and its columns."""

    lengths: tuple[int, ...]
    columns: int
    is_packed: bool = False

    @property
    def computed(self) -> int:
        return self.columns * (1 if self.is_packed else len(self.lengths))

    @property
    def real(self) -> int:
        return sum(self.lengths)


def plan_arm(arm: str, lengths: NDArray[np.int64], batch_tokens: int, seed: int) -> list[Shape]:
    """Every batch of one epoch over `lengths`."""
    rows_per_batch = batch_tokens // int(lengths.max())
    if arm == "random":
        order = list(range(len(lengths)))
        random.Random(seed).shuffle(order)
        return _cut(lengths, order, rows_per_batch)
    if arm == "group_by_length":
        return _cut(lengths, _group_by_length(lengths, rows_per_batch, seed), rows_per_batch)
    if arm == "lhotse":
        return _lhotse(lengths, batch_tokens, seed)
    return _r1ray(arm, lengths, batch_tokens)


def padding_share(shapes: list[Shape]) -> float:
    """1 - real / computed tokens."""
    return 1.0 - sum(shape.real for shape in shapes) / sum(shape.computed for shape in shapes)


def _cut(lengths: NDArray[np.int64], order: list[int], rows_per_batch: int) -> list[Shape]:
    batches = [
        lengths[order[start : start + rows_per_batch]].tolist()
        for start in range(0, len(order), rows_per_batch)
    ]
    return [Shape(tuple(batch), max(batch)) for batch in batches]


def _group_by_length(lengths: NDArray[np.int64], batch_size: int, seed: int) -> list[int]:
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(seed)
    return list(LengthGroupedSampler(batch_size, lengths=lengths.tolist(), generator=generator))


def _lhotse(lengths: NDArray[np.int64], batch_tokens: int, seed: int) -> list[Shape]:
    """Lhotse's sampler with the number of buckets that pads least; a second stands for a token."""
    tried = [_lhotse_with(count, lengths, batch_tokens, seed) for count in LHOTSE_BUCKETS]
    return min(tried, key=padding_share)


def _lhotse_with(
    num_buckets: int, lengths: NDArray[np.int64], batch_tokens: int, seed: int
) -> list[Shape]:
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    cuts = CutSet.from_cuts(
        MonoCut(id=str(row), start=0, duration=float(length), channel=0)
        for row, length in enumerate(lengths.tolist())
    )
    with warnings.catch_warnings():  # about sets that are small or held in memory
        warnings.filterwarnings("ignore", category=UserWarning, module="lhotse")
        sampler = DynamicBucketingSampler(
            cuts,
            max_duration=float(batch_tokens),
            num_buckets=num_buckets,
            shuffle=True,
            seed=seed,
            num_cuts_for_bins_estimate=len(lengths),
            buffer_size=len(lengths),
            rank=0,
            world_size=1,
        )
        batches = [tuple(round(cut.duration) for cut in batch) for batch in sampler]
    return [Shape(batch, max(batch)) for batch in batches]


def _r1ray(arm: str, lengths: NDArray[np.int64], batch_tokens: int) -> list[Shape]:
    """As `prepare` does it: window by window, with what is left over carried on."""
    is_packed = arm == "r1ray_packing"
    planner: BatchPlanner
    if is_packed:
        planner = PackingPlanner(_config(lengths, batch_tokens, is_packed=True))
    else:
        config = _config(lengths, batch_tokens, is_packed=False)
        planner = FixedBuckets(config, _fit(lengths, batch_tokens))
    shapes, left = [], np.array([], dtype=np.int64)
    windows = _windows(lengths)
    for number, new in enumerate(windows):
        window = np.concatenate([left, new])
        is_last = number == len(windows) - 1
        batches, leftover = planner.plan(lengths[window], len(new), is_last=is_last)
        left = window[leftover]
        for batch in batches:
            rows = tuple(lengths[window[batch.rows]].tolist())
            columns = max(rows) if arm == "r1ray_buckets" else batch.ceiling
            shapes.append(Shape(rows, columns, is_packed))
    return shapes


def _windows(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of each window that `BatchWriter` would cut."""
    windows, begin, tokens = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        tokens += length
        if row + 1 - begin == WINDOW_SAMPLES or tokens >= WINDOW_TOKENS:
            windows.append(np.arange(begin, row + 1))
            begin, tokens = row + 1, 0
    return [*windows, np.arange(begin, len(lengths))]


def _fit(lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    sketch = LengthSketch(bits=None)
    sketch.add(lengths)
    config = _config(lengths, batch_tokens, is_packed=False)
    assert isinstance(config.batching, BucketsConfig)
    return fit_ceilings(config, config.batching, sketch)


def _config(lengths: NDArray[np.int64], batch_tokens: int, *, is_packed: bool) -> PrepareConfig:
    """The defaults of `prepare` for these lengths."""
    batching = PackingConfig(type="packing") if is_packed else BucketsConfig(type="buckets")
    return PrepareConfig(
        sources=[TaskSourceConfig(type="tasks", num_samples=1)],
        max_tokens=int(lengths.max()),
        batch_tokens=batch_tokens,
        batching=batching,
    )
