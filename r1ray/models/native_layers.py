"""All layers of an INT8 decoder, and its head, as one native call, where that can be.

1. A table of addresses is made once of a model's layers: weights, scales, biases, norms, gates.
2. Every forward asks whether the table still says what the model is, and whether the kernel can do
   what is asked (`find_native_layers`); else torch runs the layers, one operator after the other.
3. What depends on a forward alone is planned (`r1ray.models.native_plan`).

Price: 0.3 ms a forward for the checks (30 layers; none where the caller knows the answer) and 0.1
for the plan; torch takes more than that for the operators of each layer. A few KiB for the table,
and 8·H bytes for each position of the longest context so far.

Shape legend: B rows, T new tokens, D hidden size, N query heads, K key/value heads, H head
dimension.
"""

import ctypes
import operator
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.models.kv_cache import CacheSlice
from r1ray.models.native_plan import list_completed, list_places, plan_pieces
from r1ray.models.native_weights import (
    GATE_PARTS,
    NAMES,
    QUERY_WEIGHT,
    fits,
    list_head,
    list_tensors,
    may_fit,
)
from r1ray.models.rope import RotaryCache
from r1ray.models.sparse import SparseForward
from r1ray.ops import native

if TYPE_CHECKING:
    from r1ray.models.decoder import Decoder

__all__ = ["NativeLayers", "find_native_layers"]

_NONE = torch.empty(0)  # its address is null
_WIDTH = 16  # floats to which the kernel wants a gate's query weights padded

_found: "weakref.WeakKeyDictionary[Decoder, NativeLayers]" = weakref.WeakKeyDictionary()


def find_native_layers(
    model: "Decoder",
    x_BTD: Tensor,
    cache: CacheSlice | None,
    sparse: SparseForward | None,
    known: "NativeLayers | None" = None,
) -> "NativeLayers | None":
    """What runs the layers of `model` on these embeddings; None where torch has to.

    The one place where this is decided. Torch runs layers without a cache, with a gradient, under
    autocast, on a GPU or in another dtype than float32; and where a layer is not wholly of INT8
    linear layers, is streamed, observed or hooked, or has bounds in place of a gate.

    Args:
        known: of this model, which has not changed since; without it, the model is looked at.
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
    layers = NativeLayers.of(model) if known is None else known
    return layers if layers is not None and (sparse is None or layers.has_gates) else None


class NativeLayers:
    """The layers of one model, as they were when this was made.

    Attributes:
        has_gates: every layer has a trained or untrained `BlockGate`.
        has_head: the final norm and the head fit the kernel as well.
    """

    def __init__(self, model: "Decoder") -> None:
        """Of layers that `build` has found to fit."""
        self._config = model.config
        self._layers = [list_tensors(block) for block in model.model.layers]
        self.has_gates = all(layer[QUERY_WEIGHT] is not None for layer in self._layers)
        if not self.has_gates:  # those of some layers alone are not used
            self._layers = [
                [*layer[:QUERY_WEIGHT], *[None] * len(GATE_PARTS)] for layer in self._layers
            ]
        self._head = list_head(model)
        self.has_head = self._head is not None
        self._rotary = RotaryCache(model.config)
        self._table = (ctypes.c_void_p * (len(NAMES) * len(self._layers)))()
        for index, tensor in enumerate(tensor for layer in self._layers for tensor in layer):
            self._table[index] = _address(tensor)
        self._watch(model)

    @classmethod
    def of(cls, model: "Decoder") -> "NativeLayers | None":
        """Those of `model` as it is now; None without the kernel, or where a layer does not fit."""
        if not native.is_available():
            return None
        layers = _found.get(model)
        if layers is None or not layers.is_current():
            _found.pop(model, None)
            layers = cls.build(model)
            if layers is not None:
                _found[model] = layers
        return layers

    @classmethod
    def build(cls, model: "Decoder") -> "NativeLayers | None":
        """None where a layer does not fit the kernel."""
        blocks = model.model.layers
        if not len(blocks) or not may_fit(blocks[0]):
            return None
        if not all(fits(model, block) for block in blocks):
            return None
        if any("forward" in vars(module) for module in blocks.modules()):
            return None  # streamed, for one
        layers = cls(model)
        return layers if layers.is_current() else None

    def _watch(self, model: "Decoder") -> None:
        """Note what tells that a module or tensor was replaced, hooked or observed."""
        blocks, ends = model.model.layers, (model.model.norm, model.lm_head)
        modules = [*blocks.modules(), *ends]
        attentions: list[Any] = [block.self_attn for block in blocks]
        held: list[tuple[Any, str, Any]] = [
            (holder, name, holder[name])
            for module in modules
            for holder in (module._modules, module._parameters, module._buffers)
            for name in holder
        ]
        held += [(item._modules, "gate", item._modules.get("gate")) for item in attentions]
        held.append((vars(model), "config", model.config))
        held += [(model._modules, "lm_head", ends[1]), (model.model._modules, "norm", ends[0])]
        self._held = tuple(zip(*held, strict=True))
        self._parameters = [*blocks.parameters(), model.model.norm.weight]
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
        cache: CacheSlice,
        sparse: SparseForward | None,
        *,
        last: Sequence[int] = (),
        isa: int | None = None,
    ) -> Tensor:
        """Replace the embeddings `x_BTD` by the last layer's outputs; write the cache's new tokens.

        Args:
            last: numbers in [B · T] of tokens whose logits are wanted; none where there is no head.
        Returns:
            The logits of what follows these tokens, [len(last), V].
        Raises:
            ShapeError: the new tokens do not fit into the cache.
        """
        config, (batch, tokens, _) = self._config, x_BTD.shape
        cache.check_room(tokens)
        buffers = cache.buffers()
        cos, sin = self._rotary.behind(cache.starts, tokens)
        is_dense = sparse is None or sparse.is_dense
        pieces, numbers = plan_pieces(cache, tokens, is_dense=is_dense)
        completed = [] if sparse is None else list_completed(sparse)
        padded = self._pad_gates() if not is_dense else []
        key_scale, value_scale = map(Tensor.data_ptr, buffers.scales or (_NONE, _NONE))
        norm, weight, scale, bias = self._head or (None, None, None, None)
        size = 0 if weight is None else len(weight)
        logits_LV = torch.empty(len(last), size)
        numbers_L = (ctypes.c_int64 * len(last))(*last)
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
            final_norm=_address(norm),
            head_weight=_address(weight),
            head_scale=_address(scale),
            head_bias=_address(bias),
            last=ctypes.addressof(numbers_L),
            logits=logits_LV.data_ptr(),
            num_last=len(last),
            V=size,
            eps=config.rms_norm_eps,
        )
        done = (native.CompletedBlocks * len(completed))(*completed)
        arguments.completed = ctypes.addressof(done)
        native.run_decoder_layers(arguments, isa=isa)
        del padded  # until here the kernel reads them
        return logits_LV

    def _pad_gates(self) -> list[Tensor]:
        """Let the table have copies of query weights that are as wide as the kernel wants them."""
        if not self._config.head_dim % _WIDTH:
            return []
        copies = []
        for index, layer in enumerate(self._layers):
            weight = layer[QUERY_WEIGHT]
            assert weight is not None
            copies.append(F.pad(weight, (0, -weight.shape[2] % _WIDTH)))
            self._table[index * len(NAMES) + QUERY_WEIGHT] = copies[-1].data_ptr()
        return copies


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
