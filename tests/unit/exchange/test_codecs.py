import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.errors import ExchangeError
from r1ray.exchange.codecs import BLOCK_SIZE, get_codec

BLOCK_CODECS = {"int8": 127, "int4": 7, "int3": 3}
CODECS = (*BLOCK_CODECS, *(f"{name}_zstd" for name in BLOCK_CODECS), "bf16")

_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _scales(x: torch.Tensor, levels: int) -> torch.Tensor:
    """An upper bound on the scale of each element's block."""
    padded = torch.zeros(-(-len(x) // BLOCK_SIZE) * BLOCK_SIZE)
    padded[: len(x)] = x.abs()
    amax = padded.view(-1, BLOCK_SIZE).amax(1).double() / levels * (1 + 2**-8)
    return amax.repeat_interleave(BLOCK_SIZE)[: len(x)]


@pytest.mark.parametrize("name", BLOCK_CODECS)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(_floats, min_size=1, max_size=300), spread=st.integers(0, 37))
def test_every_element_errs_by_at_most_half_its_blocks_scale(
    name: str, values: list[float], spread: int
) -> None:
    x = torch.tensor(values) * 10.0**-spread
    codec = get_codec(name)
    found = codec.decode(codec.encode(x), len(x))
    limit = 0.5 * _scales(x, BLOCK_CODECS[name])
    # float32 rounding of the quotient; blocks with a subnormal scale lose up to their amax.
    tolerance = limit * 1e-3 + 1e-37
    assert (found.double() - x.double()).abs().le(limit + tolerance).all()
    assert torch.isfinite(found).all()
    assert (found[x == 0] == 0).all()
    assert (found.sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("numel", [1, 2, 7, 127, 128, 129, 1000, 65_536, 65_537, 200_003])
def test_the_reconstruction_is_what_the_payload_decodes_to(name: str, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    codec = get_codec(name)
    payload, reconstruction = codec.encode_with_reconstruction(x)
    assert payload.dtype == torch.uint8
    assert torch.equal(codec.decode(payload, numel), reconstruction)
    # A step of int3 is about 0.9 of a Gaussian sigma: 0.9 / sqrt(12) = 0.26.
    assert (reconstruction - x).norm() <= 0.35 * x.norm() or numel < 100


@pytest.mark.parametrize(("name", "bits"), [("int8", 8.6), ("int4", 4.3), ("int3", 3.3)])
@pytest.mark.parametrize("numel", [1000, 100_000])
def test_bits_an_element_stay_below_the_limit(name: str, bits: float, numel: int) -> None:
    assert 8 * len(get_codec(name).encode(torch.ones(numel))) <= bits * numel


def test_zstd_brings_gaussian_values_to_a_ninth_of_float32() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    payload = get_codec("int4_zstd").encode(x)
    assert 4 * len(x) / len(payload) > 8.8


@pytest.mark.parametrize("name", CODECS)
def test_any_finite_magnitude_stays_finite(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(300)
    x[0], x[128], x[129], x[260], x[261] = 1e30, largest, -largest, 1e-30, 1e-45
    codec = get_codec(name)
    found = codec.decode(codec.encode(x), len(x))
    assert torch.isfinite(found).all()
    assert (found[x == 0] == 0).all()
    assert found[0] == pytest.approx(1e30, rel=0.01)
    assert found[128] == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 200, 70_000])
def test_what_is_not_finite_is_refused(name: str, value: float, position: int) -> None:
    x = torch.ones(70_001)
    x[position] = value
    with pytest.raises(ExchangeError, match="NaN or infinity"):
        get_codec(name).encode(x)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("x", [torch.ones(2, 2), torch.ones(4, dtype=torch.float64)])
def test_only_float32_vectors_are_taken(name: str, x: torch.Tensor) -> None:
    with pytest.raises(ExchangeError, match="float32 vector"):
        get_codec(name).encode(x)


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_of_another_length_is_refused(name: str) -> None:
    codec = get_codec(name)
    payload = codec.encode(torch.randn(1000))
    with pytest.raises(ExchangeError, match=r"payload"):
        codec.decode(payload, 999 if name == "bf16" else 500)
    with pytest.raises(ExchangeError, match=r"payload"):
        codec.decode(payload[:-1], 1000)


def test_a_damaged_compressed_payload_is_refused() -> None:
    codec = get_codec("int4_zstd")
    payload = codec.encode(torch.randn(1000))
    payload[8:] = 0
    with pytest.raises(ExchangeError, match="payload"):
        codec.decode(payload, 1000)


@pytest.mark.parametrize("name", CODECS)
def test_nothing_encodes_to_nothing(name: str) -> None:
    codec = get_codec(name)
    assert len(codec.decode(codec.encode(torch.empty(0)), 0)) == 0


def test_an_unknown_codec_is_named_with_those_there_are() -> None:
    with pytest.raises(ExchangeError, match=r"no codec 'int5'; there are int8, int4"):
        get_codec("int5")
