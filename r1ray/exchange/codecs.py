"""Lossy codecs for flat float32 tensors: few bits an element, in packed bytes.

1. Elements come in blocks of 128; a block's scale is its largest magnitude over the number of
   levels, as bfloat16: float16 would overflow at 65,504 and flush below 6e-8.
2. An element becomes the nearest of the symmetric levels -n..n times the scale: zeros stay zero.
3. Codes are packed: payload = scales | codes. With `_zstd`, that is compressed losslessly, which
   pays because most codes are small.

Price, bits an element with the scale's 1/8: int8 8.13, int4 4.13, int3 3.13; int4 after zstd about
3.5 on Gaussian values (1/9 of float32). One encode reads the tensor twice.

An element errs by at most half its block's scale, which is at most amax/levels · (1 + 2^-8); blocks
whose amax is below 1e-37 may err by their amax.

Shape legend: E elements, N blocks, K elements of a block.
"""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import pyarrow as pa
import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.ops.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["BLOCK_SIZE", "Codec", "CodecName", "get_codec"]

CodecName = Literal["int8", "int4", "int3", "int8_zstd", "int4_zstd", "int3_zstd", "bf16"]

BLOCK_SIZE = 128
# Elements encoded at a time: a chunk and its temporaries stay in a core's cache.
_CHUNK = 512 * BLOCK_SIZE


class Codec(ABC):
    """Stateless, the same bytes for the same values on every machine of a kind."""

    @abstractmethod
    def encode_with_reconstruction(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        """(payload as uint8 vector on the host, float32 [E] on x's device: what it decodes to).

        Raises:
            ExchangeError: x_E is not a float32 vector, or holds NaN or infinity.
        """

    @abstractmethod
    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """float32 [numel] on the host.

        Raises:
            ExchangeError: the payload is not that of `numel` elements.
        """

    def encode(self, x_E: Tensor) -> Tensor:
        """The payload alone: a uint8 vector on the host."""
        return self.encode_with_reconstruction(x_E)[0]


class _BlockCodec(Codec):
    """Symmetric levels in blocks with a bfloat16 scale.

    Args:
        bits: of a code; codes run from -levels to levels, stored with `levels` + 1 added.
    """

    def __init__(self, bits: Literal[8, 4, 3]) -> None:
        self._bits = bits
        self._levels = 2 ** (bits - 1) - 1
        # The largest bfloat16 whose product with `levels` is a finite float32.
        limit = torch.tensor(torch.finfo(torch.float32).max / self._levels, dtype=torch.float64)
        self._max_scale = _bf16_at_most(float(limit))

    def encode_with_reconstruction(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        _check(x_E)
        numel = len(x_E)
        reconstruction_E = torch.empty_like(x_E)
        scales, codes = [], []
        for start in range(0, numel, _CHUNK):
            chunk = x_E[start : start + _CHUNK]
            scale_N, code_E = self._quantize(chunk, reconstruction_E[start : start + _CHUNK])
            scales.append(scale_N)
            codes.append(_pack(code_E, self._bits))
        if not scales:
            return torch.empty(0, dtype=torch.uint8), reconstruction_E
        return torch.cat([torch.cat(scales).view(torch.uint8), *codes]).cpu(), reconstruction_E

    def _quantize(self, x_E: Tensor, out_E: Tensor) -> tuple[Tensor, Tensor]:
        """(bf16 scales, uint8 codes) of one chunk; what they decode to goes into `out_E`."""
        numel = len(x_E)
        if numel % BLOCK_SIZE:
            padded = x_E.new_zeros(-(-numel // BLOCK_SIZE) * BLOCK_SIZE)
            padded[:numel] = x_E
            x_E = padded
        x_NK = x_E.view(-1, BLOCK_SIZE)
        amax_N = torch.maximum(x_NK.amax(1), x_NK.amin(1).neg_())
        if not torch.isfinite(amax_N).all():
            raise ExchangeError(
                "cannot encode a gradient or weight that holds NaN or infinity; skip the step"
            )
        scale_N = (amax_N / self._levels).to(torch.bfloat16).clamp_(max=self._max_scale)
        scale_N1 = scale_N.float().unsqueeze(1)
        # A block whose scale rounds to zero decodes to zero.
        q_NK = torch.where(scale_N1 > 0, x_NK / scale_N1, 0.0).round_()
        q_NK.clamp_(-self._levels, self._levels)
        out_E.copy_((q_NK * scale_N1).view(-1)[:numel])
        code_NK = q_NK.add_(self._levels + 1).to(torch.uint8)
        return scale_N, code_NK.view(-1)[:numel]

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        num_blocks = -(-numel // BLOCK_SIZE)
        expected = 2 * num_blocks + _packed_size(numel, self._bits)
        if payload.dtype != torch.uint8 or payload.dim() != 1 or len(payload) != expected:
            raise ExchangeError(
                f"payload of {len(payload)} bytes is not that of {numel} elements in int"
                f"{self._bits}, which has {expected}; encoder and decoder must use the same codec"
            )
        # Cloning aligns it: a payload may begin at any byte of a message.
        scale_N = payload[: 2 * num_blocks].clone().view(torch.bfloat16).float()
        out_E = torch.empty(num_blocks * BLOCK_SIZE)
        position = 2 * num_blocks
        for start in range(0, numel, _CHUNK):
            count = min(_CHUNK, numel - start)
            size = _packed_size(count, self._bits)
            code_E = _unpack(payload[position : position + size], count, self._bits)
            out_E[start : start + count] = code_E
            position += size
        out_E[numel:] = 0
        out_NK = out_E.view(-1, BLOCK_SIZE)
        out_NK.sub_(self._levels + 1).mul_(scale_N.unsqueeze(1))
        return out_E[:numel]


class _Bf16Codec(Codec):
    """The upper half of every float: for the few vectors (norms, biases) that steer much."""

    def encode_with_reconstruction(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        _check(x_E)
        if not torch.isfinite(x_E).all():
            raise ExchangeError(
                "cannot encode a gradient or weight that holds NaN or infinity; skip the step"
            )
        limit = torch.finfo(torch.bfloat16).max
        rounded_E = x_E.clamp(-limit, limit).to(torch.bfloat16)
        return rounded_E.view(torch.uint8).cpu(), rounded_E.float()

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        if payload.dtype != torch.uint8 or payload.dim() != 1 or len(payload) != 2 * numel:
            raise ExchangeError(
                f"payload of {len(payload)} bytes is not that of {numel} elements in bf16, "
                f"which has {2 * numel}"
            )
        return payload.clone().view(torch.bfloat16).float()


class _ZstdCodec(Codec):
    """Another codec's payload, compressed without loss by zstd at its fastest level."""

    def __init__(self, inner: Codec) -> None:
        self._inner = inner
        self._zstd = pa.Codec("zstd", compression_level=1)

    def encode_with_reconstruction(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        payload, reconstruction_E = self._inner.encode_with_reconstruction(x_E)
        size = len(payload).to_bytes(8, "little")
        packed = size + self._zstd.compress(payload.numpy(), asbytes=True)
        return _as_tensor(packed), reconstruction_E

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        packed = payload.numpy().tobytes()
        size = int.from_bytes(packed[:8], "little")
        if not 0 <= size <= 9 * numel + 16:
            raise ExchangeError(f"payload claims {size} bytes for {numel} elements; it is damaged")
        try:
            unpacked = self._zstd.decompress(packed[8:], decompressed_size=size, asbytes=True)
        except (OSError, pa.ArrowException) as error:
            raise ExchangeError(f"payload cannot be decompressed: {error}") from error
        return self._inner.decode(_as_tensor(unpacked), numel)


def get_codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        ExchangeError: there is none.
    """
    if name not in get_args(CodecName):
        raise ExchangeError(f"no codec {name!r}; there are {', '.join(get_args(CodecName))}")
    if name == "bf16":
        return _Bf16Codec()
    base, _, entropy = name.partition("_")
    codec = _BlockCodec({"int8": 8, "int4": 4, "int3": 3}[base])  # type: ignore[arg-type]
    return _ZstdCodec(codec) if entropy else codec


def _check(x_E: Tensor) -> None:
    if x_E.dtype != torch.float32 or x_E.dim() != 1:
        raise ExchangeError(
            f"a codec takes a float32 vector, not {x_E.dtype} of shape {list(x_E.shape)}"
        )


def _as_tensor(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bf16_at_most(limit: float) -> float:
    rounded = torch.tensor(limit, dtype=torch.float64).to(torch.bfloat16)
    if float(rounded) > limit:
        rounded = (rounded.view(torch.int16) - 1).view(torch.bfloat16)
    return float(rounded)


def _packed_size(numel: int, bits: int) -> int:
    full, rest = divmod(numel, _CHUNK)
    per_chunk = {8: _CHUNK, 4: _CHUNK // 2, 3: _CHUNK // 8 * 3}[bits]
    last = {8: rest, 4: -(-rest // 2), 3: -(-rest // 8) * 3}[bits]
    return full * per_chunk + last


def _pack(code_E: Tensor, bits: int) -> Tensor:
    """Codes of one chunk in bytes. Contiguous parts share a byte, which vectorizes."""
    if bits == 8:
        return code_E
    if bits == 4:
        return pack_nibbles(code_E)
    # One byte of each bit plane holds that bit of eight codes.
    parts = _parts(code_E, 8)
    planes = []
    for bit in range(3):
        plane = torch.zeros_like(parts[0])
        for position, part in enumerate(parts):
            plane |= ((part >> bit) & 1) << position
        planes.append(plane)
    return torch.cat(planes)


def _unpack(packed: Tensor, numel: int, bits: int) -> Tensor:
    if bits == 8:
        return packed
    if bits == 4:
        return unpack_nibbles(packed, numel)
    planes = packed.view(3, -1)
    parts = []
    for position in range(8):
        part = torch.zeros_like(planes[0])
        for bit in range(3):
            part |= ((planes[bit] >> position) & 1) << bit
        parts.append(part)
    return torch.cat(parts)[:numel]


def _parts(code_E: Tensor, count: int) -> list[Tensor]:
    """`count` equally long parts; what is missing at the end is zero."""
    length = -(-len(code_E) // count)
    if len(code_E) < count * length:
        padded = code_E.new_zeros(count * length)
        padded[: len(code_E)] = code_E
        code_E = padded
    return list(code_E.split(length))
