"""Which blocks are kept: budgets, sinks, order."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.ops.block_selection import DENSE_BLOCKS, choose_blocks, count_both, count_chosen


def test_the_number_of_blocks_grows_with_the_logarithm_of_the_position() -> None:
    assert [count_chosen(own) for own in (0, 1, 2, 5, 31)] == [0, 0, 1, 4, 30]
    assert count_chosen(0) == count_chosen(1) == 0
    assert count_chosen(DENSE_BLOCKS) == 1 + 8  # 1.5 * log2(33) = 7.6
    assert count_chosen(127) == 1 + 11  # 8,192 tokens: 10.5
    assert count_chosen(1023) == 1 + 15
    assert [count_both(own) for own in (0, 1, 5, 31, 127)] == [0, 0, 4, 30, 24]
    assert max(count_chosen(own) for own in range(DENSE_BLOCKS, 20_000)) <= 65


@settings(max_examples=40, deadline=None)
@given(
    own_BU=st.lists(st.lists(st.integers(0, 60), min_size=3, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_the_sink_and_the_best_earlier_blocks_are_chosen(
    own_BU: list[list[int]], seed: int
) -> None:
    blocks = 61
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(own_BU), 2, 3, blocks, generator=generator)
    chosen = choose_blocks(scores, torch.tensor(own_BU))
    for row, owns in enumerate(own_BU):
        for unit, own in enumerate(owns):
            for group in range(2):
                found = [block for block in chosen[row, group, unit].tolist() if block >= 0]
                assert len(found) == len(set(found)) == count_chosen(own)
                earlier = range(1, max(1, own - 1))
                ranked = sorted(earlier, key=lambda c: -float(scores[row, group, unit, c]))
                expected = [0, *ranked][: count_chosen(own)]
                assert found == expected
                assert (chosen[row, group, unit, len(found) :] == -1).all()


def test_blocks_that_are_too_late_may_hold_anything() -> None:
    scores = torch.zeros(1, 1, 1, 50)
    scores[..., 39:] = float("nan")
    chosen = choose_blocks(scores, torch.tensor([[40]]))
    assert chosen.max() < 39
    assert (chosen[..., :1] == 0).all()
