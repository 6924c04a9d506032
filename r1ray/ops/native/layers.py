"""The native kernel that runs all layers of a decoder: its structures, and its call.

They hold addresses, and nothing here knows what lies there: `r1ray.models.native_layers` checks.
"""

import ctypes

import torch

from r1ray.errors import ShapeError
from r1ray.ops.native.library import best_isa, library

__all__ = ["CompletedBlocks", "LayersArguments", "QueryPiece", "run_decoder_layers"]

_NO_MEMORY = 1  # what the kernel returns where it fails


def _fields(pointers_and_sizes: str) -> list[tuple[str, type]]:
    """`*name` is an address, `name` a size."""
    return [
        (name.lstrip("*"), ctypes.c_void_p if name.startswith("*") else ctypes.c_int64)
        for name in pointers_and_sizes.split()
    ]


class QueryPiece(ctypes.Structure):
    """`Piece` of decoder_layers.h."""

    _fields_ = _fields("row rows token tokens unit most room starts counts marked")


class CompletedBlocks(ctypes.Structure):
    """`Completed` of decoder_layers.h."""

    _fields_ = _fields("row first count *cos *sin")


class LayersArguments(ctypes.Structure):
    """As in decoder_layers.h; `isa` and `num_threads` are filled in by the call."""

    _fields_ = [
        *_fields(
            "*layers *x *cos *sin rotary_row *keys *values *key_scale *value_scale"
            " *summaries *pages row_pages layer_pages"
            " *numbers *pieces *completed num_pieces num_completed num_layers"
            " B T D F N K H chooses"
            " *final_norm *head_weight *head_scale *head_bias *last *logits num_last V"
        ),
        ("eps", ctypes.c_double),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def run_decoder_layers(arguments: LayersArguments, *, isa: int | None = None) -> None:
    """Run the layers: hidden states, the cache's new tokens and the logits are replaced.

    Args:
        isa: index in `ISA_NAMES`, at most `best_isa()`; None for that one.
    """
    arguments.isa = best_isa() if isa is None else isa
    arguments.num_threads = torch.get_num_threads()
    failure = library().r1ray_decoder_layers(ctypes.byref(arguments))
    if failure == _NO_MEMORY:
        raise MemoryError("no memory for the activations of a forward")
    if failure:
        raise ShapeError("decoder layers: a unit was to choose more blocks than there are")
