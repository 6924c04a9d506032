"""The optional native kernels: C++ with a plain C interface, called through ctypes.

setuptools builds them when r1ray is installed where a C++ compiler is. They carry code for several
instruction sets and choose at run time. Without them every operator runs through torch, which is
also their oracle in tests. Threads are those of torch's own OpenMP pool: a second pool would
compete with it for the cores.

Price: about 3 µs a call over that of the kernel itself, 10 µs for those of block-sparse attention.
"""

from r1ray.ops.native.layers import (
    CompletedBlocks,
    LayersArguments,
    QueryPiece,
    run_decoder_layers,
)
from r1ray.ops.native.library import ISA_NAMES, best_isa, describe, is_available
from r1ray.ops.native.linear import MAX_INPUTS, int8_linear
from r1ray.ops.native.sparse import (
    can_attend,
    choose_blocks,
    choose_exact,
    gated_attention,
    sparse_attention,
)

__all__ = [
    "ISA_NAMES",
    "MAX_INPUTS",
    "CompletedBlocks",
    "LayersArguments",
    "QueryPiece",
    "best_isa",
    "can_attend",
    "choose_blocks",
    "choose_exact",
    "describe",
    "gated_attention",
    "int8_linear",
    "is_available",
    "run_decoder_layers",
    "sparse_attention",
]
