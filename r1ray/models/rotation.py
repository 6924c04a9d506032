"""A decoder in another basis of its residual stream: the same function, easier to round.

1. Every norm's gains move into the weights behind it. A tied head gets weights of its own: the last
   norm's gains are not the embedding's.
2. All that writes to the residual stream is multiplied by an orthogonal Q, and all that reads from
   it by Q': a norm without gains, which only divides by a length, gives the same in any basis.

A few channels of a trained model's stream are many times larger than the others, and one scale a
token leaves few integers for the rest. A random Q spreads them over all channels: before INT8
products and the head, where most of INT8's loss comes from. What attention and the MLP have inside
stays as it is.

`rotate` is for good, when training is over; `rotated` lets a model compute in that basis while its
optimizer works in the old one. AdamW moves every weight by as much, and does harm where a large
channel is spread over all weights (docs/experiments.md).

Price: a tied head's own matrix, V·D weights more. Of `rotated`, once a step: D multiplications a
weight, and as many for the gradients; a copy of the weights and, at the end, of the gradients.
Source: QuaRot, Ashkboos et al. 2024 (arXiv:2404.00456), without its online transforms.

Shape legend: D hidden size, V words.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from r1ray.models.decoder import Block, Decoder

__all__ = ["rotate", "rotated"]

_SEED = 0  # of the basis: training and serving have the same


@torch.no_grad()
def rotate(model: Decoder) -> None:
    """Change the basis of a float32 `model` that reads text, in place."""
    model.lm_head.weight = nn.Parameter(model.lm_head.get_parameter("weight").clone())
    model.config = dataclasses.replace(model.config, tie_embeddings=False)
    for module, name, image in _rotate_weights(model, _basis(model)):
        module.get_parameter(name).copy_(image)


@contextlib.contextmanager
def rotated(model: Decoder) -> Iterator[None]:
    """Within, `model` has the rotated weights; behind, its own again, and gradients for these.

    Parameters that are asked for within are the rotated ones; they must not be changed.
    """
    with torch.enable_grad():
        images = list(_rotate_weights(model, _basis(model).float()))
    own = [module.get_parameter(name) for module, name, _ in images]
    lent = [nn.Parameter(image.detach(), image.requires_grad) for *_, image in images]
    try:
        _replace(images, lent)
        yield
    finally:
        _replace(images, own)
    reached = [at for at, parameter in enumerate(lent) if parameter.grad is not None]
    torch.autograd.backward([images[at][2] for at in reached], [lent[at].grad for at in reached])


_Image = tuple[nn.Module, str, Tensor]  # module, name of its parameter, what takes its place


def _rotate_weights(model: Decoder, basis_DD: Tensor) -> Iterator[_Image]:
    """What of the model changes with the basis; a tied head comes apart from the embedding."""
    norm = model.model.norm
    yield from _read(norm, (model.lm_head,), basis_DD)
    yield model.model.embed_tokens, "weight", _of(model.model.embed_tokens, basis_DD) @ basis_DD
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        yield from _read(block.input_layernorm, projections, basis_DD)
        yield from _read(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), basis_DD)
        for writer in (attention.o_proj, mlp.down_proj):
            yield writer, "weight", basis_DD.T @ _of(writer, basis_DD)
            if writer.bias is not None:
                yield writer, "bias", writer.bias.to(basis_DD) @ basis_DD


def _read(norm: nn.Module, readers: tuple[nn.Module, ...], basis_DD: Tensor) -> Iterator[_Image]:
    """`readers` [.., D] take in the gains and the basis of what they read."""
    gains_D = _of(norm, basis_DD)
    for reader in readers:
        yield reader, "weight", (_of(reader, basis_DD) * gains_D) @ basis_DD
    yield norm, "weight", torch.ones_like(gains_D)


def _of(module: nn.Module, basis_DD: Tensor) -> Tensor:
    return module.get_parameter("weight").to(basis_DD)


def _replace(images: list[_Image], parameters: list[nn.Parameter]) -> None:
    for (module, name, _), parameter in zip(images, parameters, strict=True):
        setattr(module, name, parameter)


def _basis(model: Decoder) -> Tensor:
    """Q [D, D], float64."""
    return _draw_basis(model.config.hidden_size).to(model.model.norm.weight.device)


@functools.lru_cache(maxsize=2)
def _draw_basis(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    drawn_DD = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn_DD)[0]
