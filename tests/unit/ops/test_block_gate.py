"""The gate of block-sparse attention, and what it learns from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.ops.block_gate import (
    BlockGate,
    count_missed,
    gate_loss,
    gate_targets,
    kept_blocks,
    mark_heads,
    pool_keys,
    unit_recall,
)
from r1ray.ops.block_selection import BLOCK, count_both, count_chosen
from r1ray.ops.cached_states import CachedStates

N, K, H = 4, 2, 16


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** (-torch.arange(H // 2) / (H // 2))
    angles = (positions[:, None] * frequencies).repeat(1, 2)[None, None]
    return angles.cos(), angles.sin()


def test_pooled_keys_are_of_whole_blocks() -> None:
    k = _normal(2, 200, K, H, seed=0)
    pooled = pool_keys(k)
    assert pooled.shape == (2, K, 3, 3 * H)
    block = k[1, BLOCK : 2 * BLOCK, 1]
    expected = torch.cat([block.amax(0), block.amin(0), block.mean(0)])
    torch.testing.assert_close(pooled[1, 1, 1], expected)


def test_targets_are_the_largest_attention_of_each_earlier_block() -> None:
    start, tokens = 3 * BLOCK, 10
    q, k = _normal(1, N, tokens, H, seed=1), _normal(1, K, 300, H, seed=2)
    found = gate_targets(q, k, start)
    assert found.shape == (1, N, tokens, 3)
    for head in range(N):
        for row in range(tokens):
            keys = k[0, head * K // N, : start + row + 1]
            shares = (keys @ q[0, head, row] / math.sqrt(H)).softmax(0)
            expected = shares[:start].unflatten(0, (3, BLOCK)).amax(1)
            torch.testing.assert_close(found[0, head, row], expected)


def test_the_loss_is_that_of_queries_and_of_their_unit() -> None:
    """Of the blocks that may be chosen, and of queries with a target."""
    scores, largest = _normal(1, 1, 3, 6, seed=0), _normal(1, 2, 3, 6, seed=1).abs()
    needs = largest.amax(1)[0, :2, 1:-1]  # of the group, without the last query
    shares, of_unit = needs / needs.sum(1, keepdim=True), needs.amax(0) / needs.amax(0).sum()
    guesses = scores[0, 0, :2, 1:-1]
    expected = F.kl_div(guesses.log_softmax(1), shares, reduction="sum")
    expected += 2 * F.kl_div(guesses.amax(0).log_softmax(0), of_unit, reduction="sum")
    is_target = torch.tensor([[True, True, False]])
    torch.testing.assert_close(gate_loss(scores, largest, is_target), expected)
    other = torch.cat([_normal(1, 1, 3, 6, seed=2), scores]), torch.cat([largest] * 2)
    none_first = torch.cat([torch.zeros(1, 3, dtype=torch.bool), is_target])
    torch.testing.assert_close(gate_loss(*other, none_first), expected)  # padding, in a batch


def test_the_loss_vanishes_where_scores_say_what_is_needed() -> None:
    largest = _normal(1, N, 1, 7, seed=0).softmax(-1)
    of_groups = largest.unflatten(1, (K, -1)).amax(2)
    loss = gate_loss(of_groups.log() + 3.0, largest, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-6)


def test_recall_is_of_what_units_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)
    scores, largest = torch.zeros(2, 1, 2, 20), torch.zeros(2, 1, 2, 20)
    scores[:, :, 0, 1:5] = 2.0  # which the unit keeps, with
    scores[:, :, 1, 5:8] = 1.0  # these
    largest[..., 0] = largest[..., 19] = 0.9  # always kept
    largest[0, 0, 0, 3] = largest[0, 0, 1, 6] = 0.3
    largest[0, 0, :, 15] = 0.2
    is_target = torch.tensor([[True, True], [False, False]])
    assert unit_recall(scores, largest, is_target).tolist() == [pytest.approx(0.6 / 0.8)]
    is_target[0, 0] = False  # then nothing of the first query counts
    scores[:, :, 1, 8:16] = 0.5
    assert unit_recall(scores, largest, is_target).tolist() == [pytest.approx(0.3 / 0.5)]


def test_scores_depend_on_distance_alone() -> None:
    gate = BlockGate(N, K, H)
    q, pooled = _normal(1, 1, N, H, seed=1), _normal(1, K, 4, 3 * H, seed=2)
    found = []
    for shift in (0, 1000):
        queries = gate.queries(q, *_rotary(torch.tensor([300.0 + shift])))
        keys = gate.keys(pooled, *_rotary(torch.arange(4.0) * BLOCK + shift))
        found.append(gate.scores(queries, keys))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


def test_a_gate_learns_where_attention_goes() -> None:
    """Attention by a part of the features that the mean key says nothing about."""
    generator = torch.Generator().manual_seed(0)
    blocks, tokens = 12, 12 * BLOCK
    k = 0.3 * torch.randn(1, tokens, K, H, generator=generator)
    for block in range(blocks):  # one key of each block stands out
        at = block * BLOCK + int(torch.randint(BLOCK, (), generator=generator))
        k[:, at] = 3.0 * torch.randn(K, H, generator=generator)
    q = 2.0 * torch.randn(1, BLOCK, N, H, generator=generator)
    largest = gate_targets(q.transpose(1, 2), k.transpose(1, 2), tokens - BLOCK)
    gate, is_target = BlockGate(N, K, H), torch.ones(1, BLOCK, dtype=torch.bool)
    flat = (torch.ones(1, 1, 1, H), torch.zeros(1, 1, 1, H))  # no positions
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        keys = gate.keys(pool_keys(k), *flat)[:, :, :-1]
        loss = gate_loss(gate.scores(gate.queries(q, *flat), keys), largest, is_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_peaks_in_blocks_that_are_not_chosen_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)
    start, blocks = 20 * BLOCK, 20
    scores = torch.zeros(1, 1, 2, blocks)
    scores[..., 1:8] = 1.0  # these seven are chosen, and the first
    largest = torch.zeros(1, 2, 2, blocks)  # two heads of one group
    largest[0, 0, 0, 3] = 0.5  # chosen
    largest[0, 0, 0, 15] = 0.1  # missed
    largest[0, 0, 0, 16] = 0.09  # no peak
    largest[0, 0, 0, 19] = 0.9  # the block before is always kept
    largest[0, 0, 0, 0] = 0.9  # so is the first
    largest[0, 0, 1, 12:14] = 0.3
    largest[0, 1, 1, 9] = 0.2
    assert count_missed(kept_blocks(scores, start), largest).tolist() == [[[1, 2], [0, 1]]]


def test_heads_that_miss_most_are_marked() -> None:
    gates = [BlockGate(2, 1, 16) for _ in range(3)]
    gates[1].missed.copy_(torch.tensor([0.0, 0.7]))
    gates[2].missed.copy_(torch.tensor([0.2, 0.1]))
    mark_heads(gates, 1 / 3)
    assert [gate.is_marked.tolist() for gate in gates] == [
        [False, False],
        [False, True],
        [True, False],
    ]
    mark_heads(gates, 1.0)
    assert not gates[0].is_marked.any()  # it misses nothing


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("starts", "tokens", "unit"), [([1920], 300, 64), ([1500, 2000], 1, 1)])
def test_groups_of_marked_heads_choose_by_keys(
    starts: list[int], tokens: int, unit: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)
    if kernels == "torch":
        monkeypatch.setattr("r1ray.ops.native.can_attend", lambda *_: False)
    tokens = tokens // unit * unit
    batch, generator = len(starts), torch.Generator().manual_seed(0)
    gate = BlockGate(4, 2, 16)
    q = torch.randn(batch, tokens, 4, 16, generator=generator)
    summaries = torch.randn(batch, 2, 35, 16, generator=generator)
    k = CachedStates(torch.randn(batch, 2, 35 * BLOCK, 16, generator=generator))
    tables = (torch.ones(1, 1, tokens, 16), torch.zeros(1, 1, tokens, 16))
    with torch.inference_mode():
        plain = gate.choose(q, q.transpose(1, 2), tables, summaries, k, starts, unit)
    marked = BlockGate(4, 2, 16)
    marked.is_marked[3] = True  # of group 1
    with torch.inference_mode():
        found = marked.choose(q, q.transpose(1, 2), tables, summaries, k, starts, unit)
    for row, start in enumerate(starts):
        for at in range(tokens // unit):
            own = (start + at * unit) // BLOCK
            of_keys = set(found[row, 1, at].tolist()) - {-1}
            of_gate = set(plain[row, 1, at].tolist()) - {-1}
            assert len(of_keys) == (count_both(own) if unit == 1 else count_chosen(own)) < own - 1
            assert of_keys > of_gate if unit == 1 else of_keys != of_gate
            assert set(found[row, 0, at].tolist()) - {-1} == set(plain[row, 0, at].tolist()) - {-1}
