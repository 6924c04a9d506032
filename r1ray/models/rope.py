"""Rotary position embedding with the scalings that Llama and Qwen checkpoints use.

1. `inverse_frequencies` gives one angular frequency per pair of head dimensions, and the factor
   that cos and sin are multiplied by.
2. `rotary_tables` evaluates them at given positions, once per forward for all layers.
3. `apply_rotary` rotates queries and keys, halves paired as Hugging Face stores them.

Price: 2·T·H multiplications per layer. `dynamic` and `longrope` depend on the sequence length, so
keys that were cached at a shorter length keep the frequencies of that length, as in transformers.

Shape legend: B batch, T tokens, N heads, H head dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r1ray.models.config import ModelConfig

__all__ = ["apply_rotary", "inverse_frequencies", "rotary_tables"]


def inverse_frequencies(config: ModelConfig, seq_len: int) -> tuple[Tensor, float]:
    """(frequencies float32 [H/2] in radians per position, factor on cos and sin).

    Source: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); dynamic
    NTK and YaRN: Peng et al. 2023 (arXiv:2309.00071); LongRoPE: arXiv:2402.13753; llama3: Meta's
    Llama 3.1 release.
    """
    rope, dim = config.rope, config.head_dim
    get = rope.parameters.get
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.type == "default":
        return plain, 1.0
    if rope.type == "linear":
        return plain / rope.parameters["factor"], 1.0
    if rope.type == "dynamic":
        trained = config.max_positions
        stretch = rope.parameters["factor"] * max(seq_len, trained) / trained
        theta = rope.theta * (stretch - rope.parameters["factor"] + 1) ** (dim / (dim - 2))
        return 1.0 / (theta**exponents), 1.0
    trained = get("original_max_position_embeddings") or config.max_positions
    factor = get("factor") or config.max_positions / trained
    if rope.type == "llama3":
        low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
        turns = trained * plain / (2 * math.pi)  # rotations over the trained context
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * keep + plain / factor * (1.0 - keep), 1.0
    attention_factor = get("attention_factor")
    if rope.type == "longrope":
        name = "long_factor" if seq_len > trained else "short_factor"
        if attention_factor is None:
            log_ratio = math.log(factor) / math.log(trained) if factor > 1.0 else 0.0
            attention_factor = math.sqrt(1.0 + log_ratio)
        return plain / torch.tensor(rope.parameters[name], dtype=torch.float32), attention_factor
    keep = 1.0 - _yarn_ramp(config, trained)
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(config, factor)
    return plain * keep + plain / factor * (1.0 - keep), attention_factor


def _yarn_ramp(config: ModelConfig, trained: int) -> Tensor:
    """0 for dimensions that turn often within the trained context, 1 for those that hardly do."""
    dim, get = config.head_dim, config.rope.parameters.get

    def dimension_of(rotations: float) -> float:
        return (
            dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope.theta))
        )

    low = dimension_of(get("beta_fast") or 32)
    high = dimension_of(get("beta_slow") or 1)
    if get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_attention_factor(config: ModelConfig, factor: float) -> float:
    get = config.rope.parameters.get

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    numerator, denominator = get("mscale"), get("mscale_all_dim")
    if numerator and denominator:
        return mscale(numerator) / mscale(denominator)
    return mscale(1.0)


def rotary_tables(
    config: ModelConfig, positions_BT: Tensor, document_lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [B, 1, T, H], at int64 positions [B, T].

    Args:
        document_lengths: of the documents that the one row (B = 1) is made of; without it, each
            row is a sequence of its own.
    """
    frequencies, factor = inverse_frequencies(config, seq_len=0)
    if config.rope.depends_on_length:  # each by its own length, whoever it is batched with
        if document_lengths is None:
            last_B = positions_BT.max(dim=1).values.tolist()
            rows = [inverse_frequencies(config, last + 1)[0] for last in last_B]
            frequencies = torch.stack(rows)[:, None]
        else:
            rows = [inverse_frequencies(config, length)[0] for length in document_lengths]
            repeats = torch.tensor(document_lengths)
            frequencies = torch.stack(rows).repeat_interleave(repeats, dim=0)[None]
    angles = positions_BT[:, :, None].float() * frequencies.to(positions_BT.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


class RotaryCache:
    """`rotary_tables` of positions from 0 on, computed once; 8·H bytes for each position."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._cos, self._sin = torch.empty(0, config.head_dim), torch.empty(0, config.head_dim)

    def behind(self, starts: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the next `tokens` positions of rows of these lengths, on the CPU.

        Each contiguous float32 [B, T, H], or [1, T, H] where all rows are equally long.
        """
        if self._config.rope.depends_on_length:
            positions_BT = torch.tensor(starts)[:, None] + torch.arange(tokens)
            cos, sin = rotary_tables(self._config, positions_BT)
            return cos[:, 0], sin[:, 0]
        least, end = min(starts), max(starts) + tokens
        if end > len(self._cos):
            positions_1S = torch.arange(1 << (end - 1).bit_length())[None]
            self._cos, self._sin = (
                table[0, 0] for table in rotary_tables(self._config, positions_1S)
            )
        if least + tokens == end:
            return self._cos[None, least:end], self._sin[None, least:end]
        positions_BT = torch.tensor(starts)[:, None] + torch.arange(tokens)
        return self._cos[positions_BT], self._sin[positions_BT]


def apply_rotary(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """x with its two halves of H rotated as pairs; dtype of x."""
    first, second = x_BNTH.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BNTH * cos_B1TH + rotated * sin_B1TH).to(x_BNTH.dtype)
