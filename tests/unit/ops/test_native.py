import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.int8 import int8_linear, quantize_int8, torch_int8_linear
from r1ray.ops.native import library
from tests.native_kernels import ISAS, needs_native


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 11),
    inner=st.integers(1, 200),
    outer=st.integers(1, 41),
    has_bias=st.booleans(),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_every_instruction_set_equals_torch_bit_for_bit(
    isa: int, tokens: int, inner: int, outer: int, has_bias: bool, exponent: int, seed: int
) -> None:
    x = _random(tokens, inner, seed=seed) * 10.0**exponent
    x[0, : inner // 2] = 0.0
    weight, scale = quantize_int8(_random(outer, inner, seed=seed + 1))
    bias = _random(outer, seed=seed + 2) if has_bias else None
    expected = torch_int8_linear(x, weight, scale, bias)
    assert torch.equal(native.int8_linear(x, weight, scale, bias, isa=isa), expected)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_large_products_on_two_threads_equal_torch_bit_for_bit(isa: int, tokens: int) -> None:
    x = _random(tokens, 576)
    weight, scale = quantize_int8(_random(1541, 576, seed=1))
    expected = torch_int8_linear(x, weight, scale)
    assert torch.equal(native.int8_linear(x, weight, scale, isa=isa), expected)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums_are_exact(isa: int) -> None:
    inner = native.MAX_INPUTS
    weight = torch.full((5, inner), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.full((5, inner), 127.0)  # its scale is 1
    x[2] = -127.0
    found = native.int8_linear(x, weight, torch.ones(5), isa=isa)
    sign = torch.outer(x[:, 0].sign(), weight[:, 0].sign())
    assert torch.equal(found, sign * (127 * 127 * inner))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 99])
def test_a_row_that_is_not_finite_spoils_itself_alone(isa: int, value: float, column: int) -> None:
    x = _random(3, 100)
    x[1, column] = value
    weight, scale = quantize_int8(_random(7, 100, seed=1))
    found = native.int8_linear(x, weight, scale, isa=isa)
    assert not torch.isfinite(found[1]).any()
    assert torch.equal(found[[0, 2]], torch_int8_linear(x[[0, 2]], weight, scale))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_halves_round_to_even_and_the_smallest_floats_to_zero(isa: int) -> None:
    weight, scale = torch.eye(6, dtype=torch.int8), torch.ones(6)
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [1e-45, 0.0, 0.0, 0.0, 0.0, 0.0]])
    found = native.int8_linear(x, weight, scale, isa=isa)
    assert found.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0], [0.0] * 6]


@needs_native
def test_slices_and_narrow_inputs_are_taken_as_they_are() -> None:
    weight, scale = quantize_int8(_random(6, 40, seed=1))
    x = _random(9, 80)[::2, ::2]
    assert torch.equal(int8_linear(x, weight, scale), torch_int8_linear(x, weight, scale))
    narrow = x.bfloat16()
    found = int8_linear(narrow, weight, scale)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch_int8_linear(narrow, weight, scale))
    half = weight[:, ::2].contiguous()[::2]
    assert torch.equal(
        int8_linear(x[:, :20], half, scale[::2]), torch_int8_linear(x[:, :20], half, scale[::2])
    )


def test_without_the_library_torch_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, scale = quantize_int8(_random(6, 40, seed=1))
    x = _random(3, 40)
    expected = int8_linear(x, weight, scale)
    monkeypatch.setattr(library, "_load", lambda: None)
    assert native.best_isa() == 0
    assert "not built" in native.describe()
    assert "compiler" in native.describe()
    assert torch.equal(int8_linear(x, weight, scale), expected)


def test_a_library_that_cannot_be_loaded_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffix = library.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_kernels{suffix}").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "__init__.py"))
    assert library._load.__wrapped__() is None
    assert "_kernels" in caplog.text
    assert "install r1ray again" in caplog.text


@needs_native
def test_a_library_of_another_version_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_ABI_VERSION", 0)
    assert library._load.__wrapped__() is None
    assert "another version" in caplog.text


@needs_native
def test_work_is_handed_to_torchs_own_openmp(two_threads: object) -> None:
    """The address is that of the library whose threads torch counts, and the kernels call it."""
    kernels = library.library()
    real = library._find_fork()
    assert real is not None
    calls: list[int] = []
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def fork(body: int, data: int, num_threads: int, flags: int) -> None:
        calls.append(num_threads)
        body_type(body)(data)

    weight, scale = quantize_int8(_random(600, 576, seed=1))
    x = _random(40, 576)
    expected = torch_int8_linear(x, weight, scale)
    kernels.r1ray_set_parallel(ctypes.cast(fork, ctypes.c_void_p))
    try:
        assert torch.equal(native.int8_linear(x, weight, scale), expected)
    finally:
        kernels.r1ray_set_parallel(real)
    assert calls == [2, 2]  # to quantize, and to multiply


@needs_native
@pytest.mark.parametrize(
    ("weight", "scale", "bias"),
    [
        (torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4), None),
        (torch.zeros(4, 8, dtype=torch.int32), torch.ones(4), None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(3), None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), torch.ones(5)),
        (torch.zeros(4, 8, dtype=torch.int8, device="meta"), torch.ones(4), None),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    weight: Tensor, scale: Tensor, bias: Tensor | None
) -> None:
    with pytest.raises(ShapeError, match="do not belong together"):
        native.int8_linear(torch.ones(2, 8), weight, scale, bias)


@needs_native
def test_narrow_scales_and_another_default_dtype_change_nothing() -> None:
    weight, scale = quantize_int8(_random(5, 16, seed=1))
    scale = scale.bfloat16()
    x = _random(2, 16)
    expected = native.int8_linear(x, weight, scale.float())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = native.int8_linear(x, weight, scale)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@needs_native
def test_a_copy_without_kernels_takes_those_that_were_installed(tmp_path: Path) -> None:
    source = Path(library.__file__).parents[2]
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(source, tmp_path / "r1ray", ignore=ignored)
    code = (
        "import r1ray; from r1ray.ops import native; print(r1ray.__file__, native.is_available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [str(tmp_path / "r1ray" / "__init__.py"), "True"], done.stderr
