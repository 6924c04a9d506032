"""Which number format the matrix products of training run in."""

import contextlib
from typing import Literal

import torch

from r1ray.exchange import Transport

__all__ = ["Precision", "agree_precision", "autocast", "resolve_precision"]

Precision = Literal["fp32", "bf16"]


def resolve_precision(choice: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """`choice`, with auto as bf16 where the device multiplies bf16 in hardware, else fp32.

    Without such instructions a CPU emulates bf16 and is several times slower than in fp32.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if has_bf16 else "fp32"


def agree_precision(
    choice: Literal["auto", "fp32", "bf16"], device: torch.device, transport: Transport
) -> Precision:
    """`choice` on all workers: auto is bf16 only where every worker's hardware multiplies it."""
    mine = resolve_precision(choice, device)
    votes = torch.tensor([float(mine == "bf16")], device=device)
    transport.all_reduce_sum(votes).wait()
    return "bf16" if int(votes.item()) == transport.world_size else "fp32"


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context a forward runs in; master weights, norms and the loss stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
