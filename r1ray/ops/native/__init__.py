"""The optional native kernels: C++ with a plain C interface, called through ctypes.

setuptools builds them when r1ray is installed where a C++ compiler is. They carry code for several
instruction sets and choose at run time. Without them every operator runs through torch, which is
also their oracle in tests. Threads are those of torch's own OpenMP pool: a second pool would
compete with it for the cores.

Price: about 3 µs a call over that of the kernel itself.
"""

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path

import torch
from torch import Tensor

from r1ray.errors import ShapeError

__all__ = ["ISA_NAMES", "MAX_INPUTS", "best_isa", "describe", "int8_linear", "is_available"]

logger = logging.getLogger(__name__)

ISA_NAMES = ("generic", "avx2", "avx512_vnni")
MAX_INPUTS = 65_536  # so that no sum of int8 products leaves int32
_ABI_VERSION = 2


def is_available() -> bool:
    """Whether the kernels were built, and fit this version of r1ray."""
    return _library() is not None


def best_isa() -> int:
    """Index in `ISA_NAMES` of the widest instructions that this processor has.

    Any index up to it may be passed as `isa`.
    """
    return _best_isa() if is_available() else 0


def describe() -> str:
    """One line on what runs here."""
    if is_available():
        return f"native kernels: built, running on {ISA_NAMES[best_isa()]}"
    return "native kernels: not built (install a C++ compiler and r1ray again); torch runs instead"


def int8_linear(
    x_MI: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None = None,
    *,
    isa: int | None = None,
) -> Tensor:
    """As `r1ray.ops.int8.int8_linear`, bit for bit, on the CPU: float32 [M, O].

    Args:
        x_MI: of any float dtype.
        isa: index in `ISA_NAMES`, at most `best_isa()`; None for that one.
    """
    library = _library()
    assert library is not None, "callers ask is_available() first"
    x_MI, weight_OI = x_MI.float().contiguous(), weight_OI.contiguous()
    scale_O = scale_O.float().contiguous()
    bias = None if bias_O is None else bias_O.float().contiguous()
    (tokens, inner), outer = x_MI.shape, weight_OI.shape[0]
    _check(x_MI, weight_OI, scale_O, bias)
    out_MO = torch.empty(tokens, outer, dtype=torch.float32, device="cpu")
    failed = library.r1ray_int8_linear(
        x_MI.data_ptr(),
        tokens,
        inner,
        weight_OI.data_ptr(),
        scale_O.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outer,
        out_MO.data_ptr(),
        _best_isa() if isa is None else isa,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {tokens} x {inner} quantized activations")
    return out_MO


def _check(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
    """The kernel takes addresses: what does not fit would be read beyond its end."""
    outer = weight_OI.shape[0]
    vectors = [scale_O] if bias_O is None else [scale_O, bias_O]
    if (
        weight_OI.dtype != torch.int8
        or any(vector.shape != (outer,) for vector in vectors)
        or any(item.device.type != "cpu" for item in (x_MI, weight_OI, *vectors))
    ):
        raise ShapeError(
            f"int8_linear: weight {weight_OI.dtype} {tuple(weight_OI.shape)} on "
            f"{weight_OI.device}, scale {tuple(scale_O.shape)} and bias "
            f"{None if bias_O is None else tuple(bias_O.shape)} do not belong together"
        )


@functools.cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    paths = [folder / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        version = library.r1ray_abi_version()
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be used (%s); install r1ray again to rebuild it", path, error)
        return None
    if version != _ABI_VERSION:
        logger.warning("%s is of another version of r1ray; install it again to rebuild it", path)
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.r1ray_set_parallel.argtypes = [pointer]
    library.r1ray_set_parallel.restype = None
    library.r1ray_set_parallel(_find_fork())
    library.r1ray_int8_linear.argtypes = [
        *(pointer, size, size),
        *(pointer, pointer, pointer, size),
        *(pointer, number, number),
    ]
    library.r1ray_int8_linear.restype = number
    return library


@functools.cache
def _best_isa() -> int:
    library = _library()
    return 0 if library is None else int(library.r1ray_best_isa())


def _find_fork() -> int | None:
    """Address of GOMP_parallel in the OpenMP that torch uses (GNU's, LLVM's and Intel's have it).

    None where torch has another threading: kernels then run on one thread.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in folder.glob("libtorch_cpu.*"):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
