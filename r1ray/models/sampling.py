"""Choosing the next token from logits: greedy, temperature and nucleus sampling, per row.

Shape legend: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1ray.errors import ShapeError

__all__ = ["SamplingParams", "sample_tokens"]


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled.

    Attributes:
        temperature: 0 is greedy; logits are divided by it otherwise.
        top_p: the smallest set of tokens with at least this probability is sampled from, in (0, 1].
        seed: makes the sequence reproducible; None draws from the process's generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ShapeError(f"temperature {self.temperature} is not between 0 and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ShapeError(f"top_p {self.top_p} is not in (0, 1]")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ShapeError(f"seed {self.seed} does not fit 64 bits")

    def build_generator(self) -> torch.Generator | None:
        """The generator of one sequence; None when the process's own is to be used."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


def sample_tokens(
    logits_BV: Tensor,
    params: list[SamplingParams],
    generators: list[torch.Generator | None],
) -> list[int]:
    """One token id per row, each by its own parameters.

    Source: nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751.
    """
    chosen = logits_BV.argmax(dim=-1).tolist()
    for row, (param, generator) in enumerate(zip(params, generators, strict=True)):
        if param.temperature > 0.0:
            chosen[row] = _sample_row(logits_BV[row].float().cpu(), param, generator)
    return chosen


def _sample_row(logits_V: Tensor, param: SamplingParams, generator: torch.Generator | None) -> int:
    temperature = max(param.temperature, 1e-6)  # below float32's range the division gives 0 / 0
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    if param.top_p < 1.0:
        ordered_V, ids_V = probabilities_V.sort(descending=True)
        # A token is kept while the mass before it is below top_p, so at least one always is.
        keep_V = ordered_V.cumsum(0) - ordered_V < param.top_p
        keep_V[0] = True  # also where top_p is zero in float32
        probabilities_V = torch.zeros_like(probabilities_V)
        probabilities_V[ids_V[keep_V]] = ordered_V[keep_V]
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
