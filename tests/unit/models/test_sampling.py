import math

import pytest
import torch

from r1ray.errors import ShapeError
from r1ray.models.sampling import SamplingParams, sample_tokens

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
NUM_DRAWS = 4000


def _frequencies(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_tokens(logits[None], [params], [generator])[0] for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / NUM_DRAWS


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
    assert sample_tokens(logits, [params] * 2, [None] * 2) == [1, 2]


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38]])
    params = SamplingParams(temperature=0.01, seed=1)
    assert sample_tokens(logits, [params], [params.build_generator()])[0] in (0, 2)


def test_a_seed_reproduces_a_sequence_whatever_happens_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    seeded = SamplingParams(temperature=1.0, seed=11)

    def draw(beside: SamplingParams) -> list[int]:
        generators = [beside.build_generator(), seeded.build_generator(), None]
        params = [beside, seeded, SamplingParams(temperature=2.0)]
        return [sample_tokens(logits, params, generators)[1] for _ in range(20)]

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
