"""All layers of an INT8 decoder as one native call, where that can be.

1. A table of addresses is made once of a model's layers: weights, scales, biases, norms, gates.
2. Every forward asks whether the table still says what the model is, and whether the kernel can do
   what is asked (`find_native_layers`); else torch runs the layers, one operator after the other.
3. What depends on a forward alone is planned (`r1ray.models.native_plan`).

Price: 0.1 ms a forward for the checks and the plan (30 layers); torch takes more than that for the
operators of each layer. A few KiB for the table.

Shape legend: B rows, T new tokens, D hidden size, N query heads, K key/value heads, H head
dimension.
"""

import ctypes
import operator
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.models.kv_cache import CacheSlice
from r1ray.models.native_plan import list_completed, list_places, plan_pieces
from r1ray.models.sparse import SparseForward
from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate
from r1ray.ops.int8 import Int8Linear

if TYPE_CHECKING:
    from r1ray.models.decoder import Decoder

__all__ = ["NativeLayers", "find_native_layers"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_LINEAR_PARTS = ("weight", "weight_scale", "bias")
_GATE_PARTS = ("query_weight", "query_norm", "key_weight", "key_norm", "is_marked")
# The tensors of a layer, in the order of `LayerWeights` in decoder_layers.h.
_NAMES = (
    *(f"{norm}.weight" for norm in _NORMS),
    *(f"{linear}.{part}" for linear in _LINEARS for part in _LINEAR_PARTS),
    *(f"{norm}.weight" for norm in _HEAD_NORMS),
    *(f"self_attn.gate.{part}" for part in _GATE_PARTS),
)
_QUERY_WEIGHT = _NAMES.index("self_attn.gate.query_weight")
_IS_MARKED = _NAMES.index("self_attn.gate.is_marked")
_NONE = torch.empty(0)  # its address is null
_WIDTH = 16  # floats to which the kernel wants a gate's query weights padded

_found: "weakref.WeakKeyDictionary[Decoder, NativeLayers]" = weakref.WeakKeyDictionary()


def find_native_layers(
    model: "Decoder", x_BTD: Tensor, cache: CacheSlice | None, sparse: SparseForward | None
) -> "NativeLayers | None":
    """What runs the layers of `model` on these embeddings; None where torch has to.

    The one place where this is decided. Torch runs layers without a cache, with a gradient, under
    autocast, on a GPU or in another dtype than float32; and where a layer is not wholly of INT8
    linear layers, is streamed, observed or hooked, or has bounds in place of a gate.
    """
    if (
        cache is None
        or torch.is_grad_enabled()
        or not x_BTD.numel()
        or not x_BTD.is_contiguous()
        or x_BTD.shape[0] != len(cache.starts)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    if not native.can_attend(x_BTD, cache.buffers().keys):
        return None
    layers = _found.get(model)
    if layers is None or not layers.is_current():
        _found.pop(model, None)
        layers = NativeLayers.build(model)
        if layers is None:
            return None
        _found[model] = layers
    return layers if sparse is None or layers.has_gates else None


class NativeLayers:
    """The layers of one model, as they were when this was made.

    Attributes:
        has_gates: every layer has a trained or untrained `BlockGate`.
    """

    def __init__(self, model: "Decoder") -> None:
        """Of layers that `build` has found to fit."""
        self._config = model.config
        self._layers = [_list_tensors(block) for block in model.model.layers]
        self.has_gates = all(layer[_QUERY_WEIGHT] is not None for layer in self._layers)
        if not self.has_gates:  # those of some layers alone are not used
            self._layers = [
                [*layer[:_QUERY_WEIGHT], *[None] * len(_GATE_PARTS)] for layer in self._layers
            ]
        self._marks = [layer[_IS_MARKED] for layer in self._layers]
        self._table = (ctypes.c_void_p * (len(_NAMES) * len(self._layers)))()
        for index, tensor in enumerate(tensor for layer in self._layers for tensor in layer):
            self._table[index] = None if tensor is None else tensor.data_ptr()
        self._watch(model.model.layers)

    @classmethod
    def build(cls, model: "Decoder") -> "NativeLayers | None":
        """None where a layer does not fit the kernel."""
        blocks = model.model.layers
        if not len(blocks) or type(_find(blocks[0], _LINEARS[0])) is not Int8Linear:
            return None  # at once: float models come here in every forward
        if not all(_fits(model, block) for block in blocks):
            return None
        if any("forward" in vars(module) for module in blocks.modules()):
            return None  # streamed, for one
        layers = cls(model)
        return layers if layers.is_current() else None

    def _watch(self, blocks: nn.ModuleList) -> None:
        """Note what tells that a module or tensor was replaced, hooked or observed."""
        modules = list(blocks.modules())
        attentions: list[Any] = [block.self_attn for block in blocks]
        held = [
            (holder, name, holder[name])
            for module in modules
            for holder in (module._modules, module._parameters, module._buffers)
            for name in holder
        ]
        held += [(item._modules, "gate", item._modules.get("gate")) for item in attentions]
        self._held = tuple(zip(*held, strict=True))
        self._parameters = list(blocks.parameters())
        self._addresses = list(map(Tensor.data_ptr, self._parameters))
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._own = [vars(module) for module in modules]
        self._own_sizes = list(map(len, self._own))
        self._attentions = list(map(vars, attentions))

    def is_current(self) -> bool:
        """Whether the model still has the modules and tensors of the table, and nothing else.

        In C as far as it goes: there are some 30 to ask about in each layer.
        """
        holders, names, items = self._held
        return (
            all(map(operator.is_, map(dict.get, holders, names), items))
            and list(map(Tensor.data_ptr, self._parameters)) == self._addresses
            and not any(self._hooks)
            and list(map(len, self._own)) == self._own_sizes  # a forward of its own makes one more
            and not any(own.get("observe") for own in self._attentions)
        )

    def run(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: CacheSlice,
        sparse: SparseForward | None,
        *,
        isa: int | None = None,
    ) -> None:
        """Replace the embeddings `x_BTD` by the last layer's outputs; write the cache's new tokens.

        Raises:
            ShapeError: the new tokens do not fit into the cache.
        """
        config, (batch, tokens, _) = self._config, x_BTD.shape
        cache.check_room(tokens)
        buffers = cache.buffers()
        cos, sin = (table.contiguous() for table in rotary)
        is_dense = sparse is None or sparse.is_dense
        has_marks = not is_dense and bool(torch.cat(self._marks).any())  # type: ignore[arg-type]
        pieces, numbers = plan_pieces(cache, tokens, is_dense=is_dense, has_marks=has_marks)
        completed = [] if sparse is None else list_completed(sparse)
        padded = self._pad_gates() if not is_dense else []
        key_scale, value_scale = map(Tensor.data_ptr, buffers.scales or (_NONE, _NONE))
        arguments = native.LayersArguments(
            layers=ctypes.addressof(self._table),
            x=x_BTD.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            rotary_row=tokens * config.head_dim if len(cos) > 1 else 0,
            key_scale=key_scale,
            value_scale=value_scale,
            **list_places(buffers),
            numbers=ctypes.addressof(numbers),
            pieces=ctypes.addressof(pieces),
            num_pieces=len(pieces),
            num_completed=len(completed),
            num_layers=config.num_layers,
            B=batch,
            T=tokens,
            D=config.hidden_size,
            F=config.intermediate_size,
            N=config.num_heads,
            K=config.num_kv_heads,
            H=config.head_dim,
            chooses=not is_dense,
            eps=config.rms_norm_eps,
        )
        done = (native.CompletedBlocks * len(completed))(*completed)
        arguments.completed = ctypes.addressof(done)
        native.run_decoder_layers(arguments, isa=isa)
        del padded  # until here the kernel reads them

    def _pad_gates(self) -> list[Tensor]:
        """Let the table have copies of query weights that are as wide as the kernel wants them."""
        if not self._config.head_dim % _WIDTH:
            return []
        copies = []
        for index, layer in enumerate(self._layers):
            weight = layer[_QUERY_WEIGHT]
            assert weight is not None
            copies.append(F.pad(weight, (0, -weight.shape[2] % _WIDTH)))
            self._table[index * len(_NAMES) + _QUERY_WEIGHT] = copies[-1].data_ptr()
        return copies


def _find(block: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` of `block`, if there is one."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _list_tensors(block: nn.Module) -> list[Tensor | None]:
    """Those of `_NAMES`; None for what the layer does not have."""
    found = []
    for name in _NAMES:
        path, _, part = name.rpartition(".")
        tensor = getattr(_find(block, path), part, None)
        found.append(tensor.detach() if isinstance(tensor, Tensor) else None)
    return found


def _fits(model: "Decoder", block: nn.Module) -> bool:
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
    tensors = dict(zip(_NAMES, _list_tensors(block), strict=True))
    return all(
        _is_laid_out(tensors[name], *spec) for name, spec in _expect(model, gate is not None)
    )


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
        for part, shape in zip(_GATE_PARTS[:-1], shapes, strict=True):
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
