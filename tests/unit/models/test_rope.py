"""Rotary tables that are kept, against those computed anew. (The tables themselves: the oracle.)"""

import pytest
import torch

from r1ray.models.rope import RotaryCache, rotary_tables
from tests.fakes import tiny_config


@pytest.mark.parametrize(
    ("starts", "tokens"), [([0], 1), ([5, 900, 3], 1), ([7, 7], 20), ([1, 2], 3), ([4000], 200)]
)
def test_kept_tables_are_those_of_the_positions(starts: list[int], tokens: int) -> None:
    config = tiny_config()
    tables = RotaryCache(config)
    for _ in range(2):  # when they are made, and from what is there
        found = tables.behind(starts, tokens)
        positions = torch.tensor(starts)[:, None] + torch.arange(tokens)
        expected = rotary_tables(config, positions)
        for kept, anew in zip(found, expected, strict=True):
            assert kept.is_contiguous()
            assert torch.equal(kept.expand_as(anew[:, 0]), anew[:, 0])
