"""Running a model whose static parts visit the fast tier one after the other.

1. A static unit is fetched before its forward, while the next one is being prefetched, and released
   after it.
2. In training its forward keeps nothing but its input; the backward, in reverse order, fetches it
   again and repeats the forward.

Price: page faults or copies of every static unit once a forward and once a backward; in training
one more forward of the static layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.models.decoder import Decoder
from r1ray.models.tiers import Tier

__all__ = ["EMBEDDING", "HEAD", "list_units", "stream_units"]

EMBEDDING, HEAD = "embedding", "head"


def list_units(model: Decoder) -> dict[str, nn.Module]:
    """The parts of `model` that can be streamed, in the order of a forward."""
    layers = {f"layer {index}": block for index, block in enumerate(model.model.layers)}
    return {
        EMBEDDING: model.model.embed_tokens,
        **layers,
        "final norm": model.model.norm,
        HEAD: model.lm_head,
    }


def stream_units(model: Decoder, static: Sequence[str], tier: Tier) -> None:
    """Let `model` run with its `static` units on `tier`, in place; its parameters stay its own."""
    units = list_units(model)
    for position, unit in enumerate(static):
        before = static[position - 1] if position else None
        if before == EMBEDDING:
            before = None  # its backward does not need its weights
        after = static[position + 1] if position + 1 < len(static) else None
        module = units[unit]
        visit = _Visit(tier, unit, before, after)
        if unit == EMBEDDING:
            module.forward = _visiting(module.forward, visit)
        else:
            module.forward = _recomputing(module.forward, visit)


@dataclass(frozen=True)
class _Visit:
    """A unit's stay on the fast tier, between its neighbours among the static units."""

    tier: Tier
    unit: str
    before: str | None
    after: str | None

    @contextlib.contextmanager
    def __call__(self, *, is_backward: bool = False) -> Iterator[None]:
        self.tier.fetch(self.unit)
        coming = self.before if is_backward else self.after
        if coming is not None:
            self.tier.prefetch(coming)
        try:
            yield
        finally:
            self.tier.release(self.unit)


def _visiting(forward: Callable[..., Tensor], visit: _Visit) -> Callable[..., Tensor]:
    """`forward` of a module whose backward does not need its weights (an embedding)."""

    def run(*args: Any) -> Tensor:
        with visit():
            return forward(*args)

    return run


def _recomputing(forward: Callable[..., Tensor], visit: _Visit) -> Callable[..., Tensor]:
    """`forward` that keeps its first argument alone, and is repeated in the backward."""

    def run(x: Tensor, *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            with visit():
                return forward(x, *args)
        anchor = torch.empty(0, requires_grad=True)  # x may need no gradient where weights do
        out: Tensor = _Recompute.apply(anchor, x, lambda value: forward(value, *args), visit)
        return out

    return run


class _Recompute(torch.autograd.Function):
    """run(x); the backward repeats it, and adds to the gradients of the weights it uses."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,  # noqa: ARG004 - by which autograd knows that there is a backward
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        visit: _Visit,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.visit = run, visit
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        with visit():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_(x.requires_grad)
        kind, dtype, is_enabled = ctx.autocast
        with (
            ctx.visit(is_backward=True),
            torch.enable_grad(),
        ):
            with torch.autocast(kind, dtype=dtype, enabled=is_enabled):
                out = ctx.run(again)
            torch.autograd.backward(out, gradients[0])
        return None, again.grad, None, None
