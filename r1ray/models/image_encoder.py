"""From pixels to feature vectors: patches, positions and a few transformer blocks.

1. The image is cut into squares; a linear layer makes a vector of each, a learned one says where.
2. Pre-norm blocks of attention over all patches and an MLP, all of them `encoder_rounds` times.

Price: 2 FLOP per parameter, patch and round, plus 4·P²·E per block and round.
Source: Dosovitskiy et al. 2021, arXiv:2010.11929 (patches); Dehghani et al. 2019, arXiv:1807.03819
(the same blocks several times).

Shape legend: I images, P patches, E encoder width, S pixels on a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.config.fusion import FusionConfig
from r1ray.errors import ShapeError

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """`ImageEncoder(pixels_I3SS)` gives features [I, P, E]."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.patch_proj = nn.Linear(3 * config.patch_size**2, width)
        self.positions_PE = nn.Parameter(0.02 * torch.randn(config.num_patches, width))
        self.blocks = nn.ModuleList(_EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels_I3SS: Tensor) -> Tensor:
        """Features [I, P, E].

        Args:
            pixels_I3SS: uint8, red, green and blue.
        Raises:
            ShapeError: images of another size.
        """
        size, patch = self.config.image_size, self.config.patch_size
        if pixels_I3SS.shape[1:] != (3, size, size):
            raise ShapeError(
                f"images of shape {tuple(pixels_I3SS.shape[1:])} do not fit an encoder of "
                f"(3, {size}, {size}); fit them with r1ray.models.images.read_image"
            )
        scaled = pixels_I3SS.to(self.positions_PE.dtype) / 127.5 - 1
        patches = F.unfold(scaled, patch, stride=patch).transpose(1, 2)
        x_IPE = self.patch_proj(patches) + self.positions_PE
        for _ in range(self.config.encoder_rounds):
            for block in self.blocks:
                x_IPE = block(x_IPE)
        features_IPE: Tensor = self.norm(x_IPE)
        return features_IPE


class _EncoderBlock(nn.Module):
    """Attention of all patches to all, then an MLP."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, self.heads = config.encoder_width, config.encoder_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, config.encoder_mlp)
        self.down_proj = nn.Linear(config.encoder_mlp, width)

    def forward(self, x_IPE: Tensor) -> Tensor:
        images, patches, width = x_IPE.shape
        qkv = self.qkv_proj(self.norm_1(x_IPE)).view(images, patches, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        x_IPE = x_IPE + self.o_proj(out.transpose(1, 2).reshape(images, patches, width))
        return x_IPE + self.down_proj(F.gelu(self.up_proj(self.norm_2(x_IPE))))
