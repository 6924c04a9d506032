import pytest
import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.kv_cache import KVCache, KVPool
from tests.fakes import tiny_config, tiny_model
from tests.unit.oracle import random_ids

CONFIG = tiny_config()


def _cache(*, max_rows: int = 4, max_tokens: int = 40) -> KVCache:
    return KVCache(CONFIG, max_rows=max_rows, max_tokens=max_tokens, dtype=torch.float32)


def _fill(cache: KVCache, row_of: list[int], length: int) -> list[Tensor]:
    """Write rows whose keys all equal `row_of[i]`, `length` tokens each; returns the views."""
    rows = cache.add_rows(len(row_of))
    values = torch.tensor(row_of, dtype=torch.float32)[:, None, None, None]
    new = values.expand(-1, CONFIG.num_kv_heads, length, CONFIG.head_dim)
    positions = torch.arange(length)[None].expand(len(row_of), -1)
    keys, _ = rows.write(0, new, new, positions)
    rows.advance([length] * len(row_of))
    return [keys]


def test_rows_are_counted() -> None:
    cache = _cache()
    _fill(cache, [1, 2], length=5)
    assert cache.lengths == [5, 5]
    cache.add_rows(2)
    assert (cache.num_active, cache.lengths) == (4, [5, 5, 0, 0])


def test_more_rows_than_free_is_a_shape_error() -> None:
    cache = _cache(max_rows=2)
    cache.add_rows(1)
    with pytest.raises(ShapeError, match="2 more rows do not fit: 1 of 2 are in use"):
        cache.add_rows(2)
    assert cache.num_active == 1


def test_more_tokens_than_the_context_is_a_shape_error() -> None:
    model, cache = tiny_model(), _cache(max_tokens=8)
    with torch.inference_mode():
        rows = cache.add_rows(1)
        model(random_ids(1, 8), rows)
        rows.advance([8])
        with pytest.raises(ShapeError, match="9 tokens do not fit into a cache of 8"):
            model(random_ids(1, 1), cache.active())


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole() -> None:
    model, cache = tiny_model("qwen3"), _cache()
    input_ids = random_ids(2, 24)
    with torch.inference_mode():
        whole = model(input_ids)
        cache.add_rows(2)
        pieces = []
        for begin, end in ((0, 7), (7, 8), (8, 24)):
            rows = cache.active()
            pieces.append(model(input_ids[:, begin:end], rows))
            rows.advance([end - begin] * 2)
    # The cached path sums in another order: float32 rounding of logits around 10.
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


def test_rows_of_different_lengths_decode_as_if_alone() -> None:
    model, cache = tiny_model(), _cache()
    first, second, following = random_ids(1, 9), random_ids(1, 4, seed=1), random_ids(2, 3, seed=2)
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0], padded[1, :4] = first[0], second[0]
    with torch.inference_mode():
        rows = cache.add_rows(2)
        model(padded, rows)
        rows.advance([9, 4])
        together = model(following, cache.active())
        for row, prompt in enumerate((first, second)):
            alone = model(torch.cat([prompt, following[row : row + 1]], dim=1))[:, -3:]
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_may_share_the_pages_of_their_beginning(dtype: torch.dtype) -> None:
    config = tiny_config(max_positions=512)
    model = tiny_model(max_positions=512)
    pool = KVPool(config, 6, dtype=dtype)
    beginning, first, second = (
        random_ids(1, 64),
        random_ids(1, 9, seed=1),
        random_ids(1, 80, seed=2),
    )
    with torch.inference_mode():
        model(torch.cat([beginning, first], dim=1), pool.slice([[4, 1]], [0]))
        found = model(second, pool.slice([[4, 0, 5]], [64]))
        again = model(first, pool.slice([[4, 1]], [64]))
        alone = KVPool(config, 3, dtype=dtype)
        model(beginning, alone.slice([[0, 1, 2]], [0]))
        expected = model(second, alone.slice([[0, 1, 2]], [64]))
        whole = model(torch.cat([beginning, first], dim=1), alone.slice([[0, 1, 2]], [0]))
    assert torch.equal(found, expected)
    torch.testing.assert_close(again, whole[:, 64:], atol=1e-4, rtol=0)


def test_tokens_beyond_the_longest_rows_pages_are_a_shape_error() -> None:
    pool = KVPool(CONFIG, 4, dtype=torch.float32)
    rows = pool.slice([[0, 1], [2]], [64, 60])
    assert rows.check_room(64) == 128  # the second is padded
    with pytest.raises(ShapeError, match="129 tokens do not fit into a cache of 128"):
        rows.check_room(65)
