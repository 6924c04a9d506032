"""How much of attention gates keep: against attention and choice worked out by hand."""

import pytest
import torch

from r1ray.evaluation.block_recall import measure_block_recall
from r1ray.models.gates import list_attentions, set_attention
from r1ray.ops.block_selection import BLOCK
from tests.fakes import tiny_model
from tests.unit.oracle import random_ids

TOKENS = 700


@pytest.fixture
def few_dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)


def test_all_of_attention_is_kept_where_it_is_dense() -> None:
    model = tiny_model(max_positions=1024).eval()
    set_attention(model, "sparse")
    found = measure_block_recall(model, random_ids(1, TOKENS), num_queries=5, needle_token=130)
    assert found.mass == pytest.approx([1.0] * model.config.num_layers, abs=1e-5)
    assert found.num_found == found.num_looks


@pytest.mark.usefixtures("few_dense_blocks")
def test_a_block_that_bounds_cannot_tell_from_others_is_missed_by_some() -> None:
    model = tiny_model(max_positions=1024).eval()
    set_attention(model, "sparse")
    for attention in list_attentions(model):
        with torch.no_grad():  # sharp attention, so that some heads look at one block
            attention.q_proj.weight.mul_(30.0)
    ids, found = random_ids(1, TOKENS), {}
    for block in range(TOKENS // BLOCK):
        found[block] = measure_block_recall(
            model, ids, num_queries=8, needle_token=block * BLOCK + 5
        )
    assert all(0.0 < mass < 1.0 for mass in found[0].mass)
    assert all(item.num_found <= item.num_looks for item in found.values())
    assert found[0].num_found == found[0].num_looks > 0  # the first is always kept
    middle = [found[block] for block in range(1, TOKENS // BLOCK - 2)]
    looks, kept = (
        sum(getattr(item, name) for item in middle) for name in ("num_looks", "num_found")
    )
    assert 0 < kept < looks


def test_nothing_stays_attached_to_the_model() -> None:
    model = tiny_model(max_positions=1024).eval()
    set_attention(model, "sparse")
    measure_block_recall(model, random_ids(1, 200), num_queries=1)
    assert all(attention.observe is None for attention in list_attentions(model))


@pytest.mark.usefixtures("few_dense_blocks")
def test_queries_that_are_read_choose_together() -> None:
    model = tiny_model(max_positions=1024).eval()
    set_attention(model, "sparse")
    for attention in list_attentions(model):
        with torch.no_grad():
            attention.q_proj.weight.mul_(30.0)
    ids = random_ids(1, 11 * BLOCK)

    alone, together = (
        measure_block_recall(model, ids, num_queries=BLOCK, unit=unit).mass for unit in (1, BLOCK)
    )

    assert all(shared < own for shared, own in zip(together, alone, strict=True))
