import torch
from hypothesis import given
from hypothesis import strategies as st

from r1ray.ops.nibbles import pack_nibbles, unpack_nibbles


@given(rows=st.integers(1, 4), columns=st.integers(1, 33), seed=st.integers(0, 1000))
def test_codes_round_trip_in_half_the_bytes(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, -(-columns // 2))
    assert torch.equal(unpack_nibbles(packed, columns), codes)


def test_the_first_half_is_in_the_low_bits() -> None:
    packed = pack_nibbles(torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert packed.tolist() == [1 | 3 << 4, 2]
