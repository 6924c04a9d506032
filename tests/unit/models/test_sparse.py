"""Block-sparse attention in the decoder: independent of chunks, of company, and of how it began."""

import dataclasses

import pytest
import torch
from torch import Tensor

from r1ray.errors import ConfigError, ShapeError
from r1ray.models import Decoder
from r1ray.models.batch_generation import generate_batch
from r1ray.models.config import RopeConfig
from r1ray.models.gates import attach_gates, detach_gates, list_attentions, set_attention
from r1ray.models.generation import BatchGenerator
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import quantize_modules
from r1ray.models.rope import rotary_tables
from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate, BoundsGate, pool_keys
from r1ray.ops.block_selection import BLOCK
from tests.fakes import tiny_model
from tests.unit.oracle import FAMILIES, random_ids

TOKENS = 900


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr("r1ray.ops.native.can_attend", lambda *_: False)
    elif not native.is_available():
        pytest.skip(native.describe())


@pytest.fixture
def few_dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse from 256 tokens on: long contexts take long to test."""
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)
    monkeypatch.setattr("r1ray.models.sparse.DENSE_BLOCKS", 4)


def _gated(family: str = "llama", *, is_int8: bool = False) -> Decoder:
    model = tiny_model(family, max_positions=2048)  # type: ignore[arg-type]
    attach_gates(model)
    generator = torch.Generator().manual_seed(1)
    for attention in list_attentions(model):
        assert attention.gate is not None
        for parameter in attention.gate.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.3 * noise)
    if is_int8:
        quantize_modules(model)
    return model.eval()


@torch.inference_mode()
def _logits(
    model: Decoder,
    ids: Tensor,
    chunks: list[int],
    *,
    is_dense: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    cache = KVCache(
        model.config,
        max_rows=1,
        max_tokens=ids.shape[1] + 3,
        dtype=dtype,
        summary_size=0 if is_dense else model.summary_size,
    )
    cache.add_rows(1)
    found = []
    for part in ids.split(chunks, dim=1):
        rows = cache.active()
        found.append(model(part, rows))
        rows.advance([part.shape[1]])
    return torch.cat(found, dim=1)


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_gates", [True, False])
def test_chunks_change_nothing(family: str, is_int8: bool, has_gates: bool) -> None:
    model, ids = _gated(family, is_int8=is_int8), random_ids(1, TOKENS)
    if not has_gates:
        detach_gates(model)
        set_attention(model, "sparse")
    dtype = torch.int8 if is_int8 else torch.float32
    whole = _logits(model, ids, [TOKENS], dtype=dtype)
    for size in (64, 256):
        sizes = [size] * (TOKENS // size) + [TOKENS % size]
        found = _logits(model, ids, sizes, dtype=dtype)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)
    dense = _logits(model, ids, [TOKENS], is_dense=True, dtype=dtype)
    torch.testing.assert_close(whole[:, :256], dense[:, :256], rtol=0, atol=1e-4)
    assert (whole - dense).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_dense_attention_in_chunks_equals_that_of_the_whole(dtype: torch.dtype) -> None:
    model, ids = _gated(), random_ids(1, TOKENS)
    whole = _logits(model, ids, [TOKENS], is_dense=True, dtype=dtype)
    # In int8, blocks of queries may be multiplied in bfloat16, and pieces of blocks are not.
    chunks = [128, 512, TOKENS - 640] if dtype == torch.int8 else [100, 500, 1, 1, TOKENS - 602]
    found = _logits(model, ids, chunks, is_dense=True, dtype=dtype)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_int8_keys_and_values_change_little() -> None:
    model, ids = _gated(), random_ids(1, TOKENS)
    exact = _logits(model, ids, [TOKENS])
    found = _logits(model, ids, [TOKENS], dtype=torch.int8)
    error = (found - exact).abs().max() / exact.abs().max()
    assert 0.0 < error < 0.02


@pytest.mark.usefixtures("few_dense_blocks")
def test_what_does_not_fill_a_block_is_read_as_if_it_were_written() -> None:
    model, ids = _gated(), random_ids(1, 700)
    read = _logits(model, ids, [640, 60])
    written = _logits(model, ids, [640] + [1] * 60)
    torch.testing.assert_close(read, written, rtol=0, atol=1e-4)
    halves = _logits(model, ids, [640, 17, 43])
    torch.testing.assert_close(halves, read, rtol=0, atol=1e-4)


def test_with_every_block_chosen_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.models.sparse.DENSE_BLOCKS", 0)  # choose all, the sparse way
    model, ids = _gated(), random_ids(1, TOKENS)
    dense = _logits(model, ids, [TOKENS], is_dense=True)
    chunks = [512, TOKENS - 512 - 3, 1, 1, 1]
    torch.testing.assert_close(_logits(model, ids, chunks), dense, rtol=0, atol=1e-4)


def test_summaries_are_those_that_gates_are_trained_on() -> None:
    model, ids = _gated(), random_ids(1, 200)
    cache = KVCache(
        model.config,
        max_rows=1,
        max_tokens=256,
        dtype=torch.float32,
        summary_size=model.summary_size,
    )
    rows = cache.add_rows(1)
    seen: dict[int, Tensor] = {}
    for attention in list_attentions(model):
        attention.observe = lambda owner, _q, k, *_: seen.setdefault(owner.layer, pool_keys(k))
    with torch.inference_mode():
        model(ids, rows)
    for attention in list_attentions(model):
        pooled, gate = seen[attention.layer], attention.gate
        assert isinstance(gate, BlockGate)
        positions = torch.arange(3)[None] * BLOCK
        with torch.inference_mode():
            expected = gate.keys(pooled, *rotary_tables(model.config, positions))
        found = cache.active().read_blocks(attention.layer, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("few_dense_blocks")
def test_answers_do_not_depend_on_company() -> None:
    model = _gated()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (700, 30, 450, 100)]
    options = {"max_new_tokens": 70, "stop_token_ids": frozenset[int]()}
    together = generate_batch(model, prompts, max_concurrency=4, **options)  # type: ignore[arg-type]
    alone = [
        generate_batch(model, [prompt], max_concurrency=1, **options)[0]  # type: ignore[arg-type]
        for prompt in prompts
    ]
    assert together == alone


def test_chunks_that_cut_a_block_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"prefill_chunk \(100\) is not a multiple of 64"):
        BatchGenerator(_gated(), max_concurrency=1, max_context_tokens=500, prefill_chunk=100)


def test_a_switch_decides_whether_it_is_sparse() -> None:
    model = _gated()
    set_attention(model, "auto")
    assert model.is_sparse
    set_attention(model, "sparse")
    assert isinstance(list_attentions(model)[0].gate, BlockGate)
    set_attention(model, "dense")
    assert not model.is_sparse
    set_attention(model, "auto")
    assert not model.is_sparse
    set_attention(model, "sparse")
    assert model.is_sparse
    assert isinstance(list_attentions(model)[0].gate, BoundsGate)


def test_rotary_positions_that_turn_with_the_length_are_refused() -> None:
    model = tiny_model("llama")
    rope = RopeConfig(theta=1e4, type="dynamic", parameters={"factor": 2.0})
    model.config = dataclasses.replace(model.config, rope=rope)
    with pytest.raises(ConfigError, match=r"serve.attention: sparse .* 'dynamic'"):
        set_attention(model, "sparse")
