"""The native choice of blocks against torch's. Shape legend as in `r1ray.ops.native.sparse`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS, count_chosen
from r1ray.ops.block_selection import choose_blocks as torch_choose_blocks
from tests.native_kernels import ISAS, needs_native


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _owns(starts: list[int], tokens: int, unit: int) -> list[list[int]]:
    return [[(start + at * unit) // BLOCK for at in range(-(-tokens // unit))] for start in starts]


def _gate(heads: int, groups: int, size: int) -> BlockGate:
    gate = BlockGate(heads * groups, groups, size)
    with torch.no_grad():
        gate.query_weight += 0.2 * _random(*gate.query_weight.shape, seed=5)
        gate.query_norm += 0.2 * _random(size, seed=6)
    return gate


def _check_choice(
    isa: int, *, heads: int, groups: int, size: int, tokens: int, starts: list[int],
    unit: int = BLOCK, seed: int = 0,
) -> None:  # fmt: skip
    """Every chosen block scores as high as torch's, to rounding; the sink first, the best next."""
    batch = len(starts)
    gate = _gate(heads, groups, size)
    q = _random(batch, heads * groups, tokens, size, seed=seed).transpose(1, 2)
    angles = _random(batch, 1, tokens, size, seed=seed + 1)
    rotary = angles.cos(), angles.sin()
    owns = _owns(starts, tokens, unit)
    blocks = max(max(row) for row in owns) + 1
    keys = _random(batch, groups, blocks + 3, size, seed=seed + 2)[:, :, :blocks]
    with torch.no_grad():
        scores = gate.scores(gate.queries(q, *rotary), keys)
    scores = scores.unflatten(2, (-1, unit)).amax(3)
    expected = torch_choose_blocks(scores, torch.tensor(owns))
    found = native.choose_blocks(
        *(q, gate.query_weight, gate.query_norm, rotary, keys),
        *([[count_chosen(own) for own in row] for row in owns], starts, unit),
        isa=isa,
    )
    assert found.shape == expected.shape
    assert torch.equal(found < 0, expected < 0)
    for row, units in enumerate(owns):
        for unit_index, own in enumerate(units):
            for group in range(groups):
                count = count_chosen(own)
                ours = found[row, group, unit_index, :count]
                theirs = expected[row, group, unit_index, :count]
                assert len(set(ours.tolist())) == count
                if own < DENSE_BLOCKS:
                    assert ours.sort().values.tolist() == list(range(max(0, own - 1)))
                    continue
                assert ours[0] == theirs[0] == 0
                assert int(ours.max()) <= own - 2
                line = scores[row, group, unit_index]
                assert (line[ours[1:]] - line[theirs[1:]]).abs().max() <= 1e-5


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_blocks_chosen_for_prompts_are_torchs(isa: int, heads: int, size: int) -> None:
    starts = [30 * BLOCK, 0, 70 * BLOCK]
    _check_choice(isa, heads=heads, groups=2, size=size, tokens=4 * BLOCK, starts=starts)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    tokens=st.integers(1, 6),
    starts=st.lists(st.integers(0, 9000), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_blocks_chosen_for_single_tokens_are_torchs(
    isa: int, heads: int, groups: int, half: int, tokens: int, starts: list[int], seed: int
) -> None:
    _check_choice(
        isa,
        heads=heads,
        groups=groups,
        size=2 * half,
        tokens=tokens,
        starts=starts,
        unit=1,
        seed=seed,
    )


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("two_threads")
def test_two_threads_choose_what_torch_does(isa: int) -> None:
    _check_choice(isa, heads=3, groups=2, size=64, tokens=640, starts=[3000 // BLOCK * BLOCK])


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_of_equal_scores_the_earlier_block_is_chosen_and_nan_breaks_nothing(isa: int) -> None:
    own, size = 50, 16
    q, table = torch.ones(1, 1, 2, size), torch.ones(1, 1, 1, size)
    weight, norm = torch.ones(1, 2 * size, size), torch.ones(size)
    keys = torch.ones(1, 1, own, size)
    count = count_chosen(own)

    def choose() -> list[int]:
        found = native.choose_blocks(
            q, weight, norm, (table, 0 * table), keys, [[count]], [own * BLOCK], 1, isa=isa
        )
        return [int(block) for block in found[0, 0, 0]]

    assert choose() == list(range(count))
    q[0, 0, 0, 0] = torch.nan
    found = choose()
    assert len(set(found)) == count
    assert all(0 <= block <= own - 2 for block in found)


@needs_native
def test_gates_that_do_not_belong_together_are_refused() -> None:
    q, table = torch.zeros(1, 64, 4, 16), torch.zeros(1, 1, 64, 16)
    weight, norm, keys = torch.zeros(2, 32, 16), torch.zeros(16), torch.zeros(1, 2, 40, 16)
    rotary = (table, table)
    own = 36
    counts, starts = [[count_chosen(own)]], [own * BLOCK]
    right = (q, weight, norm, rotary, keys, counts, starts, BLOCK)
    native.choose_blocks(*right)
    for index, wrong in (
        (0, q.double()),
        (0, q[:, :, :3]),
        (1, weight[:, :16]),
        (1, weight.bfloat16()),
        (2, norm[:8]),
        (3, (table[:, :, 1:], table)),
        (4, keys[:, :1]),
        (4, keys.to("meta")),
        (5, [[4, 4]]),
        (6, [own * BLOCK, 0]),
        (7, 32),
    ):
        with pytest.raises(ShapeError, match="do not belong together"):
            native.choose_blocks(*right[:index], wrong, *right[index + 1 :])
    with pytest.raises(ShapeError, match="multiples"):
        native.choose_blocks(*right[:6], [own * BLOCK + 1], BLOCK)
    with pytest.raises(ShapeError, match="before the one before"):  # more than there are
        native.choose_blocks(*right[:5], [[own]], starts, BLOCK)
    with pytest.raises(ShapeError, match="before the one before"):  # not all have a summary
        native.choose_blocks(*right[:4], keys[:, :, :30], counts, starts, BLOCK)
