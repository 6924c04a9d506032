"""Which tensors of a decoder the native kernel takes, and whether they are as it wants them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate
from r1ray.ops.int8 import Int8Linear

if TYPE_CHECKING:
    from r1ray.models.decoder import Decoder

__all__ = [
    "GATE_PARTS",
    "NAMES",
    "QUERY_WEIGHT",
    "fits",
    "list_head",
    "list_tensors",
    "may_fit",
]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_LINEAR_PARTS = ("weight", "weight_scale", "bias")
GATE_PARTS = ("query_weight", "query_norm", "key_weight", "key_norm", "is_marked")
# The tensors of a layer, in the order of `LayerWeights` in decoder_layers.h.
NAMES = (
    *(f"{norm}.weight" for norm in _NORMS),
    *(f"{linear}.{part}" for linear in _LINEARS for part in _LINEAR_PARTS),
    *(f"{norm}.weight" for norm in _HEAD_NORMS),
    *(f"self_attn.gate.{part}" for part in GATE_PARTS),
)
QUERY_WEIGHT = NAMES.index("self_attn.gate.query_weight")


def list_tensors(block: nn.Module) -> list[Tensor | None]:
    """Those of `NAMES`; None for what the layer does not have."""
    found = []
    for name in NAMES:
        path, _, part = name.rpartition(".")
        tensor = getattr(_find(block, path), part, None)
        found.append(tensor.detach() if isinstance(tensor, Tensor) else None)
    return found


def may_fit(block: nn.Module) -> bool:
    """Whether `fits` is worth asking: float models are looked at in every forward."""
    return type(_find(block, _LINEARS[0])) is Int8Linear


def fits(model: "Decoder", block: nn.Module) -> bool:
    """Whether the kernel computes what `block` does: its modules, dtypes, shapes and layouts."""
    from r1ray.models.decoder import MLP, Attention, Block, RMSNorm  # it imports this module

    config = model.config
    kinds = {"self_attn": Attention, "mlp": MLP, **dict.fromkeys(_LINEARS, Int8Linear)}
    kinds |= dict.fromkeys((*_NORMS, *(_HEAD_NORMS if config.qk_norm else ())), RMSNorm)
    found = {path: _find(block, path) for path in kinds}
    if type(block) is not Block or any(type(found[path]) is not kinds[path] for path in kinds):
        return False
    norms = [module for module in found.values() if isinstance(module, RMSNorm)]
    gate = _find(block, "self_attn.gate")
    if any(norm.eps != config.rms_norm_eps for norm in norms):
        return False
    if gate is not None and type(gate) is not BlockGate:
        return False
    tensors = dict(zip(NAMES, list_tensors(block), strict=True))
    return all(
        _is_laid_out(tensors[name], *spec) for name, spec in _expect(model, gate is not None)
    )


def list_head(model: "Decoder") -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """(final norm, the head's weight, scale and bias); None where they do not fit the kernel."""
    from r1ray.models.decoder import RMSNorm  # it imports this module

    norm, head, config = model.model.norm, model.lm_head, model.config
    if type(norm) is not RMSNorm or type(head) is not Int8Linear or norm.eps != config.rms_norm_eps:
        return None
    if any("forward" in vars(module) for module in (norm, head)):
        return None
    size, vocabulary = config.hidden_size, config.vocab_size
    expected = (
        (norm.weight, (torch.float32, (size,), False)),
        (head.weight, (torch.int8, (vocabulary, size), False)),
        (head.weight_scale, (torch.float32, (vocabulary,), False)),
        (head.bias, (torch.float32, (vocabulary,), True)),
    )
    if not all(_is_laid_out(tensor, *spec) for tensor, spec in expected):
        return None
    return norm.weight.detach(), head.weight, head.weight_scale, head.bias


def _find(block: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` of `block`, if there is one."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _expect(
    model: "Decoder", has_gate: bool
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...], bool]]]:
    """(dtype, shape, whether it may be missing) of every tensor of a layer, by its name."""
    config = model.config
    size, wide, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    outputs = (queries, keys, keys, size, wide, wide, size)
    inputs = (size, size, size, queries, size, size, wide)
    for norm in _NORMS:
        yield f"{norm}.weight", (torch.float32, (size,), False)
    for linear, outer, inner in zip(_LINEARS, outputs, inputs, strict=True):
        yield f"{linear}.weight", (torch.int8, (outer, inner), inner > native.MAX_INPUTS)
        yield f"{linear}.weight_scale", (torch.float32, (outer,), False)
        yield f"{linear}.bias", (torch.float32, (outer,), True)
    for norm in _HEAD_NORMS:
        yield f"{norm}.weight", (torch.float32, (head,), not config.qk_norm)
    if has_gate:
        kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        shapes = ((kv_heads, group * head, head), (head,), (kv_heads, 3 * head, head), (head,))
        yield "self_attn.gate.is_marked", (torch.bool, (config.num_heads,), False)
        for part, shape in zip(GATE_PARTS[:-1], shapes, strict=True):
            yield f"self_attn.gate.{part}", (torch.float32, shape, False)


def _is_laid_out(
    tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], may_miss: bool
) -> bool:
    if tensor is None:
        return may_miss
    return (
        tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not (dtype == torch.int8 and shape[1] > native.MAX_INPUTS)
    )
