"""The gate of block-sparse attention, and what it learns from."""

import math

import pytest
import torch
from torch import Tensor

from r1ray.ops.block_gate import (
    BlockGate,
    count_missed,
    gate_divergence,
    gate_targets,
    kept_blocks,
    mark_heads,
    pool_keys,
)
from r1ray.ops.block_selection import BLOCK, count_chosen
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


def test_targets_are_shares_of_the_largest_attention_of_each_earlier_block() -> None:
    q, k = _normal(1, N, 10, H, seed=1), _normal(1, K, 210, H, seed=2)
    start = 195
    found, _ = gate_targets(q, k, start)
    assert found.shape == (1, K, 10, 3)
    for head in range(K):
        for row in range(10):
            position = start + row
            best = torch.zeros(3)
            for query_head in range(head * N // K, (head + 1) * N // K):
                scores = k[0, head, : position + 1] @ q[0, query_head, row] / math.sqrt(H)
                shares = scores.softmax(0)
                for block in range(3):
                    part = shares[block * BLOCK : (block + 1) * BLOCK]
                    best[block] = torch.maximum(best[block], part.max())
            torch.testing.assert_close(found[0, head, row], best / best.sum())


def test_a_querys_own_block_and_rows_without_earlier_ones_are_left_out() -> None:
    q, k = _normal(1, N, 128, H, seed=1), _normal(1, K, 128, H, seed=2)
    targets, _ = gate_targets(q, k, 0)
    assert (targets[:, :, :BLOCK] == 0).all()
    assert (targets[:, :, BLOCK:, 0] == 1).all()
    assert (targets[:, :, BLOCK:, 1] == 0).all()
    loss = gate_divergence(_normal(1, K, 128, 2, seed=3), targets, 0)
    assert (loss == 0).all()  # one earlier block leaves nothing to guess


def test_chunks_of_queries_have_the_targets_of_the_whole() -> None:
    q, k = _normal(1, N, 300, H, seed=1), _normal(1, K, 300, H, seed=2)
    whole, _ = gate_targets(q, k, 0)
    parts = [gate_targets(q[:, :, at : at + 100], k, at)[0] for at in (0, 100, 200)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def test_the_divergence_is_that_of_shares_and_vanishes_at_the_target() -> None:
    targets = torch.softmax(_normal(1, K, 1, 5, seed=0), -1)
    scores = _normal(1, K, 1, 5, seed=1)
    found = gate_divergence(scores, targets, 5 * BLOCK)
    expected = torch.nn.functional.kl_div(scores.log_softmax(-1), targets, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected)
    exact = gate_divergence(targets.log() + 3.0, targets, 5 * BLOCK)
    torch.testing.assert_close(exact, torch.zeros_like(exact), rtol=0, atol=1e-6)


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
    q = 2.0 * torch.randn(1, 256, N, H, generator=generator)
    start = tokens - 256
    targets, _ = gate_targets(q.transpose(1, 2), k.transpose(1, 2), start)
    gate = BlockGate(N, K, H)
    flat = (torch.ones(1, 1, 1, H), torch.zeros(1, 1, 1, H))  # no positions
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        scores = gate.scores(gate.queries(q, *flat), gate.keys(pool_keys(k), *flat))
        loss = gate_divergence(scores, targets, start).mean()
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
def test_groups_of_marked_heads_choose_by_keys_instead(
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
            assert len(of_keys) == count_chosen(own) < own - 1
            assert of_keys != set(plain[row, 1, at].tolist()) - {-1}
            assert set(found[row, 0, at].tolist()) - {-1} == set(plain[row, 0, at].tolist()) - {-1}
