"""SmolLM2 as it is served, reading long prompts in chunks: block-sparse attention against dense.

Both have INT8 weights, int8 keys and values, and keep what earlier chunks left; the kernels are the
same but for the choice of blocks. Gates are untrained, and the twentieth of the heads that choose
by the keys themselves is drawn at random: both take the time that trained ones do. Beyond 8,192
tokens, positions are scaled by YaRN. Re-reading reads every prefix that ends with a piece of 4,096
tokens from its beginning, densely.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r1ray.config.serving import AttentionKind
from r1ray.config.training import GatesConfig
from r1ray.models import Decoder, load_model
from r1ray.models.gates import attach_gates, list_attentions, set_attention
from r1ray.models.generation import BatchGenerator
from r1ray.models.quantization import quantize_modules
from r1ray.models.requests import GenerationRequest
from r1ray.ops.block_gate import BlockGate, mark_heads

__all__ = ["LENGTHS", "describe", "load_reader", "measure_reading", "measure_rereading"]

LENGTHS = (8000, 16_000, 32_000)
_TRAINED, _NEW_TOKENS, _PIECE = 8192, 32, 4096
_REPEATS = {8000: 5, 16_000: 3, 32_000: 2}


def measure_reading(
    base: Path, token_ids: Sequence[int], length: int, attention: AttentionKind
) -> dict[str, list[float]]:
    """Seconds of reading `length` tokens, and of each of the tokens decoded behind them.

    The first reading, which is not counted, warms up.
    """
    model = load_reader(base, length, attention)
    found: dict[str, list[float]] = {"prefill_s": [], "token_s": []}
    for repeat in range(1 + _REPEATS[length]):
        prompt = token_ids[repeat : repeat + length]
        prefill_s, tokens_s = _read(model, prompt if repeat else prompt[:2500])
        if repeat:
            found["prefill_s"].append(prefill_s)
            found["token_s"] += tokens_s
    return found


def measure_rereading(base: Path, token_ids: Sequence[int], length: int) -> list[float]:
    """Seconds of reading each prefix of a multiple of 4,096 tokens, up to `length`, densely."""
    model = load_reader(base, length, "dense")
    ends = [*range(_PIECE, length, _PIECE), length]
    return [_read(model, token_ids[:end])[0] for end in ends]


def load_reader(base: Path, length: int, attention: AttentionKind) -> Decoder:
    model = load_model(base)
    attach_gates(model)
    gates = [item.gate for item in list_attentions(model) if isinstance(item.gate, BlockGate)]
    generator = torch.Generator().manual_seed(0)
    for gate in gates:
        gate.missed.copy_(torch.rand(gate.missed.shape, generator=generator))
    mark_heads(gates, GatesConfig().exact_heads)
    set_attention(model, attention)
    quantize_modules(model)
    if length + _NEW_TOKENS > _TRAINED:
        factor = 2.0 ** (length // _TRAINED).bit_length()
        model.config = model.config.with_context("yarn", factor)
    return model


def _read(model: Decoder, prompt: Sequence[int]) -> tuple[float, list[float]]:
    generator = BatchGenerator(
        model,
        max_concurrency=1,
        max_context_tokens=len(prompt) + _NEW_TOKENS,
        kv_dtype=torch.int8,
    )
    request = GenerationRequest("0", prompt, _NEW_TOKENS, stop_token_ids=frozenset())
    generator.add(request)
    seconds = []
    for _ in range(_NEW_TOKENS):
        started = time.perf_counter()
        while not generator.step():
            pass  # a piece of the prompt
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1:]


def describe(found: dict[str, Any]) -> str:
    """One line on a reading, for the terminal."""
    tokens_s = sorted(found["token_s"])
    prefill_s = sorted(found["prefill_s"])[len(found["prefill_s"]) // 2]
    return f"{prefill_s:.2f} s, {1 / tokens_s[len(tokens_s) // 2]:.1f} tokens/s"
