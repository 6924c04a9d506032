import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from r1ray.errors import ShapeError
from r1ray.models.sampling import RowSampler, SampledToken, SamplingParams, sample_tokens

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
NUM_DRAWS = 4000


def _frequencies(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    sampler = RowSampler(dataclasses.replace(params, seed=0), [])
    drawn = [sample_tokens(logits[None], [sampler])[0].token_id for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / NUM_DRAWS


def _tokens(logits: torch.Tensor, params: Sequence[SamplingParams]) -> list[int]:
    found = sample_tokens(logits, [RowSampler(item, []) for item in params])
    return [item.token_id for item in found]


def _assert_drawn_from(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Four standard deviations of a binomial share of NUM_DRAWS draws; the seed is fixed.
    bound = 4 * (expected * (1 - expected) / NUM_DRAWS).sqrt()
    assert torch.all((found - expected).abs() <= bound), (found, expected)


def test_temperature_one_draws_from_the_softmax() -> None:
    _assert_drawn_from(
        _frequencies(SamplingParams(temperature=1.0), PROBABILITIES.log()), PROBABILITIES
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    found = _frequencies(SamplingParams(temperature=temperature), PROBABILITIES.log())
    _assert_drawn_from(found, expected / expected.sum())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # 0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15.
    kept = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0])
    found = _frequencies(SamplingParams(temperature=1.0, top_p=0.8), PROBABILITIES.log())
    _assert_drawn_from(found, kept / kept.sum())
    assert found[3:].sum() == 0


def test_top_p_does_not_depend_on_the_order_of_the_vocabulary() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    found = _frequencies(SamplingParams(temperature=1.0, top_p=0.6), PROBABILITIES[order].log())
    assert set(found.nonzero().flatten().tolist()) == {1, 4}  # where 0.5 and 0.25 went


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1e-4),
        SamplingParams(temperature=1e-300),
    ],
)
def test_greedy_and_its_limits_take_the_largest_logit(params: SamplingParams) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9], [0.0, -50.0, 1e4]])
    assert _tokens(logits, [params] * 2) == [1, 2]


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38]])
    params = SamplingParams(temperature=0.01, seed=1)
    assert _tokens(logits, [params])[0] in (0, 2)


def test_a_seed_reproduces_a_sequence_whatever_happens_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    seeded = SamplingParams(temperature=1.0, seed=11)

    def draw(beside: SamplingParams) -> list[int]:
        params = [beside, seeded, SamplingParams(temperature=2.0)]
        samplers = [RowSampler(item, []) for item in params]
        return [sample_tokens(logits, samplers)[1].token_id for _ in range(20)]

    first = draw(SamplingParams())
    assert draw(SamplingParams(temperature=1.3, top_p=0.5, seed=99)) == first
    assert len(set(first)) > 5


@pytest.mark.parametrize("temperature", [-0.1, 100.5, math.nan, math.inf])
def test_temperatures_out_of_range_are_refused(temperature: float) -> None:
    with pytest.raises(ShapeError, match="temperature"):
        SamplingParams(temperature=temperature)


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.01, math.nan])
def test_top_p_out_of_range_is_refused(top_p: float) -> None:
    with pytest.raises(ShapeError, match="top_p"):
        SamplingParams(top_p=top_p)


def test_top_k_keeps_the_likeliest_and_top_p_is_a_share_of_these() -> None:
    kept = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0])
    logits = PROBABILITIES.log()
    found = _frequencies(SamplingParams(temperature=1.0, top_k=3), logits)
    _assert_drawn_from(found, kept / kept.sum())
    found = _frequencies(SamplingParams(temperature=1.0, top_k=3, top_p=0.8), logits)
    assert set(found.nonzero().flatten().tolist()) == {0, 1}  # (0.5 + 0.25) / 0.9 reaches it
    assert _frequencies(SamplingParams(temperature=1.0, top_k=99), logits).min() > 0


def test_min_p_is_a_share_of_the_likeliest_token() -> None:
    kept = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0])
    found = _frequencies(SamplingParams(temperature=1.0, min_p=0.2), PROBABILITIES.log())
    _assert_drawn_from(found, kept / kept.sum())


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_a_flat_distribution_needs_more_candidates_than_are_looked_at_first(top_p: float) -> None:
    logits = 0.01 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    samplers = [RowSampler(SamplingParams(temperature=1.0, top_p=top_p, seed=3), [])]
    drawn = {sample_tokens(logits, samplers)[0].token_id for _ in range(600)}
    order = logits[0].argsort(descending=True).tolist()
    kept = set(order[: int(top_p * 5000 * 1.02) + 2])
    assert drawn <= kept
    assert len(drawn - set(order[:256])) > 300


def test_penalties_and_biases_change_the_largest_logit() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 1.8]])

    def choose(params: SamplingParams, prompt: list[int], answer: list[int]) -> int:
        sampler = RowSampler(params, prompt)
        for token in answer:
            sampler.note(token)
        return sample_tokens(logits, [sampler])[0].token_id

    assert choose(SamplingParams(), [0], [0]) == 0
    assert choose(SamplingParams(presence_penalty=0.15), [0], []) == 0  # of the answer alone
    assert choose(SamplingParams(presence_penalty=0.15), [], [0]) == 1
    assert choose(SamplingParams(presence_penalty=0.15), [], [0, 0, 0, 1]) == 0  # 1.85, 1.75, 1.8
    assert choose(SamplingParams(frequency_penalty=0.15), [], [0, 1, 1]) == 0
    assert choose(SamplingParams(frequency_penalty=0.15), [], [0, 0, 1, 1]) == 3
    assert choose(SamplingParams(repetition_penalty=1.2), [0], [1]) == 3
    assert choose(SamplingParams(repetition_penalty=1.06), [0], []) == 1
    assert choose(SamplingParams(logit_bias={2: 3.1}), [], []) == 2
    assert choose(SamplingParams(logit_bias={0: -100.0, 1: -100.0}), [], []) == 3
    assert torch.equal(logits, torch.tensor([[2.0, 1.9, -1.0, 1.8]]))  # they are the model's


def test_negative_logits_are_multiplied_by_the_repetition_penalty() -> None:
    sampler = RowSampler(SamplingParams(repetition_penalty=2.0), [0])
    assert sample_tokens(torch.tensor([[-1.0, -1.5]]), [sampler])[0].token_id == 1


def test_logprobs_are_the_models_own() -> None:
    logits = PROBABILITIES.log()[None].expand(2, -1)
    params = SamplingParams(temperature=0.5, logit_bias={4: 50.0}, num_logprobs=2)
    found, plain = sample_tokens(logits, [RowSampler(params, []), RowSampler(SamplingParams(), [])])
    assert plain == SampledToken(0)
    assert found.token_id == 4
    assert found.logprob == pytest.approx(math.log(0.03), abs=1e-5)
    assert [token for token, _ in found.top_logprobs] == [0, 1]
    assert [value for _, value in found.top_logprobs] == pytest.approx(
        [math.log(0.5), math.log(0.25)], abs=1e-5
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_distribution(temperature: float, broken: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        _tokens(torch.tensor([[0.0, broken]]), [SamplingParams(temperature=temperature)])


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": -1},
        {"min_p": 1.5},
        {"presence_penalty": 2.5},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"logit_bias": {3: 101.0}},
        {"num_logprobs": 21},
    ],
)
def test_other_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        SamplingParams(**values)
