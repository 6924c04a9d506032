"""The attention operator alone: block-sparse, selection included, against torch's dense flash.

One layer of SmolLM2's heads on random tensors. What a layer does besides the products with its
weights is timed: pooling new blocks, scoring, choosing, attention. Dense decoding folds a group's
queries together, which is faster than `enable_gqa`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.kernel_memory import read_peak, reset_peak
from r1ray.ops.block_gate import BlockGate, pool_keys
from r1ray.ops.block_selection import BLOCK, choose_blocks
from r1ray.ops.block_sparse import block_sparse_attention
from r1ray.ops.cached_states import CachedStates

__all__ = ["LENGTHS", "measure_decode", "measure_memory", "measure_prefill"]

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64
_MIN_S, _REPEATS = 0.5, (3, 15)  # repetitions: within bounds, for at least so long


class _Layer:
    """Random queries, keys and values of `tokens` tokens, and a gate."""

    def __init__(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = tokens
        self.q, self.k, self.v = (
            torch.randn(1, heads, tokens, _HEAD_DIM, generator=generator)
            for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
        )
        self.gate = BlockGate(_HEADS, _KV_HEADS, _HEAD_DIM)
        angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(32) / 32)
        angles = torch.cat([angles, angles], dim=1)[None, None]
        self.cos, self.sin = angles.cos(), angles.sin()

    def block_keys(self) -> Tensor:
        pooled = pool_keys(self.k.transpose(1, 2))
        blocks = pooled.shape[2]
        return self.gate.keys(
            pooled, self.cos[:, :, ::BLOCK][:, :, :blocks], self.sin[:, :, ::BLOCK][:, :, :blocks]
        )

    def queries(self, part: slice) -> Tensor:
        q = self.q[:, :, part].transpose(1, 2)
        return self.gate.queries(q, self.cos[:, :, part], self.sin[:, :, part])

    def prefill_sparse(self) -> Tensor:
        return self._attend(self.block_keys())

    def _attend(self, keys: Tensor) -> Tensor:
        units = -(-self.tokens // BLOCK)
        scores = BlockGate.scores(self.queries(slice(None)), keys)
        scores = scores.unflatten(2, (-1, BLOCK)).amax(3)
        chosen = choose_blocks(scores, [list(range(units))])
        return block_sparse_attention(
            self.q, CachedStates(self.k), CachedStates(self.v), chosen, [0]
        )

    def prefill_dense(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, enable_gqa=True
        )

    def prefill_eager(self) -> Tensor:
        groups = _HEADS // _KV_HEADS
        scores = self.q @ self.k.repeat_interleave(groups, 1).transpose(-1, -2) / _HEAD_DIM**0.5
        visible = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril()
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return shares @ self.v.repeat_interleave(groups, 1)

    def decode_sparse(self, keys: Tensor) -> Tensor:
        last = self.tokens - 1
        scores = BlockGate.scores(self.queries(slice(last, None)), keys)
        chosen = choose_blocks(scores, [[last // BLOCK]])
        return block_sparse_attention(
            self.q[:, :, last:], CachedStates(self.k), CachedStates(self.v), chosen, [last]
        )

    def decode_dense(self) -> Tensor:
        q = self.q[:, :, -1:].reshape(1, _KV_HEADS, _HEADS // _KV_HEADS, _HEAD_DIM)
        return F.scaled_dot_product_attention(q, self.k, self.v)


@torch.inference_mode()
def measure_prefill(tokens: int) -> dict[str, list[float]]:
    """Seconds of reading `tokens` tokens, sparse and dense in turns."""
    layer = _Layer(tokens)
    return _in_turns({"sparse": layer.prefill_sparse, "dense": layer.prefill_dense})


@torch.inference_mode()
def measure_decode(tokens: int) -> dict[str, list[float]]:
    """Seconds of one more token after `tokens`, sparse and dense in turns."""
    layer = _Layer(tokens)
    keys = layer.block_keys()
    return _in_turns({"sparse": lambda: layer.decode_sparse(keys), "dense": layer.decode_dense})


def measure_memory(tokens: int = 1024) -> dict[str, Any]:
    """Peak bytes of a call less its output, by implementation, each in a process of its own.

    Sparse attention is forced on: as many blocks as beyond 2,048 tokens.
    """
    peaks = {}
    for name in ("sparse", "dense", "eager"):
        found = subprocess.run(
            [sys.executable, "-m", "jobs.benchmarks.long_context_operator", name, str(tokens)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        peaks[name] = int(json.loads(found.stdout.splitlines()[-1]))
    units = torch.arange(-(-tokens // BLOCK))
    kept = torch.minimum(units + 1, torch.tensor(2 + _forced_count(tokens))).sum()
    return {"peak_bytes": peaks, "pairs_kept": float(kept) / float((units + 1).sum())}


def _forced_count(tokens: int) -> int:
    from r1ray.ops import block_selection

    block_selection.DENSE_BLOCKS = 0
    return block_selection.count_chosen(tokens // BLOCK - 1)


@torch.inference_mode()
def _peak(name: str, tokens: int) -> int:
    _forced_count(tokens)
    layer = _Layer(tokens)
    call: Callable[[], Tensor] = getattr(layer, f"prefill_{name}")
    call()  # thread pools, libraries
    baseline = reset_peak()
    out = call()
    return read_peak() - baseline - out.nbytes


def _in_turns(calls: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    started = time.perf_counter()
    while len(seconds["sparse"]) < _REPEATS[0] or (
        len(seconds["sparse"]) < _REPEATS[1] and time.perf_counter() - started < _MIN_S
    ):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - before)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], int(sys.argv[2]))))
