"""A decoder as an OpenVINO model, built operator by operator from its state dict.

1. All new tokens of all rows lie behind one another: ids [T], rotary tables [T, H], and behind the
   last layer the numbers of those tokens that something is to follow.
2. Attention is OpenVINO's PagedAttention, which reads and writes blocks of keys and values that the
   caller keeps (`r1ray.models.openvino`).
3. INT8 weights stay INT8: a constant, a conversion and a product with the row's scale, which
   OpenVINO's plugins take as compressed weights. Constants share the decoder's memory; a plugin
   packs its own copy when it compiles.

PagedAttention has no stable form yet: its 28 inputs are those of OpenVINO 2026.4, which pyproject
pins.

Shape legend: T new tokens, D hidden size, N query heads, K key/value heads, H head dimension,
V vocabulary, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension as PagedAttention
from torch import Tensor, nn

from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.ops.int8 import Int8Embedding

__all__ = ["ATTENTION_INPUTS", "build_graph"]

# What tells PagedAttention where the rows are, in its order, behind the two caches.
ATTENTION_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
_Node = Any  # OpenVINO's own types say no more


def build_graph(model: Decoder) -> ov.Model:
    """The graph of `model`, whose weights are float32 or INT8.

    Inputs: `ids` int64 [T]; `cos`, `sin` float32 [T, 1, H]; `last` int64 [L]; `past_lens`,
    `subsequence_begins`, `block_indices`, `block_indices_begins` int32, `max_context_len` an int32
    scalar; for each layer n `key_cache.n` and `value_cache.n`, whose type and shape the plugin
    says. Output: logits [L, V].

    Source: openvino/op/paged_attention.hpp, for the order of PagedAttention's inputs.
    """
    config = model.config
    ids, last = _input("ids", [-1], np.int64), _input("last", [-1], np.int64)
    rotary = [_input(name, [-1, 1, config.head_dim], np.float32) for name in ("cos", "sin")]
    rows = [_input(name, [-1], np.int32) for name in ATTENTION_INPUTS]
    longest = _input("max_context_len", [], np.int32)
    caches: list[_Node] = []
    x_TD = _embed(model.model.embed_tokens, ids)
    for number, block in enumerate(model.model.layers):
        found = [_cache(f"{kind}_cache.{number}") for kind in ("key", "value")]
        caches += found
        attention: Any = block.self_attn
        normed = _norm(x_TD, block.input_layernorm)
        q, k, v = (_linear(normed, getattr(attention, f"{name}_proj")) for name in "qkv")
        if config.qk_norm:
            q = _flat(_norm(_heads(q, config), attention.q_norm))
            k = _flat(_norm(_heads(k, config), attention.k_norm))
        q, k = (_flat(_rotate(_heads(item, config), rotary)) for item in (q, k))
        out = _attend([q, k, v, *found, *rows], longest, config)
        x_TD = ops.add(x_TD, _linear(out, attention.o_proj))
        x_TD = ops.add(x_TD, _mlp(_norm(x_TD, block.post_attention_layernorm), block.mlp))
    x_LD = ops.gather(x_TD, last, ops.constant(0, np.int64))
    logits = _linear(_norm(x_LD, model.model.norm), model.lm_head)
    inputs = [ids, last, *rotary, *rows, longest, *caches]
    return ov.Model([ops.result(logits, name="logits")], inputs, "r1ray")


def _input(name: str, shape: Sequence[int], dtype: Any) -> _Node:
    node = ops.parameter(ov.PartialShape(list(shape)), dtype, name=name)
    node.output(0).set_names({name})
    return node


def _cache(name: str) -> _Node:
    """Of a type and shape that the plugin chooses."""
    return _input(name, [-1, -1, -1, -1], ov.Type.dynamic)


def _constant(tensor: Tensor) -> _Node:
    return ops.constant(tensor.detach().contiguous().numpy(), shared_memory=True)


def _scaled(weight_OI: Tensor, scale_O: Tensor) -> _Node:
    """float32 [O, I] of INT8 weights."""
    wide = ops.convert(_constant(weight_OI), np.float32)
    return ops.multiply(wide, _constant(scale_O[:, None]))


def _embed(embedding: nn.Module, ids: _Node) -> _Node:
    axis = ops.constant(0, np.int64)
    if isinstance(embedding, Int8Embedding):
        rows = ops.gather(_constant(embedding.weight), ids, axis)
        scales = ops.gather(_constant(embedding.weight_scale[:, None]), ids, axis)
        return ops.multiply(ops.convert(rows, np.float32), scales)
    return ops.gather(_constant(embedding.get_parameter("weight")), ids, axis)


def _linear(x_TI: _Node, linear: Any) -> _Node:
    scale = getattr(linear, "weight_scale", None)
    weight = _constant(linear.weight) if scale is None else _scaled(linear.weight, scale)
    out = ops.matmul(x_TI, weight, False, True)
    return out if linear.bias is None else ops.add(out, _constant(linear.bias[None]))


def _norm(x: _Node, norm: Any) -> _Node:
    square = ops.power(x, ops.constant(2.0, np.float32))
    mean = ops.reduce_mean(square, ops.constant([-1], np.int64), keep_dims=True)
    root = ops.sqrt(ops.add(mean, ops.constant(norm.eps, np.float32)))
    normed = ops.multiply(x, ops.divide(ops.constant(1.0, np.float32), root))
    return ops.multiply(normed, _constant(norm.weight))


def _heads(x: _Node, config: ModelConfig) -> _Node:
    """[T, N·H] as [T, N, H]."""
    return ops.reshape(x, ops.constant([0, -1, config.head_dim], np.int64), True)


def _flat(x: _Node) -> _Node:
    return ops.reshape(x, ops.constant([0, -1], np.int64), True)


def _rotate(x_TNH: _Node, rotary: Sequence[_Node]) -> _Node:
    first, second = ops.split(x_TNH, ops.constant(2, np.int64), 2).outputs()
    turned = ops.concat([ops.multiply(second, ops.constant(-1.0, np.float32)), first], 2)
    cos, sin = rotary
    return ops.add(ops.multiply(x_TNH, cos), ops.multiply(turned, sin))


def _mlp(x_TD: _Node, mlp: Any) -> _Node:
    gate = ops.swish(_linear(x_TD, mlp.gate_proj))
    return _linear(ops.multiply(gate, _linear(x_TD, mlp.up_proj)), mlp.down_proj)


def _attend(inputs: Sequence[_Node], longest: _Node, config: ModelConfig) -> _Node:
    none_i, none_f = (ops.constant(np.zeros(0, kind)) for kind in (np.int32, np.float32))
    zero = ops.constant(0, np.int32)
    scale = ops.constant(config.head_dim**-0.5, np.float32)
    rest = [
        *(scale, zero, none_f, longest),  # and sliding_window, alibi_slopes
        *(none_i, none_i, none_i, none_f),  # score_aggregation_window, rotation of evicted blocks
        *(none_f, zero, zero),  # xattention
        ops.constant(np.zeros((0, 0, 0, 0), np.float32)),  # sinks
        *(zero, none_i, none_i, none_i),  # adaptive eviction
        *(none_i, ops.constant(np.zeros(0, np.uint8)), none_i),  # token types, bias among queries
    ]
    attention = PagedAttention([node.output(0) for node in (*inputs, *rest)])
    info = attention.get_rt_info()
    for kind in "kv":
        info[f"num_{kind}_heads"] = config.num_kv_heads
        info[f"{kind}_head_size"] = config.head_dim
    return attention.output(0)
