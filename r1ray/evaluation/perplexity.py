"""Perplexity of a text, in windows.

Shape legend: B rows, T tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from r1ray.models.decoder import Decoder
from r1ray.models.tokenizer import Tokenizer

__all__ = ["measure_perplexity"]


_MAX_NATS = 700.0  # exp of more overflows; NaN ends up as inf, too


@torch.inference_mode()
def measure_perplexity(
    model: Decoder, tokenizer: Tokenizer, text: str, *, max_tokens: int, window: int
) -> float:
    """exp of the mean negative log-likelihood of the first `max_tokens` tokens of `text`.

    Windows do not overlap; the first token of each has no context and is not counted.
    """
    ids = torch.tensor(tokenizer.encode(text)[:max_tokens])
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        chunk_1T = ids[None, start : start + window]
        if chunk_1T.shape[1] < 2:
            break
        logits_1TV = model(chunk_1T).float()
        total += float(F.cross_entropy(logits_1TV[0, :-1], chunk_1T[0, 1:], reduction="sum"))
        count += chunk_1T.shape[1] - 1
    mean = total / count
    return math.exp(mean) if mean < _MAX_NATS else math.inf
