"""SmolLM2 as it is served, reading long prompts in chunks: block-sparse attention against dense.

Both have INT8 weights, int8 keys and values, and keep what earlier chunks left; the kernels are the
same but for the choice of blocks. Gates are untrained, and the 7.5% of the heads that choose by the
keys themselves are drawn at random: both take the time that trained ones do. Beyond 8,192
tokens, positions are scaled by YaRN. Re-reading reads every prefix that ends with a piece of 4,096
tokens from its beginning, densely.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

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
_REPEATS = {8000: 5, 16_000: 5, 32_000: 3}
_WARM_UP = 2500
_ATTENTIONS: tuple[AttentionKind, ...] = ("dense", "sparse")


def measure_reading(
    base: Path, token_ids: Sequence[int], length: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of reading `length` tokens, and of each of the tokens decoded behind them.

    From attention -> what; dense and sparse in turns. A short reading before warms up.
    """
    found: dict[str, dict[str, list[float]]] = {}
    models = {attention: load_reader(base, length, attention) for attention in _ATTENTIONS}
    for model in models.values():
        _read(model, token_ids[:_WARM_UP])
    for repeat in range(_REPEATS[length]):
        for attention, model in models.items():
            prefill_s, tokens_s = _read(model, token_ids[repeat : repeat + length])
            seconds = found.setdefault(attention, {"prefill_s": [], "token_s": []})
            seconds["prefill_s"].append(prefill_s)
            seconds["token_s"] += tokens_s
    return found


def measure_rereading(base: Path, token_ids: Sequence[int], length: int) -> list[float]:
    """Seconds of reading each prefix of a multiple of 4,096 tokens, up to `length`, densely."""
    model = load_reader(base, length, "dense")
    _read(model, token_ids[:_WARM_UP])
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


def describe(found: dict[str, dict[str, list[float]]]) -> str:
    """One line on the readings of a length, for the terminal."""
    parts = []
    for attention, seconds in found.items():
        prefill_s, token_s = (statistics.median(seconds[name]) for name in ("prefill_s", "token_s"))
        parts.append(f"{attention} {prefill_s:.2f} s, {1 / token_s:.1f} tokens/s")
    return "; ".join(parts)
