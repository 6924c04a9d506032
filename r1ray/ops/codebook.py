"""Int8 matrices whose rows hold few distinct values, in about half the bytes, without loss.

1. A row's 16 most frequent integers are its codebook; every weight is a 4-bit code into it.
2. What is not in the codebook is kept beside it, as column and value: the outliers.

Any int8 matrix survives the round trip; it is small where outliers are few (0.45% of the weights:
4.2 to 4.4 bits a weight in rows of 1,536 to 576).

Shape legend: O rows, I columns, C = 16 codes, N outliers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["NUM_CODES", "CodedRows", "decode_rows", "encode_rows"]

NUM_CODES = 16
_OFFSET = 128
_SHORT_COLUMNS = 2**15


@dataclass(frozen=True)
class CodedRows:
    """An int8 matrix as it lies on disk.

    Attributes:
        codes: uint8 [O, ceil(I / 2)], two codes a byte.
        codebook_OC: int8.
        outlier_columns_N: int16 where all columns fit, else int32; row by row.
        outlier_values_N: int8.
        num_outliers_O: int32, of each row.
    """

    codes: Tensor
    codebook_OC: Tensor
    outlier_columns_N: Tensor
    outlier_values_N: Tensor
    num_outliers_O: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(item.numel() * item.element_size() for item in vars(self).values())


def encode_rows(q_OI: Tensor) -> CodedRows:
    """The coded form of an int8 matrix."""
    column_type = torch.int16 if q_OI.shape[1] <= _SHORT_COLUMNS else torch.int32
    place_OI = q_OI.long() + _OFFSET
    counts_OV = torch.zeros(len(q_OI), 2 * _OFFSET, dtype=torch.long)
    counts_OV.scatter_add_(1, place_OI, torch.ones_like(place_OI))
    frequent_OC = counts_OV.topk(NUM_CODES, dim=1).indices.sort(dim=1).values
    code_of_OV = torch.full_like(counts_OV, NUM_CODES, dtype=torch.uint8)
    numbers_C = torch.arange(NUM_CODES, dtype=torch.uint8)
    code_of_OV.scatter_(1, frequent_OC, numbers_C.expand(len(q_OI), -1))
    codes_OI = code_of_OV.gather(1, place_OI)
    is_outlier_OI = codes_OI == NUM_CODES
    return CodedRows(
        codes=pack_nibbles(codes_OI.masked_fill(is_outlier_OI, 0)),
        codebook_OC=(frequent_OC - _OFFSET).to(torch.int8),
        outlier_columns_N=is_outlier_OI.nonzero()[:, 1].to(column_type),
        outlier_values_N=q_OI[is_outlier_OI],
        num_outliers_O=is_outlier_OI.sum(1).int(),
    )


def decode_rows(coded: CodedRows, num_columns: int) -> Tensor:
    """The int8 matrix [O, I] that `encode_rows` coded.

    Raises:
        ShapeError: the parts do not belong together.
    """
    num_rows = len(coded.codebook_OC)
    num_outliers = int(coded.num_outliers_O.sum())
    is_whole = (
        coded.codes.shape == (num_rows, -(-num_columns // 2))
        and coded.codebook_OC.shape == (num_rows, NUM_CODES)
        and coded.num_outliers_O.shape == (num_rows,)
        and bool((coded.num_outliers_O >= 0).all())
        and coded.outlier_columns_N.shape == coded.outlier_values_N.shape == (num_outliers,)
        and bool(((coded.outlier_columns_N >= 0) & (coded.outlier_columns_N < num_columns)).all())
    )
    if not is_whole:
        raise ShapeError(
            f"coded rows do not fit {num_columns} columns: codes {tuple(coded.codes.shape)}, "
            f"codebooks {tuple(coded.codebook_OC.shape)}, {num_outliers} outliers"
        )
    codes_OI = unpack_nibbles(coded.codes, num_columns)
    q_OI = coded.codebook_OC.gather(1, codes_OI.long())
    rows_N = torch.repeat_interleave(torch.arange(num_rows), coded.num_outliers_O.long())
    q_OI[rows_N, coded.outlier_columns_N.long()] = coded.outlier_values_N
    return q_OI
