"""Quantization schemes: the modules that hold the integers, and how they lie in a model directory.

    scheme   weights of the layers               a weight on disk   activations
    w8a8     int8, one scale an output channel   8 bits             int8, one scale a token
    w4a8     -7 to 7, one scale a channel        4 bits             the same
    codebook4  16 values a row and outliers      4 bits and a bit   the same

Embeddings are int8 per row; a tied head shares them, an untied one is int8. The linear layers of a
fusion are int8 with every scheme. Norms and biases stay float. In memory every weight is int8, so
all schemes run through the same operator.

`quantize_modules` makes the served model; `fake_quantize_modules` makes the one that trains
towards it.
"""

from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor, nn

from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError, ShapeError
from r1ray.models.decoder import Decoder
from r1ray.ops.codebook import CodedRows, decode_rows, encode_rows
from r1ray.ops.fake_quant import FakeQuantEmbedding, FakeQuantLinear
from r1ray.ops.int8 import Int8Embedding, Int8Linear
from r1ray.ops.nibbles import pack_nibbles, unpack_nibbles

__all__ = [
    "SCHEMES",
    "fake_quantize_modules",
    "list_linears",
    "pack_tensors",
    "quantize_fusion",
    "quantize_modules",
    "tie_head",
    "unpack_tensors",
]

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_WEIGHT_LIMITS: dict[Scheme, int] = {"w8a8": 127, "w4a8": 7, "codebook4": 127}
_WEIGHT = ".weight"
_PACKED = ".weight_packed"
_CODED = {  # part of a coded weight -> its name on disk
    "codes": ".weight_codes",
    "codebook_OC": ".weight_codebook",
    "outlier_columns_N": ".outlier_columns",
    "outlier_values_N": ".outlier_values",
    "num_outliers_O": ".num_outliers",
}


def quantize_modules(model: Decoder, scheme: Scheme = "w8a8") -> None:
    """Replace every linear layer and the embedding of `model` by their INT8 forms, in place."""
    embedding, head = _float_ends(model)
    for module, name, linear in list(list_linears(model)):
        setattr(module, name, Int8Linear.from_float(linear, _WEIGHT_LIMITS[scheme]))
    model.model.embed_tokens = Int8Embedding.from_float(embedding)
    if model.config.tie_embeddings:
        tie_head(model)
    else:
        model.lm_head = Int8Linear.from_float(head)
    quantize_fusion(model)
    model.scheme = scheme


def quantize_fusion(model: Decoder) -> None:
    """Replace every linear layer of the fusion, where there is one, by its INT8 form, in place."""
    for module, name, linear in list(_list_linears(model.fusion)):
        setattr(module, name, Int8Linear.from_float(linear))


def fake_quantize_modules(model: Decoder, scheme: Scheme) -> None:
    """Let `model` train through the rounding of `scheme`, in place; its parameters stay its own."""
    embedding, head = _float_ends(model)
    for _, _, linear in list_linears(model):
        FakeQuantLinear.from_float(linear, _WEIGHT_LIMITS[scheme])
    FakeQuantEmbedding.from_float(embedding)
    FakeQuantLinear.from_float(head)
    for _, _, linear in list(_list_linears(model.fusion)):
        FakeQuantLinear.from_float(linear)


def tie_head(model: Decoder) -> None:
    """Let a tied head share the embedding's tensors, also after `Module.to` copied them apart."""
    if not model.config.tie_embeddings:
        return
    embedding = model.model.embed_tokens
    if isinstance(embedding, Int8Embedding):
        model.lm_head = Int8Linear(embedding.weight, embedding.weight_scale)
    else:
        model.lm_head.weight = embedding.get_parameter("weight")


def pack_tensors(tensors: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The state dict of a quantized model, as it lies on disk."""
    if scheme == "w8a8":
        return tensors
    packed = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(_WEIGHT)
        if not _is_layer_weight(name, tensor):
            packed[name] = tensor
        elif scheme == "w4a8":
            packed[stem + _PACKED] = pack_nibbles((tensor + 8).byte())
        else:
            coded = encode_rows(tensor)
            packed |= {stem + suffix: getattr(coded, part) for part, suffix in _CODED.items()}
    return packed


def unpack_tensors(
    tensors: dict[str, Tensor], scheme: Scheme, expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict that `pack_tensors` packed.

    Args:
        expected: the model's own state dict, whose shapes tell the number of columns.
    Raises:
        ArtifactError: a packed weight does not fit.
    """
    if scheme == "w8a8":
        return tensors
    rest = dict(tensors)
    unpacked = {}
    for name, tensor in expected.items():
        stem = name.removesuffix(_WEIGHT)
        if not _is_layer_weight(name, tensor):
            continue
        if scheme == "w4a8" and stem + _PACKED in rest:
            unpacked[name] = _unpack(stem + _PACKED, rest.pop(stem + _PACKED), tensor.shape[1])
        elif scheme == "codebook4" and all(stem + part in rest for part in _CODED.values()):
            parts = {part: rest.pop(stem + suffix) for part, suffix in _CODED.items()}
            try:
                unpacked[name] = decode_rows(CodedRows(**parts), tensor.shape[1])
            except (ShapeError, RuntimeError) as error:
                raise ArtifactError(f"{name}: cannot be decoded ({error})") from error
    return rest | unpacked


def _unpack(name: str, packed: Tensor, num_columns: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.shape[1:] != (-(-num_columns // 2),):
        raise ArtifactError(
            f"{name} is {packed.dtype} of shape {tuple(packed.shape)}; the configuration needs "
            f"bytes for {num_columns} columns, two in each"
        )
    return unpack_nibbles(packed, num_columns).to(torch.int8) - 8


def _is_layer_weight(name: str, tensor: Tensor) -> bool:
    return (
        name.startswith("model.layers.") and name.endswith(".weight") and tensor.dtype == torch.int8
    )


def list_linears(model: Decoder) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer inside the blocks."""
    return _list_linears(model.model.layers)


def _list_linears(root: nn.Module | None) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for module in () if root is None else root.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                yield module, name, child


def _float_ends(model: Decoder) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.model.embed_tokens, model.lm_head
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ArtifactError("the model is already quantized")
    return embedding, head
