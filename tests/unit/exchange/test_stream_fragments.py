"""Cutting weights into fragments and shards loses nothing and is even."""

import pytest
import torch
from torch import nn

from r1ray.errors import ExchangeError
from r1ray.exchange.stream_fragments import cut_fragments, shard_slices


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 9), (7,), (11, 3, 5), (1,), (23,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize(("num_fragments", "num_shards"), [(1, 1), (4, 3), (8, 5)])
def test_every_weight_is_in_one_fragment_and_sizes_are_even(
    num_fragments: int, num_shards: int
) -> None:
    parameters = _parameters()
    fragments = cut_fragments(parameters, num_fragments, num_shards)
    for number, fragment in enumerate(fragments, start=1):
        fragment.add_(torch.full((fragment.numel,), 100.0 * number))
    for before, after in zip(_parameters(), parameters, strict=True):
        added = (after - before).flatten()
        assert ((added / 100).round() >= 1).all()  # touched, once: the numbers stay apart
        assert ((added / 100).round() <= num_fragments).all()
    sizes = [fragment.numel for fragment in fragments]
    assert sum(sizes) == sum(item.numel() for item in parameters)
    assert max(sizes) - min(sizes) <= 8  # one element a stripe
    for fragment in fragments:
        shards = [shard.stop - shard.start for shard in fragment.shards]
        assert sum(shards) == fragment.numel
        assert max(shards) - min(shards) <= 1
        assert min(shards) > 0


def test_a_fragment_holds_parts_of_every_depth() -> None:
    parameters = [nn.Parameter(torch.zeros(200)) for _ in range(4)]
    for fragment in cut_fragments(parameters, 2, 1):
        fragment.add_(torch.ones(fragment.numel))
        assert all(0 < parameter.sum() < 200 for parameter in parameters)
        fragment.add_(-torch.ones(fragment.numel))


def test_what_is_written_is_read_back() -> None:
    fragments = cut_fragments(_parameters(), 3, 2)
    for fragment in fragments:
        weights_E = torch.arange(float(fragment.numel))
        before = [other.read() for other in fragments if other is not fragment]
        fragment.write(weights_E)
        assert torch.equal(fragment.read(), weights_E)
        after = [other.read() for other in fragments if other is not fragment]
        assert all(map(torch.equal, before, after))


def test_a_model_too_small_for_its_shards_is_refused() -> None:
    with pytest.raises(ExchangeError, match="556 parameters are too few for 8 fragments and 9"):
        cut_fragments(_parameters(), 8, 9)


def test_shards_of_any_size_cover_the_vector() -> None:
    for numel in (5, 12, 13):
        indices = [i for shard in shard_slices(numel, 5) for i in range(numel)[shard]]
        assert indices == list(range(numel))
