"""Packed rows against the same documents one by one: the decoder's logits and gradients."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models import Decoder
from r1ray.models.config import RopeConfig
from r1ray.models.kv_cache import CacheSlice
from tests.fakes import VOCAB_SIZE, tiny_model
from tests.unit.oracle import FAMILIES

# Both sides compute in float32 what is equal in exact arithmetic, over rows of different length:
# the matrix products sum in a different order, a few ulp (2^-23) of logits and of gradients
# around 10.
TOLERANCE = 1e-5
LENGTHS = (7, 1, 19, 7, 40, 3)

# Trained on 16 tokens: some documents above are shorter, some longer, and the row is longer still.
ROPES: dict[str, RopeConfig] = {
    "dynamic": RopeConfig(theta=100.0, type="dynamic", parameters={"factor": 2.0}),
    "longrope": RopeConfig(
        theta=100.0,
        type="longrope",
        parameters={
            "original_max_position_embeddings": 16,
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.3, 1.8],
            "long_factor": [1.0, 2.0, 3.5, 5.0],
        },
    ),
}
MODELS = (*FAMILIES, *ROPES)


def _build_model(name: str) -> Decoder:
    if name not in ROPES:
        return tiny_model(name)  # type: ignore[arg-type]
    base = tiny_model()
    model = Decoder(dataclasses.replace(base.config, rope=ROPES[name], max_positions=16))
    model.load_state_dict(base.state_dict())
    return model.eval()


def _random_documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (1, n), generator=generator) for n in lengths]


def _loss(logits_1TV: Tensor, document_1T: Tensor) -> Tensor:
    """Summed cross-entropy of every next token of one document."""
    return F.cross_entropy(logits_1TV[0, :-1], document_1T[0, 1:], reduction="sum")


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_those_of_each_document_alone(name: str) -> None:
    model, documents = _build_model(name), _random_documents()
    with torch.inference_mode():
        packed = model(torch.cat(documents, dim=1), document_lengths=LENGTHS)
        alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_packed_gradients_equal_the_sum_of_each_documents_own(name: str) -> None:
    model, documents = _build_model(name), _random_documents()
    model.requires_grad_(True)
    packed = model(torch.cat(documents, dim=1), document_lengths=LENGTHS).split(LENGTHS, dim=1)
    pairs = zip(packed, documents, strict=True)
    together = sum(_loss(logits, document) for logits, document in pairs)
    apart = sum(_loss(model(document), document) for document in documents)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(together, list(parameters.values()))
    expected = torch.autograd.grad(apart, list(parameters.values()))
    for parameter, one, other in zip(parameters, found, expected, strict=True):
        assert other.abs().max() > 1e-3, parameter
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_every_document_is_rotated_as_it_is_alone_bit_by_bit(name: str) -> None:
    """Rotary attention hardly notices a shift of all positions, so logits alone would hide one."""
    model, documents = _build_model(name), _random_documents()
    seen: list[tuple[Tensor, Tensor]] = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.inference_mode():
        model(torch.cat(documents, dim=1), document_lengths=LENGTHS)
        for document in documents:
            model(document)
    packed, *alone = seen
    for table, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(table, torch.cat(parts, dim=2))


@pytest.mark.parametrize("name", MODELS)
def test_changing_one_document_leaves_the_others_alone(name: str) -> None:
    model, documents = _build_model(name), _random_documents()
    changed = [*documents[:2], (documents[2] + 1) % VOCAB_SIZE, *documents[3:]]
    with torch.inference_mode():
        before = model(torch.cat(documents, dim=1), document_lengths=LENGTHS)
        after = model(torch.cat(changed, dim=1), document_lengths=LENGTHS)
    pairs = zip(before.split(LENGTHS, dim=1), after.split(LENGTHS, dim=1), strict=True)
    for index, (one, other) in enumerate(pairs):
        assert torch.equal(one, other) == (index != 2)


def test_the_padding_tail_changes_nothing() -> None:
    model, documents = tiny_model(), _random_documents()
    row, tail = torch.cat(documents, dim=1), torch.zeros(1, 23, dtype=torch.long)
    with torch.inference_mode():
        bare = model(row, document_lengths=LENGTHS)
        padded = model(torch.cat([row, tail], dim=1), document_lengths=[*LENGTHS, 23])
        other = model(torch.cat([row, tail + 5], dim=1), document_lengths=[*LENGTHS, 23])
    torch.testing.assert_close(padded[:, : row.shape[1]], bare, atol=TOLERANCE, rtol=0)
    assert torch.equal(padded[:, : row.shape[1]], other[:, : row.shape[1]])


def test_the_order_of_documents_does_not_matter() -> None:
    model, documents = tiny_model("qwen3"), _random_documents()
    with torch.inference_mode():
        there = model(torch.cat(documents, dim=1), document_lengths=LENGTHS)
        back = model(torch.cat(documents[::-1], dim=1), document_lengths=LENGTHS[::-1])
    parts = back.split(LENGTHS[::-1], dim=1)
    torch.testing.assert_close(torch.cat(parts[::-1], dim=1), there, atol=TOLERANCE, rtol=0)


def test_without_document_lengths_a_row_is_one_document() -> None:
    """The control: the documents do see each other when nothing tells them apart."""
    model, documents = tiny_model(), _random_documents()
    row = torch.cat(documents, dim=1)
    with torch.inference_mode():
        whole = model(row)
        assert torch.equal(model(row, document_lengths=[row.shape[1]]), whole)
        packed = model(row, document_lengths=LENGTHS)
    first = LENGTHS[0]
    torch.testing.assert_close(packed[:, :first], whole[:, :first], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(packed[:, first:], whole[:, first:], atol=1e-2)


def test_hidden_takes_document_lengths_as_forward_does() -> None:
    model, row = tiny_model(), torch.cat(_random_documents(), dim=1)
    with torch.inference_mode():
        logits = model.lm_head(model.hidden(row, document_lengths=LENGTHS))
        assert torch.equal(logits, model(row, document_lengths=LENGTHS))


def test_packed_bfloat16_autocast_equals_each_document_alone() -> None:
    """qwen3 under autocast: float32 queries and keys beside bfloat16 values."""
    model, documents = tiny_model("qwen3"), _random_documents()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        packed = model(torch.cat(documents, dim=1), document_lengths=LENGTHS)
        alone = torch.cat([model(document) for document in documents], dim=1)
    # bfloat16 keeps 8 bits: relative 2^-8 per operation over two layers.
    assert (packed - alone).float().norm() / alone.float().norm() < 0.03


@pytest.mark.parametrize(
    ("shape", "lengths", "named"),
    [
        ((1, 10), [4, 5], ["[4, 5]", "sum to 9", "10 tokens"]),
        ((1, 10), [4, 7], ["[4, 7]", "sum to 11", "10 tokens"]),
        ((1, 10), [4, 0, 6], ["[4, 0, 6]", "at least 1 token"]),
        ((1, 10), [12, -2], ["[12, -2]", "at least 1 token"]),
        ((1, 10), [], ["[]", "at least one document"]),
        ((2, 10), [10, 10], ["batch of 2"]),
    ],
)
def test_lengths_that_do_not_fit_the_row_are_named(
    shape: tuple[int, int], lengths: list[int], named: list[str]
) -> None:
    with pytest.raises(ShapeError) as caught:
        tiny_model()(torch.zeros(shape, dtype=torch.long), document_lengths=lengths)
    for part in named:
        assert part in str(caught.value)


def test_a_packed_row_with_a_cache_is_refused() -> None:
    model = tiny_model()
    cache: Any = object.__new__(CacheSlice)
    with pytest.raises(ShapeError, match="without a cache"):
        model(torch.zeros(1, 10, dtype=torch.long), cache, document_lengths=[4, 6])
