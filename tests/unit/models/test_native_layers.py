"""The native run of all layers against torch's, operator by operator.

INT8 activations make exact agreement impossible: where a value lies half way between two integers,
the last bit of a sum decides, and the layer's output moves by a step of a weight. Layers whose
inputs round alike agree to float32's rounding; whole models to a few such steps.
"""

import ctypes
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models import Decoder
from r1ray.models.batch_generation import generate_batch
from r1ray.models.config import RopeConfig
from r1ray.models.gates import attach_gates, list_attentions
from r1ray.models.kv_cache import CacheSlice, KVCache
from r1ray.models.native_layers import find_native_layers
from r1ray.models.quantization import quantize_modules
from r1ray.models.rope import rotary_tables
from r1ray.models.sparse import SparseForward
from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate
from r1ray.ops.int8 import Int8Linear
from r1ray.ops.native import library
from tests.fakes import tiny_config
from tests.native_kernels import ISAS, needs_native
from tests.unit.oracle import FAMILIES, random_ids

pytestmark = needs_native
DTYPES = [torch.float32, torch.int8]


@pytest.fixture
def few_dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse from 256 tokens on: long contexts take long to test."""
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)
    monkeypatch.setattr("r1ray.models.sparse.DENSE_BLOCKS", 4)


def _quantized(
    family: str = "llama", *, has_gates: bool = True, layers: int = 2, is_large: bool = False
) -> Decoder:
    """With gates, norms and biases unlike those of a fresh model."""
    config = dataclasses.replace(
        tiny_config(family, max_positions=2048),  # type: ignore[arg-type]
        num_layers=layers,
    )
    if is_large:  # a head of whole registers, and columns that are none
        config = dataclasses.replace(
            config, hidden_size=120, intermediate_size=200, head_dim=32, num_heads=6
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Decoder(config).eval()
        if has_gates:
            attach_gates(model)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or ".gate." in name:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
    quantize_modules(model)
    return model


def _cache(model: Decoder, starts: list[int], room: int, dtype: torch.dtype) -> KVCache:
    """Rows that hold `starts` tokens of noise, and a row before and behind them."""
    size = model.summary_size
    shape = {"max_rows": len(starts) + 2, "max_tokens": room}
    cache = KVCache(model.config, dtype=dtype, summary_size=size, **shape)
    cache.add_rows(len(starts) + 2)
    cache.lengths[:] = [0, *starts, 0]
    generator, pool = torch.Generator().manual_seed(5), cache._pool
    per_row = len(cache._tables[0])
    pages = torch.randperm(per_row * len(cache._tables), generator=generator).tolist()
    cache._tables = [pages[at : at + per_row] for at in range(0, len(pages), per_row)]
    for states in (pool._keys, pool._values):
        if dtype == torch.int8:
            states.random_(-127, 128, generator=generator)
        else:
            states.normal_(generator=generator)
    for scales in (pool._key_scales, pool._value_scales):
        scales.uniform_(0.005, 0.02, generator=generator)
    pool._block_keys.normal_(generator=generator)
    return cache


def _states(cache: KVCache) -> list[Tensor]:
    """All that a cache holds, as floats."""
    pool = cache._pool
    if not pool.is_int8:
        return [pool._keys, pool._values, pool._block_keys]
    return [
        pool._keys * pool._key_scales[..., None],
        pool._values * pool._value_scales[..., None],
        pool._block_keys,
    ]


@torch.inference_mode()
def _run_both(
    model: Decoder, starts: list[int], tokens: int, dtype: torch.dtype, isa: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(native, torch): hidden states and the cache, behind all layers."""
    found = []
    for is_native in (True, False):
        cache = _cache(model, starts, max(starts) + tokens + 70, dtype)
        rows = cache.rows(1, len(starts))
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(len(starts), tokens, model.config.hidden_size, generator=generator)
        x = _run(model, x, rows, is_native=is_native, isa=isa)
        found.append([x, *_states(cache)])
    return found[0], found[1]


def _run(
    model: Decoder, x: Tensor, rows: CacheSlice, *, is_native: bool, isa: int | None = None
) -> Tensor:
    tokens = x.shape[1]
    sparse = SparseForward(model.config, rows, tokens) if rows.keeps_blocks else None
    if is_native:
        layers = find_native_layers(model, x, rows, sparse)
        assert layers is not None
        layers.run(x, rows, sparse, isa=isa)
        return x
    positions = rows.starts_R[:, None] + torch.arange(tokens)
    rotary = rotary_tables(model.config, positions)
    for block in model.model.layers:
        x = block(x, rotary, positions, rows, None, sparse)
    return x


def _error(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(median, greatest) difference, as parts of the greatest value."""
    differences = (found - expected).abs() / expected.abs().max()
    return float(differences.median()), float(differences.max())


SHAPES = [
    pytest.param([0], 1, id="first token"),
    pytest.param([0], 200, id="prompt"),
    pytest.param([0, 0, 0], 70, id="padded prompts"),
    pytest.param([300], 1, id="one token"),
    pytest.param([127, 400, 3], 1, id="three rows"),
    pytest.param([320], 150, id="chunk"),
    pytest.param([333], 150, id="chunk within a block"),
    pytest.param([333, 64], 100, id="two chunks"),
]


# Float32 in another order of sums than torch's: 2.2e-7 in all of these shapes.
FLOAT_TOLERANCE = 1e-6
# Where a rounding flips, a step of one integer times a row of weights: up to 1.4e-3 of the greatest
# state behind one layer. Behind two, and with every choice of blocks on it, 2e-3.
FLIP_TOLERANCE = 4e-3


def _check(found: list[Tensor], expected: list[Tensor], *, flips: float = FLIP_TOLERANCE) -> None:
    """Most values must agree to float32's rounding, all of them to `flips`."""
    for a, b in zip(found, expected, strict=True):
        differences = (a - b).abs() / b.abs().max().clamp_min(1e-9)
        assert (differences <= FLOAT_TOLERANCE).float().mean() >= 0.9
        assert differences.max() <= flips


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("starts", "tokens"), SHAPES)
def test_one_layer_equals_torchs(
    family: str, dtype: torch.dtype, starts: list[int], tokens: int
) -> None:
    found, expected = _run_both(_quantized(family, layers=1), starts, tokens, dtype)
    _check(found[:1], expected[:1])
    _check(found[1:], expected[1:], flips=FLOAT_TOLERANCE)  # nothing was rounded twice before these


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("starts", "tokens"), [([1400], 150), ([1408, 1600], 128), ([1800, 1100, 30], 1)]
)
def test_marked_heads_choose_by_keys_as_in_torch(
    dtype: torch.dtype, starts: list[int], tokens: int
) -> None:
    """Marks may change between forwards of one model."""
    model = _quantized(layers=1)
    gate = list_attentions(model)[0].gate
    assert isinstance(gate, BlockGate)
    outputs = []
    for head in (None, 0, gate.is_marked.numel() - 1):
        gate.is_marked.zero_()
        if head is not None:
            gate.is_marked[head] = True
        found, expected = _run_both(model, starts, tokens, dtype)
        _check(found[:1], expected[:1])
        outputs.append(found[0])
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 2 * FLIP_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("starts", "tokens"), SHAPES)
def test_dense_layers_without_gates_equal_torchs(
    dtype: torch.dtype, starts: list[int], tokens: int
) -> None:
    # INT8 blocks of queries are multiplied in bfloat16, but not by torch where a chunk cuts blocks.
    is_cut = tokens > 1 and any(start % 64 for start in starts)
    model = _quantized("qwen2", has_gates=False)
    found, expected = _run_both(model, starts, tokens, dtype)
    if is_cut and dtype == torch.int8:
        assert max(_error(a, b)[1] for a, b in zip(found, expected[:3], strict=False)) < 2e-2
    else:
        _check(found[:3], expected[:3])


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_equals_torch(isa: int) -> None:
    model = _quantized("qwen3", layers=1, is_large=True)
    for starts, tokens in (([333], 150), ([127, 400, 3], 1), ([0, 0], 70)):
        _check(*_run_both(model, starts, tokens, torch.float32, isa))
        found, expected = _run_both(model, starts, tokens, torch.int8, isa)
        if isa == native.best_isa() or tokens == 1:
            _check(found, expected)
        else:  # torch's path multiplies blocks of queries in bfloat16, as the best set does
            assert max(_error(a, b)[1] for a, b in zip(found, expected, strict=True)) < 2e-2


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    model = _quantized("qwen3", is_large=True)
    before, found = torch.get_num_threads(), []
    for num_threads in (1, 2, 3):  # more than there may be cores
        torch.set_num_threads(num_threads)
        try:
            found.append(
                [_run_both(model, *shape, dtype)[0] for shape in (([333], 150), ([0], 200))]
            )
        finally:
            torch.set_num_threads(before)
    for one, other in zip(found[0], found[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for one, other in zip(found[0], found[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("few_dense_blocks")
def test_fewer_threads_than_were_asked_for_are_enough() -> None:
    kernels, real = library.library(), library._find_fork()
    assert real is not None
    calls: list[int] = []
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def fork(body: int, data: int, num_threads: int, flags: int) -> None:
        calls.append(num_threads)
        body_type(body)(data)

    model, before = _quantized("qwen3", is_large=True), torch.get_num_threads()
    expected, _ = _run_both(model, [333], 150, torch.int8)
    torch.set_num_threads(4)
    kernels.r1ray_set_parallel(ctypes.cast(fork, ctypes.c_void_p))
    try:
        cache = _cache(model, [333], 333 + 150 + 70, torch.int8)
        x = torch.randn(1, 150, 120, generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            _run(model, x, cache.rows(1, 1), is_native=True)
    finally:
        kernels.r1ray_set_parallel(real)
        torch.set_num_threads(before)
    assert torch.equal(x, expected[0])
    assert calls == [4]  # once for all layers


@torch.inference_mode()
def _logits(model: Decoder, ids: Tensor, chunks: list[int], dtype: torch.dtype) -> Tensor:
    size = model.summary_size
    cache = KVCache(
        model.config, max_rows=1, max_tokens=ids.shape[1], dtype=dtype, summary_size=size
    )
    cache.add_rows(1)
    found = []
    for part in ids.split(chunks, dim=1):
        rows = cache.active()
        found.append(model(part, rows))
        rows.advance([part.shape[1]])
    return torch.cat(found, dim=1)


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_chunks_and_written_tokens_have_torchs_logits(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = _quantized(family), random_ids(1, 700)
    chunks = [256, 256, 128, *[1] * 60]
    found = _logits(model, ids, chunks, dtype)
    monkeypatch.setattr("r1ray.models.decoder.find_native_layers", lambda *_: None)
    expected = _logits(model, ids, chunks, dtype)
    # A flip is in the cache from then on: it meets every later token.
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (found - expected).abs().median() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_of_chosen_tokens_equal_torchs_norm_and_head(isa: int, has_bias: bool) -> None:
    model = _quantized()
    assert isinstance(model.lm_head, Int8Linear)
    if has_bias:
        model.lm_head.bias = torch.linspace(-1, 1, model.config.vocab_size)
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    cache = KVCache(model.config, max_rows=2, max_tokens=8, dtype=torch.float32)
    with torch.inference_mode():
        x = model.model.embed_tokens(random_ids(2, 5))
        layers = find_native_layers(model, x, rows := cache.add_rows(2), None)
        assert layers is not None
        found = layers.run(x, rows, None, last=[9, 0, 3], isa=isa)
        expected = model.lm_head(model.model.norm(x.flatten(0, 1)[[9, 0, 3]]))
    assert found.shape == expected.shape
    _check([found], [expected])


@pytest.mark.parametrize("is_native", [True, False])
def test_next_logits_are_those_of_a_whole_forward(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = _quantized(), random_ids(2, 5)
    if not is_native:
        monkeypatch.setattr("r1ray.models.decoder.find_native_layers", lambda *_: None)
    cache = KVCache(model.config, max_rows=2, max_tokens=8, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(ids, cache.add_rows(2)).flatten(0, 1)[[4, 9]]
        found = model.next_logits(ids, cache.rows(0, 2), [4, 9])
    _check([found], [expected])


@pytest.mark.usefixtures("few_dense_blocks")
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("has_gates", [True, False])
def test_answers_do_not_depend_on_company(kv_dtype: torch.dtype, has_gates: bool) -> None:
    model = _quantized(has_gates=has_gates)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (400, 30, 450, 100)]

    def answer(chosen: list[list[int]]) -> list[list[int]]:
        return generate_batch(
            model,
            chosen,
            max_new_tokens=70,
            stop_token_ids=frozenset(),
            max_concurrency=4,
            kv_dtype=kv_dtype,
        )

    assert answer(prompts) == [answer([prompt])[0] for prompt in prompts]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    model = _quantized()
    cache = KVCache(model.config, max_rows=2, max_tokens=8, dtype=torch.float32)
    ids = random_ids(2, 4)
    with torch.inference_mode():
        expected = model.hidden(ids, cache.add_rows(2))
        hook = model.model.embed_tokens.register_forward_hook(
            lambda _module, _inputs, out: out.index_fill(0, torch.tensor([0]), torch.nan)
        )
        found = model.hidden(ids, cache.rows(0, 2))
        hook.remove()
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


def test_tokens_beyond_the_room_are_refused() -> None:
    model = _quantized()
    cache = KVCache(model.config, max_rows=1, max_tokens=5, dtype=torch.int8)
    with (
        torch.inference_mode(),
        pytest.raises(ShapeError, match="6 tokens do not fit into a cache of 5"),
    ):
        model.hidden(random_ids(1, 6), cache.add_rows(1))


def test_positions_that_turn_with_the_length_are_each_rows_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _quantized(has_gates=False)
    rope = RopeConfig(theta=1e4, type="dynamic", parameters={"factor": 2.0})
    model.config = dataclasses.replace(model.config, rope=rope, max_positions=16)
    found = _run_both(model, [20, 3], 1, torch.float32)
    _check(found[0][:3], found[1][:3])
