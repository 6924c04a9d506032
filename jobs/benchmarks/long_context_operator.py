"""The attention operator alone: block-sparse, selection included, against torch's dense flash.

One layer of SmolLM2's heads on random tensors, as it is served: int8 keys and values. What a layer
does besides the products with its weights and writing the cache is timed: summaries of new blocks,
scoring, choosing, attention. 7.5% of all heads choose by the keys themselves: of nine heads a
layer, 27 layers of 40 have one such (`marked`), the others none (`sparse`). Dense attention is
torch's, in float32; decoding folds a group's queries together there, which is faster than
`enable_gqa`.
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
from r1ray.models.rope import apply_rotary
from r1ray.ops import block_selection
from r1ray.ops.block_gate import BlockGate, pool_keys
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.cached_states import CachedStates, quantize_states
from r1ray.ops.gated_attention import gated_attention

__all__ = ["LENGTHS", "measure_decode", "measure_growth", "measure_memory", "measure_prefill"]

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64
_PROCESSES = 7  # that decode
_MIN_S, _REPEATS = 0.5, (3, 15)  # repetitions: within bounds, for at least so long


class _Layer:
    """Random queries, keys and values of `tokens` tokens, and a gate."""

    def __init__(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = tokens
        self.drawn_q = torch.randn(1, tokens, _HEADS, _HEAD_DIM, generator=generator)
        self.drawn_k, self.v = (
            torch.randn(1, _KV_HEADS, tokens, _HEAD_DIM, generator=generator) for _ in range(2)
        )
        self.gate, self.marked_gate = (BlockGate(_HEADS, _KV_HEADS, _HEAD_DIM) for _ in range(2))
        self.marked_gate.is_marked[0] = True
        angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(32) / 32)
        angles = torch.cat([angles, angles], dim=1)[None, None]
        self.cos, self.sin = angles.cos(), angles.sin()
        self.q = apply_rotary(self.drawn_q.transpose(1, 2), self.cos, self.sin).contiguous()
        self.k = apply_rotary(self.drawn_k, self.cos, self.sin).contiguous()
        self.states = CachedStates(*quantize_states(self.k)), CachedStates(*quantize_states(self.v))

    def summaries(self) -> Tensor:
        """Of all blocks of keys; these come before rotary positions here, as they are drawn."""
        pooled = pool_keys(self.drawn_k.transpose(1, 2))
        blocks = slice(0, pooled.shape[2])
        cos, sin = (table[:, :, ::BLOCK][:, :, blocks] for table in (self.cos, self.sin))
        return self.gate.keys(pooled, cos, sin)

    def prefill_sparse(self) -> Tensor:
        return self._attend(self.gate, self.summaries(), 0)

    def prefill_marked(self) -> Tensor:
        return self._attend(self.marked_gate, self.summaries(), 0)

    def decode_sparse(self, summaries: Tensor) -> Tensor:
        return self._attend(self.gate, summaries, self.tokens - 1)

    def decode_marked(self, summaries: Tensor) -> Tensor:
        return self._attend(self.marked_gate, summaries, self.tokens - 1)

    def _attend(self, gate: BlockGate, summaries: Tensor, start: int) -> Tensor:
        """Choice and attention of the queries from `start` on, in int8 keys and values."""
        part = slice(start, None)
        q, rotary = self.q[:, :, part], (self.cos[:, :, part], self.sin[:, :, part])
        unit = BLOCK if start == 0 else 1
        k, v = self.states
        queries = (self.drawn_q[:, part], q)
        return gated_attention(gate, queries, rotary, summaries, k, v, [start], unit)

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

    def decode_dense(self) -> Tensor:
        q = self.q[:, :, -1:].reshape(1, _KV_HEADS, _HEADS // _KV_HEADS, _HEAD_DIM)
        return F.scaled_dot_product_attention(q, self.k, self.v)


@torch.inference_mode()
def measure_prefill(tokens: int) -> dict[str, list[float]]:
    """Seconds of reading `tokens` tokens; all arms in turns."""
    layer = _Layer(tokens)
    return _in_turns(
        {
            "sparse": layer.prefill_sparse,
            "marked": layer.prefill_marked,
            "dense": layer.prefill_dense,
        }
    )


def measure_decode(tokens: int) -> dict[str, list[float]]:
    """Seconds of one more token after `tokens`; all arms in turns.

    In several processes, one after the other: where memory lies makes a call of a tenth of a
    millisecond twice as fast in one process as in another.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(_PROCESSES):
        for name, found in _ask("decode", tokens).items():
            seconds.setdefault(name, []).extend(found)
    return seconds


@torch.inference_mode()
def _decode(tokens: int) -> dict[str, list[float]]:
    layer = _Layer(tokens)
    summaries = layer.summaries()
    return _in_turns(
        {
            "sparse": lambda: layer.decode_sparse(summaries),
            "marked": lambda: layer.decode_marked(summaries),
            "dense": layer.decode_dense,
        }
    )


def measure_memory(tokens: int = 1024) -> dict[str, Any]:
    """Peak bytes of a call less its output, by implementation, each in a process of its own.

    Sparse attention is forced on: as many blocks as beyond 2,048 tokens.
    """
    found = {name: _ask(name, tokens) for name in ("sparse", "dense", "eager")}
    units = -(-tokens // BLOCK)
    kept = sum(min(unit + 1, 2 + found["sparse"]["count"]) for unit in range(units))
    peaks = {name: item["peak_bytes"] for name, item in found.items()}
    return {"peak_bytes": peaks, "pairs_kept": kept / units**2}


def measure_growth() -> dict[str, int]:
    """Peak bytes of sparse attention less its output, by length."""
    return {str(tokens): _ask("sparse", tokens)["peak_bytes"] for tokens in LENGTHS}


def _ask(name: str, tokens: int) -> dict[str, Any]:
    """What a process of its own finds: peaks of this implementation, or `decode` times."""
    found = subprocess.run(
        [sys.executable, "-m", "jobs.benchmarks.long_context_operator", name, str(tokens)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return dict(json.loads(found.stdout.splitlines()[-1]))


@torch.inference_mode()
def _peak(name: str, tokens: int) -> dict[str, int]:
    """In a process of its own, whose attention is sparse from the first block on."""
    block_selection.DENSE_BLOCKS = 0
    # Thread pools, libraries, and what kernels keep for their next call: some 100 KiB a thread.
    getattr(_Layer(2 * BLOCK), f"prefill_{name}")()
    layer = _Layer(tokens)
    call: Callable[[], Tensor] = getattr(layer, f"prefill_{name}")
    baseline = reset_peak()
    out = call()
    return {
        "peak_bytes": read_peak() - baseline - out.nbytes,
        "count": block_selection.count_chosen(tokens // BLOCK - 1),
    }


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


def _main(name: str, tokens: int) -> None:
    print(json.dumps(_decode(tokens) if name == "decode" else _peak(name, tokens)))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
