"""Finds the library of native kernels, loads it, and hands it torch's threads."""

import ctypes
import functools
import importlib.machinery
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

__all__ = ["ISA_NAMES", "best_isa", "describe", "is_available", "library"]

logger = logging.getLogger(__name__)

ISA_NAMES = ("generic", "avx2", "avx512_vnni", "avx512_bf16")
_ABI_VERSION = 9


def is_available() -> bool:
    """Whether the kernels were built, and fit this version of r1ray."""
    return _load() is not None


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


def library() -> ctypes.CDLL:
    """The loaded library, where `is_available()`."""
    loaded = _load()
    assert loaded is not None, "callers ask is_available() first"
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | None:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    paths = (folder / f"_kernels{suffix}" for folder in _folders() for suffix in suffixes)
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
    for function in (
        library.r1ray_int8_linear,
        library.r1ray_sparse_attention,
        library.r1ray_choose_blocks,
        library.r1ray_choose_exact,
        library.r1ray_gated_attention,
        library.r1ray_decoder_layers,
    ):
        function.restype = number
    return library


def _folders() -> Iterator[Path]:
    """Beside this file; else where r1ray was installed on this machine.

    A working directory that Ray ships has no kernels, since git ignores what is built.
    """
    yield Path(__file__).parent
    try:
        installed = importlib.metadata.distribution("r1ray")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(installed.locate_file("r1ray/ops/native")))
    if origin := installed.read_text("direct_url.json"):  # of an editable installation, say
        yield Path(url2pathname(urlparse(json.loads(origin)["url"]).path)) / "r1ray/ops/native"


@functools.cache
def _best_isa() -> int:
    library = _load()
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
