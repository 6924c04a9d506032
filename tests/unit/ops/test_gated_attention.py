"""One call that chooses and attends against the two that it stands for."""

import pytest
import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate, BoundsGate
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.block_sparse import block_sparse_attention
from r1ray.ops.cached_states import CachedStates, quantize_states
from r1ray.ops.gated_attention import gated_attention
from tests.native_kernels import needs_native

_BLOCKS = 36


def _draw(
    starts: list[int], tokens: int, size: int, *, is_int8: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, list[CachedStates]]:
    """Queries, rotary tables, summaries, and keys and values."""
    generator = torch.Generator().manual_seed(0)
    rows = len(starts)
    q_BTNH = torch.randn(rows, tokens, 4, size, generator=generator)
    angles = torch.randn(rows, 1, tokens, size // 2, generator=generator)
    rotary = (torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1))
    summaries = torch.randn(rows, 2, _BLOCKS, size, generator=generator)
    floats = torch.randn(2, rows, 2, _BLOCKS * BLOCK, size, generator=generator)
    states = [CachedStates(*quantize_states(x)) if is_int8 else CachedStates(x) for x in floats]
    return (q_BTNH, q_BTNH.transpose(1, 2)), rotary, summaries, states


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("marks", [[], [3], [0, 1, 2]])
@pytest.mark.parametrize(("starts", "tokens", "unit"), [([1920], 256, 64), ([2211, 300], 1, 1)])
@pytest.mark.parametrize("size", [16, 24])
def test_it_is_choice_and_attention(
    starts: list[int],
    tokens: int,
    unit: int,
    marks: list[int],
    size: int,
    is_int8: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 8)
    gate = BlockGate(4, 2, size)
    gate.is_marked[marks] = True
    queries, rotary, summaries, (k, v) = _draw(starts, tokens, size, is_int8=is_int8)
    with torch.inference_mode():
        chosen = gate.choose(*queries, rotary, summaries, k, starts, unit)
        expected = block_sparse_attention(queries[1], k, v, chosen, starts)
        found = gated_attention(gate, queries, rotary, summaries, k, v, starts, unit)
    assert torch.equal(found, expected)


def test_a_short_context_has_nothing_to_choose_from() -> None:
    gate = BlockGate(4, 2, 16)
    gate.is_marked[0] = True
    queries, rotary, summaries, (k, v) = _draw([0], 64, 16, is_int8=True)
    with torch.inference_mode():
        chosen = gate.choose(*queries, rotary, summaries, k, [0], BLOCK)
        expected = block_sparse_attention(queries[1], k, v, chosen, [0])
        found = gated_attention(gate, queries, rotary, summaries, k, v, [0], BLOCK)
    assert torch.equal(found, expected)


def test_gates_without_weights_choose_and_attend_as_well() -> None:
    gate = BoundsGate(16)
    queries, rotary, _, (k, v) = _draw([2211], 1, 16, is_int8=False)
    summaries = gate.summarize(k.floats(), *rotary)
    chosen = gate.choose(*queries, rotary, summaries, k, [2211], 1)
    expected = block_sparse_attention(queries[1], k, v, chosen, [2211])
    assert torch.equal(gated_attention(gate, queries, rotary, summaries, k, v, [2211], 1), expected)


@needs_native
def test_what_does_not_fit_is_an_error() -> None:
    gate = BlockGate(4, 2, 16)
    queries, rotary, summaries, (k, v) = _draw([2211], 1, 16, is_int8=False)
    weights = (gate.query_weight, gate.query_norm, gate.is_marked)
    states = [k.data_BKSH, v.data_BKSH]
    with pytest.raises(ShapeError, match="choose_blocks"):
        native.gated_attention(
            weights, queries, rotary, summaries[..., :8], states, ([[5]], [[9]]), [2211], 1
        )
    for wrong in ([states[0], states[1][:, :1]], [x[:, :1] for x in states]):
        with pytest.raises(ShapeError, match="belong together"):
            native.gated_attention(
                weights, queries, rotary, summaries, wrong, ([[5]], [[9]]), [2211], 1
            )
