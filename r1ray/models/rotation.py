"""A decoder in another basis of its residual stream: the same function, easier to round.

1. Every norm's gains move into the weights behind it. A tied head gets weights of its own: the last
   norm's gains are not the embedding's.
2. All that writes to the residual stream is multiplied by an orthogonal Q, and all that reads from
   it by Q': a norm without gains, which only divides by a length, gives the same in any basis.

A few channels of a trained model's stream are many times larger than the others, and one scale a
token leaves few integers for the rest. A random Q spreads them over all channels: before INT8
products and the head, where most of INT8's loss comes from. What attention and the MLP have inside
stays as it is.

Price: a tied head's own matrix, V·D weights more; in training and serving nothing else.
Source: QuaRot, Ashkboos et al. 2024 (arXiv:2404.00456), without its online transforms.

Shape legend: D hidden size, O and I outputs and inputs of a linear layer, V words.
"""

import dataclasses

import torch
from torch import Tensor, nn

from r1ray.models.decoder import Block, Decoder

__all__ = ["rotate"]


@torch.no_grad()
def rotate(model: Decoder, *, seed: int = 0) -> None:
    """Change the basis of a float32 `model` that reads text, in place.

    Args:
        seed: of the basis.
    """
    generator = torch.Generator().manual_seed(seed)
    size = model.config.hidden_size
    basis_DD, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    basis_DD = basis_DD.to(model.model.norm.weight.device)
    embedding, norm = model.model.embed_tokens.get_parameter("weight"), model.model.norm
    head = nn.Linear(size, model.config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(model.lm_head.get_parameter("weight").clone())
    model.lm_head = head
    model.config = dataclasses.replace(model.config, tie_embeddings=False)
    _read(head, norm, basis_DD)
    norm.weight.fill_(1.0)
    embedding.copy_(embedding.double() @ basis_DD)
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        for gains, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                _read(reader, gains, basis_DD)
            gains.weight.fill_(1.0)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(basis_DD.T @ writer.weight.double())
            if writer.bias is not None:
                writer.bias.copy_(writer.bias.double() @ basis_DD)


def _read(linear: nn.Linear, norm: nn.Module, basis_DD: Tensor) -> None:
    """Let `linear` [O, D] take in gains and basis of what it reads."""
    gains_D = norm.get_parameter("weight").double()
    linear.weight.copy_((linear.weight.double() * gains_D) @ basis_DD)
