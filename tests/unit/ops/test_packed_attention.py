"""Packed attention against dense attention under an explicit mask.

Shape legend: T tokens, N query heads, K key/value heads, H head dimension.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from r1ray.errors import ShapeError
from r1ray.ops.packed_attention import Documents, _attend_flex, packed_attention

# float32 sums over at most some hundred terms in a different order: a few ulp (2^-23) of outputs
# around 4 and of gradients around 10.
TOLERANCE = 1e-5

document_lengths = st.lists(st.integers(1, 24), min_size=1, max_size=8)


def packed_attention_reference(
    q_1NTH: Tensor, k_1KTH: Tensor, v_1KTH: Tensor, documents: Documents
) -> Tensor:
    """The whole [T, T] score matrix, masked."""
    groups = q_1NTH.shape[1] // k_1KTH.shape[1]
    k_1NTH, v_1NTH = k_1KTH.repeat_interleave(groups, 1), v_1KTH.repeat_interleave(groups, 1)
    scores = q_1NTH @ k_1NTH.transpose(-1, -2) / q_1NTH.shape[-1] ** 0.5
    scores = scores.masked_fill(~_build_mask(documents), -torch.inf)
    return scores.softmax(dim=-1) @ v_1NTH


def _build_mask(documents: Documents) -> Tensor:
    """bool [T, T], true where a query (row) sees a key (column): written out token by token."""
    starts = [sum(documents.lengths[:i]) for i in range(len(documents.lengths))]
    mask = torch.zeros(documents.num_tokens, documents.num_tokens, dtype=torch.bool)
    for start, length in zip(starts, documents.lengths, strict=True):
        for token in range(start, start + length):
            mask[token, start : token + 1] = True
    return mask


def _random_qkv(
    tokens: int, *, heads: tuple[int, int] = (4, 2), head_dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a projection leaves them: [T, heads, H] in memory."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, tokens, count, head_dim, generator=generator).transpose(1, 2)
        for count in (heads[0], heads[1], heads[1])
    )
    return q, k, v


@settings(max_examples=60, deadline=None)
@given(
    lengths=document_lengths,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    seed=st.integers(0, 1000),
)
def test_packed_attention_and_its_gradients_equal_masked_dense_attention(
    lengths: list[int], heads: tuple[int, int], seed: int
) -> None:
    documents = Documents(lengths)
    inputs = _random_qkv(sum(lengths), heads=heads, seed=seed)
    weights, _, _ = _random_qkv(sum(lengths), heads=heads, seed=seed + 1)
    results = []
    for attend in (packed_attention, packed_attention_reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, documents)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_single_document_is_plain_causal_attention_bit_by_bit() -> None:
    q, k, v = _random_qkv(50)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert torch.equal(packed_attention(q, k, v, Documents([50])), plain)


def test_each_document_is_bit_equal_to_itself_alone() -> None:
    lengths = [7, 1, 30, 7, 64]
    q, k, v = _random_qkv(sum(lengths))
    packed = packed_attention(q, k, v, Documents(lengths)).split(lengths, dim=2)
    alone = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    for length, part, inputs in zip(lengths, packed, alone, strict=True):
        assert torch.equal(part, packed_attention(*inputs, Documents([length])))


def test_another_document_gets_no_gradient() -> None:
    q, k, v = (x.clone().requires_grad_() for x in _random_qkv(20))
    out = packed_attention(q, k, v, Documents([8, 5, 7]))
    for gradient in torch.autograd.grad(out[:, :, 8:13].square().sum(), (q, k, v)):
        assert gradient[:, :, 8:13].abs().sum() > 0
        assert torch.all(gradient[:, :, :8] == 0)
        assert torch.all(gradient[:, :, 13:] == 0)


def test_merging_the_heads_of_the_output_copies_nothing() -> None:
    q, k, v = _random_qkv(20)
    out = packed_attention(q, k, v, Documents([8, 12]))
    merged = out.transpose(1, 2).reshape(1, 20, -1)
    assert merged.data_ptr() == out.data_ptr()


def test_positions_restart_at_each_document() -> None:
    assert Documents([3, 1, 2]).positions_1T.tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("lengths", [[], [3, 0, 2], [4, -1]])
def test_a_document_without_tokens_is_named(lengths: list[int]) -> None:
    with pytest.raises(ShapeError) as caught:
        Documents(lengths)
    assert str(lengths) in str(caught.value)


def test_documents_that_do_not_fill_the_row_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"10 tokens does not fit .* sum to 9"):
        packed_attention(*_random_qkv(10), Documents([4, 5]))


def test_more_than_one_row_is_refused() -> None:
    q, k, v = (torch.cat([x, x]) for x in _random_qkv(10))
    with pytest.raises(ShapeError, match="batch of 2"):
        packed_attention(q, k, v, Documents([4, 6]))


# The CUDA path's mask, on a CPU. A FlexAttention block is 128 x 128: these rows cover documents
# within a block, over several, ending on a block's edge and beside it, and a row that fills none.
MASKED_ROWS = [[5], [100, 28], [128, 128], [129, 127], [1, 300, 1, 40], [17] * 20, [512, 3]]


@pytest.fixture
def eager_flex_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention without its compiler: PyTorch's own switch for debugging masks."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        "r1ray.ops.packed_attention.compiled_flex_attention", lambda: flex.flex_attention
    )
    return


@pytest.mark.usefixtures("eager_flex_attention")
@pytest.mark.parametrize("lengths", MASKED_ROWS, ids=str)
def test_the_flex_attention_path_equals_the_per_document_path(lengths: list[int]) -> None:
    inputs = _random_qkv(sum(lengths))
    documents = Documents(lengths)
    with torch.no_grad():
        found = _attend_flex(*inputs, documents)
        torch.testing.assert_close(
            found, packed_attention(*inputs, documents), atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("lengths", MASKED_ROWS, ids=str)
def test_the_block_mask_keeps_exactly_the_blocks_that_hold_a_visible_pair(
    lengths: list[int],
) -> None:
    """The compiled kernel skips whole blocks by it; the eager path above does not look at it."""
    documents = Documents(lengths)
    blocks = -(-documents.num_tokens // 128)
    mask = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    mask[: documents.num_tokens, : documents.num_tokens] = _build_mask(documents)
    expected = mask.view(blocks, 128, blocks, 128).any(dim=3).any(dim=1)
    assert torch.equal(documents.block_mask.to_dense()[0, 0].bool(), expected)


def test_the_block_mask_is_made_once_for_all_layers() -> None:
    documents = Documents([5, 6])
    assert documents.block_mask is documents.block_mask


@pytest.mark.usefixtures("eager_flex_attention")
def test_queries_wider_than_values_are_narrowed_for_flex_attention() -> None:
    """Under autocast a float32 norm weight leaves q and k in float32, v in bfloat16."""
    q, k, v = _random_qkv(20)
    documents = Documents([8, 12])
    with torch.no_grad():
        found = _attend_flex(q, k, v.bfloat16(), documents)
        expected = _attend_flex(q.bfloat16(), k.bfloat16(), v.bfloat16(), documents)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="NO GPU: the compiled FlexAttention kernel, forward and backward, is NOT TESTED here",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", MASKED_ROWS, ids=str)
def test_cuda_output_and_gradients_equal_masked_dense_attention(
    lengths: list[int], dtype: torch.dtype
) -> None:
    inputs = [x.to("cuda", dtype) for x in _random_qkv(sum(lengths), head_dim=64)]
    weights = _random_qkv(sum(lengths), head_dim=64, seed=1)[0].to("cuda")
    found = [x.clone().requires_grad_() for x in inputs]
    expected = [x.cpu().float().requires_grad_() for x in inputs]
    out = packed_attention(*found, Documents(lengths, "cuda"))
    reference = packed_attention_reference(*expected, Documents(lengths))
    found_gradients = torch.autograd.grad((out * weights).sum(), found)
    expected_gradients = torch.autograd.grad((reference * weights.cpu()).sum(), expected)
    # bfloat16 keeps 8 bits, float32 24 (PyTorch's default is no TF32): relative to the largest.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    pairs = zip([out, *found_gradients], [reference, *expected_gradients], strict=True)
    for one, other in pairs:
        assert (one.cpu().float() - other).abs().max() < tolerance * other.abs().max()
