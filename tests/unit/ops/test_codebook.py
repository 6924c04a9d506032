import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.codebook import decode_rows, encode_rows


def _matrix(rows: int, columns: int, seed: int, levels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, levels), generator=generator)
    picks = torch.randint(0, levels, (rows, columns), generator=generator)
    return values.gather(1, picks).to(torch.int8)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    levels=st.sampled_from([1, 3, 16, 17, 200]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_int8_matrix_survives(rows: int, columns: int, levels: int, seed: int) -> None:
    q = _matrix(rows, columns, seed, levels)
    assert torch.equal(decode_rows(encode_rows(q), columns), q)


def test_rows_of_16_values_have_no_outliers_and_take_half_the_bytes() -> None:
    q = _matrix(64, 576, 0, 16)
    coded = encode_rows(q)
    assert len(coded.outlier_values_N) == 0
    assert coded.num_bytes == 64 * (576 // 2 + 16 + 4)  # codes, codebook, number of outliers


def test_what_is_not_in_the_codebook_is_kept_beside_it() -> None:
    q = torch.arange(16, dtype=torch.int8).repeat(2, 4)
    q[1, 5], q[1, 40] = 100, -128
    coded = encode_rows(q)
    assert coded.num_outliers_O.tolist() == [0, 2]
    assert coded.outlier_columns_N.tolist() == [5, 40]
    assert coded.outlier_values_N.tolist() == [100, -128]


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(2, 31, dtype=torch.uint8)},
        {"codebook_OC": torch.zeros(2, 15, dtype=torch.int8)},
        {"num_outliers_O": torch.tensor([0, 3], dtype=torch.int32)},
        {"num_outliers_O": torch.tensor([3, -1], dtype=torch.int32)},
        {"outlier_columns_N": torch.tensor([5, 64], dtype=torch.int32)},
        {"outlier_columns_N": torch.tensor([-1, 4], dtype=torch.int32)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Tensor]) -> None:
    q = torch.arange(16, dtype=torch.int8).repeat(2, 4)
    q[1, 5], q[1, 40] = 100, -128
    with pytest.raises(ShapeError, match="do not fit 64 columns"):
        decode_rows(dataclasses.replace(encode_rows(q), **changes), 64)
