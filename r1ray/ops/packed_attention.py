"""Causal attention inside each document of a packed row, never across a boundary.

A packed row holds documents one after the other; padding, where there is any, is the last of them.

1. `Documents` names their lengths, once per forward; positions restart at each.
2. CPU: one `causal_attention` per document, concatenated. The row is split, not sliced:
   the backward of a split is one concatenation, that of each slice a whole row of zeros.
3. CUDA: FlexAttention, compiled once, with a block mask of "not later, and the same document" that
   all layers of a forward share. `varlen_attn`, the alternative, runs in half precision alone, and
   nothing of it runs without a GPU; FlexAttention also takes float32, and its mask is tested on a
   CPU. Its kernels need a head dimension of at least 16.

Price: 4·Σ(length²)·N·H FLOP per layer instead of 4·T²·N·H, the triangle above the diagonal skipped
in both. On CPU also a copy of the output and of each gradient, and one call per document, about
60 µs with its backward: batching documents of equal length would pay below some 64 tokens only. On
CUDA the block mask takes (T/128)² numbers, once per forward; a second row length compiles once
more, with T left open, so rows of one length are best.

Shape legend: T tokens of the row, N query heads, K key/value heads, H head dimension; the batch
is 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from r1ray.errors import ShapeError
from r1ray.ops.causal_attention import causal_attention

__all__ = ["Documents", "compiled_flex_attention", "packed_attention"]

_BLOCK = 128  # tokens: FlexAttention's


class Documents:
    """Where the documents of a packed row begin and end, and each token's position in its own.

    Args:
        lengths: tokens of each document, in the order of the row.
        device: where the row is.
    Raises:
        ShapeError: there is no document, or an empty one.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.device = torch.device(device)
        if not self.lengths or min(self.lengths) < 1:
            raise ShapeError(
                f"document_lengths is {list(self.lengths)}; "
                "a packed row needs at least one document, each of at least 1 token"
            )
        positions = [torch.arange(length) for length in self.lengths]
        self.positions_1T = torch.cat(positions)[None].to(self.device)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask of this row, made when a layer first asks for it.

        A block of queries needs the blocks of keys from the beginning of its first token's document
        to itself; which of their tokens, the mask function says.
        """
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        indices_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        on_device_T = indices_T.to(self.device)

        def may_attend(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (on_device_T[query] == on_device_T[key])

        queries = torch.arange(-(-self.num_tokens // _BLOCK))
        first_keys = starts[indices_T[queries * _BLOCK]] // _BLOCK
        counts = (queries - first_keys + 1).to(self.device, torch.int32)
        keys = (first_keys[:, None] + queries).clamp(max=len(queries) - 1)
        return BlockMask.from_kv_blocks(
            counts[None, None],
            keys.to(self.device, torch.int32)[None, None],
            BLOCK_SIZE=_BLOCK,
            mask_mod=may_attend,
            seq_lengths=(self.num_tokens, self.num_tokens),
        )


def packed_attention(
    q_1NTH: Tensor, k_1KTH: Tensor, v_1KTH: Tensor, documents: Documents
) -> Tensor:
    """softmax(q·kᵀ/√H)·v over the earlier tokens of the same document: [1, N, T, H], like q.

    Args:
        q_1NTH, k_1KTH, v_1KTH: float; N is a multiple of K, whose heads serve N/K queries each.
        documents: their lengths sum to T; on the device of the tensors.
    Raises:
        ShapeError: the batch is not 1, or the lengths do not sum to T.
    """
    batch, _, tokens, _ = q_1NTH.shape
    if batch != 1 or tokens != documents.num_tokens:
        raise ShapeError(
            f"packed_attention: a batch of {batch} with {tokens} tokens does not fit one row of "
            f"documents that sum to {documents.num_tokens}"
        )
    attend = _attend_flex if q_1NTH.is_cuda else _attend_each
    return attend(q_1NTH, k_1KTH, v_1KTH, documents)


def _attend_each(q_1NTH: Tensor, k_1KTH: Tensor, v_1KTH: Tensor, documents: Documents) -> Tensor:
    """Document by document; split and joined along the outer dimension of [T, N, H] in memory."""
    splits = (x.transpose(1, 2).split(documents.lengths, dim=1) for x in (q_1NTH, k_1KTH, v_1KTH))
    parts = []
    for document in zip(*splits, strict=True):
        q, k, v = (x.transpose(1, 2) for x in document)
        parts.append(causal_attention(q, k, v).transpose(1, 2))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _attend_flex(q_1NTH: Tensor, k_1KTH: Tensor, v_1KTH: Tensor, documents: Documents) -> Tensor:
    """All documents in one kernel. Under autocast a norm may have left q and k wider than v."""
    return compiled_flex_attention()(
        q_1NTH.to(v_1KTH.dtype),
        k_1KTH.to(v_1KTH.dtype),
        v_1KTH,
        block_mask=documents.block_mask,
        enable_gqa=True,
    )


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention as kernels, which it only is when compiled."""
    return torch.compile(flex_attention)
