"""The measuring pass of dynamic precision: what one step's gradients and outputs show, by group.

1. The largest |S·g| of every tensor, exactly: one read of the gradients. NaN and infinity show in
   it, and only then are they counted.
2. The shares below the dtype's normal and subnormal numbers, on an even sample of at most about
   65,536 elements a group: at 1% its standard error is 0.04 points.
3. A group's output is summed as it is made; a sum that is not finite says that an element was not.

Price: one pass over the gradients, one over each group's output, some ten over the samples, and one
read-back from the device. No copy of the gradients is made.

Shape legend: P tensors, G groups, M sampled elements.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.models.decoder import Decoder
from r1ray.training.precision_policy import GroupRange

__all__ = ["RangeMeter", "TensorGroup", "split_groups"]

MAX_SAMPLES = 65_536
_FORWARD_ORDER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that change precision together.

    Attributes:
        tensors: the trainable ones by their name in the model, in the order of the forward.
        products: modules that run in low precision unless the group is promoted; empty where it
            is only looked up.
        output: the module whose output is the group's; None where the loss shows what it was.
        shared: of `tensors`, the matrix that is embedding and head at once: its gradient is
            complete only at the end of the backward, and then catches what any group did.
    """

    name: str
    tensors: dict[str, nn.Parameter]
    products: tuple[nn.Module, ...]
    output: nn.Module | None
    shared: str | None = None


def split_groups(model: Decoder) -> list[TensorGroup]:
    """Fusion, embedding, each layer, final norm and head; those with nothing to train are left out.

    A matrix that is embedding and head at once belongs to `head`, where it is multiplied.
    """
    stack, head = model.model, model.lm_head
    names = {id(tensor): name for name, tensor in model.named_parameters()}

    def take(*modules: nn.Module) -> dict[str, nn.Parameter]:
        items = [
            item
            for module in modules
            for item in sorted(module.named_parameters(), key=_forward_position)
        ]
        return {names[id(tensor)]: tensor for _, tensor in items if tensor.requires_grad}

    groups = [
        TensorGroup(f"layers.{index}", take(block), (block,), block)
        for index, block in enumerate(stack.layers)
    ]
    shared = None
    if model.config.tie_embeddings:
        shared = names[id(head.get_parameter("weight"))]
    else:
        groups.insert(0, TensorGroup("embedding", take(stack.embed_tokens), (), stack.embed_tokens))
    if model.fusion is not None:
        encoder = model.fusion.encoder
        groups.insert(
            0, TensorGroup("fusion", take(model.fusion), model.fusion.list_products(), encoder)
        )
    groups.append(TensorGroup("head", take(stack.norm, head), (head,), None, shared))
    return [group for group in groups if group.tensors]


def _forward_position(item: tuple[str, nn.Parameter]) -> int:
    part = item[0].split(".")[0]
    return _FORWARD_ORDER.index(part) if part in _FORWARD_ORDER else 0


class RangeMeter:
    """Measures `groups` against the range of `dtype`; it watches their modules from now on."""

    def __init__(self, groups: Sequence[TensorGroup], dtype: torch.dtype) -> None:
        info = torch.finfo(dtype)
        self._limits = (info.tiny, info.tiny * info.eps)  # smallest normal and subnormal numbers
        self._groups = list(groups)
        self._parameters = [tensor for group in groups for tensor in group.tensors.values()]
        sizes = [len(group.tensors) for group in groups]
        self._group_P = torch.repeat_interleave(torch.tensor(sizes)).to(self._parameters[0].device)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._strides = [stride for group in groups for stride in _plan_strides(group)]
        self._padding = self._plan_padding()
        self._sums: list[Tensor | None] = [None] * len(groups)
        self.culprits: dict[int, str] = {}
        """Of the last measurement that was not finite: for each group, the first such gradient."""
        for index, group in enumerate(groups):
            if group.output is not None:
                group.output.register_forward_hook(functools.partial(self._add_output, index))

    @torch.no_grad()
    def measure(self) -> list[GroupRange]:
        """What this worker's gradients show; they are left as they are. Outputs count once."""
        gradients = [_gradient(parameter) for parameter in self._parameters]
        amax_P = _largest(gradients)
        amax_G = amax_P.new_zeros(len(self._groups))
        amax_G.scatter_reduce_(0, self._group_P, amax_P, "amax")
        samples_GM = self._sample(gradients)
        zeros_G = (samples_GM == 0).sum(1)
        num_nonzero_G = (samples_GM.shape[1] - zeros_G).clamp(min=1)
        shares = [((samples_GM < limit).sum(1) - zeros_G) / num_nonzero_G for limit in self._limits]
        zero = amax_G.new_zeros(())
        sums_G = torch.stack([zero if total is None else total for total in self._sums])
        self._sums = [None] * len(self._groups)
        columns = [amax_G, *shares, (~sums_G.isfinite()).float()]
        rows = torch.stack(columns, dim=1).tolist()
        counts = self._count_nonfinite(gradients, [math.isfinite(row[0]) for row in rows])
        return [
            GroupRange(amax if math.isfinite(amax) else math.inf, count, *others)
            for (amax, *others), count in zip(rows, counts, strict=True)
        ]

    def _sample(self, gradients: list[Tensor]) -> Tensor:
        """|S·g| [G, M] of every stride-th element, rows filled up with zeros."""
        pieces = [
            gradient.reshape(-1)[::stride]
            for gradient, stride in zip(gradients, self._strides, strict=True)
        ]
        rows = []
        for (begin, end), padding in zip(
            itertools.pairwise(self._starts), self._padding, strict=True
        ):
            rows += [*pieces[begin:end], padding]
        return torch.cat(rows).view(len(self._groups), -1).abs_()

    def _plan_padding(self) -> list[Tensor]:
        counts = [
            -(-parameter.numel() // stride)
            for parameter, stride in zip(self._parameters, self._strides, strict=True)
        ]
        totals = [sum(counts[begin:end]) for begin, end in itertools.pairwise(self._starts)]
        like = self._parameters[0].detach()
        return [like.new_zeros(max(totals) - total) for total in totals]

    def _count_nonfinite(self, gradients: list[Tensor], is_finite: list[bool]) -> list[float]:
        """By group; a shared matrix counts only if nothing else explains it."""
        if all(is_finite):
            return [0.0] * len(self._groups)
        found = [
            {
                name: float((~gradient.isfinite()).sum())
                for name, gradient in zip(group.tensors, gradients[begin:end], strict=True)
            }
            for group, (begin, end) in zip(
                self._groups, itertools.pairwise(self._starts), strict=True
            )
        ]
        own = [
            {name: count for name, count in counts.items() if name != group.shared}
            for group, counts in zip(self._groups, found, strict=True)
        ]
        if any(count for counts in own for count in counts.values()):
            found = own
        # The last in the forward is the first in the backward.
        self.culprits = {
            index: [name for name, count in counts.items() if count][-1]
            for index, counts in enumerate(found)
            if any(counts.values())
        }
        return [sum(counts.values()) for counts in found]

    def _add_output(self, index: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            total = output.detach().sum(dtype=torch.float32)
            before = self._sums[index]
            self._sums[index] = total if before is None else before + total


def _plan_strides(group: TensorGroup) -> list[int]:
    """One stride a tensor, sharing no factor with its columns, so that all of them are sampled."""
    total = sum(tensor.numel() for tensor in group.tensors.values())
    strides = []
    for tensor in group.tensors.values():
        stride = max(1, -(-total // MAX_SAMPLES))
        while math.gcd(stride, tensor.shape[-1]) > 1:
            stride += 1
        strides.append(stride)
    return strides


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest |g| of each tensor, NaN if one is: [P].

    On a CPU `aminmax` is vectorized and the norm is not (20 times slower); on CUDA the norm is one
    kernel for many tensors.
    """
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, math.inf))
    bounds = [torch.aminmax(gradient) for gradient in gradients]
    lowest = torch.stack([bound.min for bound in bounds])
    return torch.maximum(-lowest, torch.stack([bound.max for bound in bounds]))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
