"""How long one model takes to answer, measured on this machine."""

import statistics
import time
from dataclasses import dataclass

import torch

from r1ray.models.decoder import Decoder
from r1ray.models.kv_cache import KVCache

__all__ = ["Latency", "measure_latency"]


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds: one forward over the prompt, and one decoded token after it."""

    prefill_ms: float
    decode_ms_per_token: float
    prompt_tokens: int


@torch.inference_mode()
def measure_latency(
    model: Decoder, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 5
) -> Latency:
    """Latency of one sequence alone, after one warm-up; `repeats` prefills are counted."""
    dtype, device = model.model.norm.weight.dtype, model.model.norm.weight.device
    ids = torch.arange(prompt_tokens, device=device)[None] % model.config.vocab_size
    prefills, decodes = [], []
    for repeat in range(repeats + 1):
        cache = KVCache(
            model.config,
            max_rows=1,
            max_tokens=prompt_tokens + new_tokens,
            dtype=dtype,
            device=device,
            summary_size=model.summary_size,
        )
        started = _now(device)
        rows = cache.add_rows(1)
        model.next_logits(ids, rows, [prompt_tokens - 1])
        rows.advance([prompt_tokens])
        prefill = _now(device) - started
        for _ in range(max(1, new_tokens // repeats)):
            started = _now(device)
            rows = cache.active()
            model.next_logits(ids[:, :1], rows, [0])
            rows.advance([1])
            if repeat:
                decodes.append(_now(device) - started)
        if repeat:
            prefills.append(prefill)
    return Latency(
        1000 * statistics.median(prefills), 1000 * statistics.median(decodes), prompt_tokens
    )


def _now(device: torch.device) -> float:
    """Seconds, once what was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
