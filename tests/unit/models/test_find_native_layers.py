"""When the layers of a decoder run natively, and when torch runs them."""

import torch
from torch import nn

from r1ray.models import Decoder
from r1ray.models.gates import attach_gates, list_attentions, set_attention
from r1ray.models.kv_cache import KVCache
from r1ray.models.native_layers import NativeLayers, find_native_layers
from r1ray.models.quantization import quantize_modules
from r1ray.models.sparse import SparseForward
from r1ray.ops.int8 import Int8Linear
from tests.fakes import tiny_model
from tests.native_kernels import needs_native
from tests.unit.oracle import random_ids

pytestmark = needs_native


def _quantized(family: str = "llama", *, has_gates: bool = True) -> Decoder:
    model = tiny_model(family).eval()  # type: ignore[arg-type]
    if has_gates:
        attach_gates(model)
    quantize_modules(model)
    return model


@torch.inference_mode()
def _find(model: Decoder, dtype: torch.dtype = torch.float32) -> NativeLayers | None:
    cache = KVCache(
        model.config, max_rows=1, max_tokens=64, dtype=dtype, summary_size=model.summary_size
    )
    rows = cache.add_rows(1)
    sparse = SparseForward(model.config, rows, 4) if rows.keeps_blocks else None
    return find_native_layers(model, model.model.embed_tokens(random_ids(1, 4)), rows, sparse)


def test_a_table_is_made_once_and_again_when_a_part_is_replaced() -> None:
    model = _quantized("qwen3")
    layers = _find(model)
    assert layers is not None
    assert _find(model) is layers
    block = model.model.layers[1]
    again = layers
    for change in (
        lambda: setattr(block.mlp, "up_proj", Int8Linear.from_float(nn.Linear(32, 64, bias=False))),
        lambda: setattr(block.mlp.up_proj, "weight", block.mlp.up_proj.weight.clone()),
        lambda: setattr(block.input_layernorm.weight, "data", torch.ones(32)),
        lambda: setattr(block.mlp.up_proj, "bias", torch.zeros(64)),
        lambda: setattr(model, "lm_head", Int8Linear.from_float(nn.Linear(32, 128, bias=False))),
        lambda: setattr(model.model.norm.weight, "data", torch.ones(32)),
        lambda: attach_gates(model) or setattr(block.self_attn, "gate", None),
    ):
        change()
        found = _find(model)
        assert found is not None
        assert found is not again
        again = found


def test_what_torch_has_to_run_is_left_to_it() -> None:
    assert _find(_quantized()) is not None
    assert _find(_quantized(), torch.int8) is not None
    assert _find(_quantized(), torch.bfloat16) is None
    assert _find(tiny_model()) is None
    assert _find(_quantized().bfloat16()) is None

    model = _quantized()
    list_attentions(model)[1].observe = lambda *_: None
    assert _find(model) is None
    list_attentions(model)[1].observe = None
    assert _find(model) is not None

    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert _find(model) is None
    hook.remove()
    assert _find(model) is not None

    model.model.layers[0].forward = model.model.layers[0].forward  # type: ignore[method-assign]
    assert _find(model) is None  # streamed

    bounds = _quantized(has_gates=False)
    set_attention(bounds, "sparse")
    assert _find(bounds) is None

    mixed = _quantized()
    mixed.model.layers[0].mlp.up_proj = nn.Linear(32, 64, bias=False)
    assert _find(mixed) is None


def test_another_configuration_is_another_table() -> None:
    model, ids = _quantized(), random_ids(1, 8)

    def ask() -> torch.Tensor:
        cache = KVCache(model.config, max_rows=1, max_tokens=8, dtype=torch.float32)
        with torch.inference_mode():
            return model(ids, cache.add_rows(1))

    before = ask()
    model.config = model.config.with_context("yarn", 4.0)

    assert not torch.allclose(ask(), before, atol=1e-3)


def test_a_head_that_does_not_fit_is_left_to_torch() -> None:
    model = _quantized()
    found = _find(model)
    assert found is not None
    assert found.has_head
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    found = _find(model)
    assert found is not None
    assert not found.has_head
    cache = KVCache(model.config, max_rows=1, max_tokens=4, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(random_ids(1, 4), cache.add_rows(1))[0, -1:]
        found_logits = model.next_logits(random_ids(1, 4), cache.rows(0, 1), [3])
    torch.testing.assert_close(found_logits, expected)


def test_without_a_cache_or_with_a_gradient_torch_runs() -> None:
    model, cache_options = _quantized(), {"max_rows": 1, "max_tokens": 8, "dtype": torch.float32}
    rows = KVCache(model.config, **cache_options).add_rows(1)  # type: ignore[arg-type]
    x = torch.randn(1, 4, 32)
    assert find_native_layers(model, x, rows, None) is None  # a gradient may follow
    with torch.no_grad():
        assert find_native_layers(model, x, rows, None) is not None
        assert find_native_layers(model, x, None, None) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert find_native_layers(model, x, rows, None) is None
