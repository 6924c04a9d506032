"""Choosing the next token from logits, every row of a batch by its own parameters.

1. Logits are adjusted: biases, penalties for tokens that were there before, and only tokens that
   the answer's form allows (`r1ray.models.grammar`).
2. Greedy rows take the largest. Others are divided by their temperature, and cut to what `top_k`,
   then `top_p` and `min_p` leave.
3. One uniform number, from the row's own generator, picks among these: what runs beside a row does
   not change what it draws.

Price: a cut by `top_k` or `top_p` needs the order of a row's likeliest tokens, 256 of them or,
where these are not enough, of the whole vocabulary. Everything but `argmax` runs on the CPU.

Shape legend: B rows, V vocabulary, R rows that are drawn, C candidates.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1ray.errors import ShapeError

if TYPE_CHECKING:
    from r1ray.models.grammar import FormState  # its library is there where answers are served

__all__ = ["MAX_LOGPROBS", "RowSampler", "SampledToken", "SamplingParams", "sample_tokens"]

MAX_LOGPROBS = 20
_CANDIDATES = 256
_LEAST_TEMPERATURE = 1e-6  # below float32's range the division gives 0 / 0


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled.

    Attributes:
        temperature: 0 is greedy; logits are divided by it otherwise.
        top_k: as many of the likeliest tokens are sampled from; 0 for all.
        top_p: the smallest set of tokens with at least this share of them is, in (0, 1].
        min_p: tokens of at least this share of the likeliest one's probability are, in [0, 1].
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it,
            negative ones multiplied; 1 for none.
        presence_penalty, frequency_penalty: taken off the logits of tokens in the answer, once or
            for each time that they are there.
        logit_bias: added to the logits of these tokens.
        num_logprobs: tokens whose log-probabilities are told beside the chosen one's; None for none
            at all. They are the model's own, before anything here.
        seed: makes the sequence reproducible; None draws from the process's generator.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_between("temperature", self.temperature, 0.0, 100.0)
        _check_between("min_p", self.min_p, 0.0, 1.0)
        _check_between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for token_id, bias in self.logit_bias.items():
            _check_between(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        if self.top_k < 0:
            raise ShapeError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ShapeError(f"top_p {self.top_p} is not in (0, 1]")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise ShapeError(f"{self.num_logprobs} logprobs are not between 0 and {MAX_LOGPROBS}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ShapeError(f"seed {self.seed} does not fit 64 bits")

    @property
    def adjusts(self) -> bool:
        """Whether logits are adjusted."""
        return bool(self.logit_bias) or self.penalizes

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class SampledToken:
    """A chosen token.

    Attributes:
        logprob: its log-probability; None where it was not asked for.
        top_logprobs: (token, log-probability) of the likeliest ones, best first.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class RowSampler:
    """The parameters of one sequence, and what they need to know of it.

    Args:
        prompt_ids: that repetition counts from.
        form: what the answer has to be like, if anything.

    Attributes:
        failure: why no further token can be chosen; None while one can.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        form: "FormState | None" = None,
    ) -> None:
        self.params = params
        self.failure: str | None = None
        self._form = form
        self._generator = (
            None if params.seed is None else torch.Generator().manual_seed(params.seed)
        )
        self._counts: Counter[int] = Counter()
        self._prompt = set(prompt_ids) if params.repetition_penalty != 1.0 else set()

    def note(self, token_id: int) -> None:
        """Count a token of the answer."""
        if self._form is not None:
            self._form.accept(token_id)
        if self.params.penalizes:
            self._counts[token_id] += 1

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` does anything."""
        return self._form is not None or self.params.adjusts

    def adjust(self, logits_V: Tensor) -> None:
        """Bias, penalize, and leave only tokens of the answer's form; in place."""
        params = self.params
        if self._counts or self._prompt:
            repeated = torch.tensor(sorted(self._prompt | self._counts.keys()), dtype=torch.long)
            before = logits_V[repeated]
            factor = params.repetition_penalty
            logits_V[repeated] = torch.where(before > 0, before / factor, before * factor)
        if self._counts:
            ids = torch.tensor(list(self._counts), dtype=torch.long)
            counts = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype)
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype)
        if self._form is not None:
            try:
                self._form.restrict(logits_V)
            except ShapeError as error:
                self.failure = str(error)

    def draw(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


@torch.inference_mode()
def sample_tokens(logits_BV: Tensor, rows: Sequence[RowSampler]) -> list[SampledToken]:
    """One token per row, each by its own parameters; the rows do not count it themselves.

    Sources: nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751; min-p, arXiv:2407.01082;
    repetition penalty, Keskar et al. 2019, arXiv:1909.05858.
    Raises:
        FloatingPointError: the logits of a row are not finite.
    """
    chosen = _argmax(logits_BV)
    own = [at for at, row in enumerate(rows) if row.adjusts or row.params.temperature > 0]
    if own:
        logits_RV = logits_BV[own].float().cpu()
        for logits_V, at in zip(logits_RV, own, strict=True):
            if rows[at].adjusts:
                rows[at].adjust(logits_V)
        for at, token in zip(own, _choose(logits_RV, [rows[at] for at in own]), strict=True):
            chosen[at] = token
    if not logits_BV[torch.arange(len(chosen)), chosen].isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    counts = [row.params.num_logprobs for row in rows]
    return [
        SampledToken(token) if count is None else _with_logprobs(logits_BV[at], token, count)
        for at, (token, count) in enumerate(zip(chosen, counts, strict=True))
    ]


def _argmax(logits_BV: Tensor) -> list[int]:
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return logits_BV.numpy().argmax(axis=-1).tolist()  # on one thread faster than torch on two
    return logits_BV.argmax(dim=-1).tolist()


def _choose(logits_RV: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    chosen = logits_RV.argmax(dim=-1).tolist()
    for at, (logits_V, row) in enumerate(zip(logits_RV, rows, strict=True)):
        if row.params.temperature > 0:
            chosen[at] = _draw(logits_V, row)
    return chosen


def _draw(logits_V: Tensor, row: RowSampler) -> int:
    """A token by its share of those that are left."""
    params, largest = row.params, logits_V.max()
    if not torch.isfinite(largest):
        raise FloatingPointError("the model's logits are not finite")
    # Weights relative to the likeliest token, which has 1.
    weights_V = ((logits_V - largest) / max(params.temperature, _LEAST_TEMPERATURE)).exp()
    if params.top_k or params.top_p < 1.0:
        weights_C, ids_C = _likeliest(weights_V, params)
    else:
        weights_C, ids_C = weights_V, None
    if params.min_p:
        weights_C = weights_C.masked_fill(weights_C < params.min_p, 0.0)
    reached_C = weights_C.cumsum(0, dtype=torch.float64)
    point = row.draw() * float(reached_C[-1])
    at = int(torch.searchsorted(reached_C, point, right=True))
    last = int(torch.searchsorted(reached_C, float(reached_C[-1])))  # that has any weight
    at = min(at, last)
    return at if ids_C is None else int(ids_C[at])


def _likeliest(weights_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(weights, tokens) of those that `top_k` and `top_p` leave, best first."""
    vocabulary = len(weights_V)
    count = min(params.top_k or vocabulary, vocabulary)
    is_all = count == vocabulary
    size = min(count, _CANDIDATES) if is_all else count
    weights_C, ids_C = weights_V.topk(size)
    total = float(weights_V.sum(dtype=torch.float64) if is_all else weights_C.double().sum())
    if size < count and float(weights_C.double().sum()) < params.top_p * total:
        weights_C, ids_C = weights_V.sort(descending=True, stable=True)
    # A token is kept while the weight before it is below the share, so at least one always is.
    before_C = weights_C.double().cumsum(0) - weights_C
    kept = max(1, int((before_C < params.top_p * total).sum()))
    return weights_C[:kept], ids_C[:kept]


def _with_logprobs(logits_V: Tensor, token: int, count: int) -> SampledToken:
    logprobs_V = logits_V.float().log_softmax(-1)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return SampledToken(token, float(logprobs_V[token]), tuple(top))


def _check_between(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise ShapeError(f"{name} {value} is not between {least:g} and {most:g}")
