"""Three interchangeable ways for a decoder to take in images.

    early   the patches' features are tokens of the sequence, read by self-attention
    mid     before some layers, tokens attend to the patches: x + tanh(g)·CrossAttention(x, patches)
    late    at the output: h + W_o(silu(W_q h) · W_v mean(patches))

An image has a place in its row's sequence: as many tokens as it has patches (early), or one that
marks it. Tokens there have negative ids; no text has these. A token sees the images whose place has
begun, and nothing of later ones: what is known of a prompt's beginning holds for every prompt that
begins so, and prompts may be read in pieces.

What tokens read of an image is computed once and remembered: embeddings of its patches (early),
their keys and values for every cross-attention (mid), or one pooled vector (late).

Price beside the encoder's, per token: early, that of P more tokens in all layers; mid, 2 FLOP per
parameter of the queries and outputs of cross-attention, and 4·P·C for each; late, 2 FLOP per
parameter at the output alone. Per image: 2·P FLOP per parameter of what makes what is remembered.
Source: early, Chen et al. 2020 (UNITER, arXiv:1909.11740); mid, Alayrac et al. 2022 (Flamingo,
arXiv:2204.14198); late, Antol et al. 2015 (VQA, arXiv:1505.00468).

Shape legend: B rows, T tokens, I images of a row, P patches (what is remembered has one for late),
E encoder width, D hidden size, C channels of the fusion, N heads of cross-attention, X of those,
F numbers remembered of a patch (early D, mid X·2·C, late C).
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.config.fusion import FusionConfig, FusionType
from r1ray.errors import ConfigError
from r1ray.models.config import ModelConfig
from r1ray.models.image_encoder import ImageEncoder

__all__ = [
    "Fusion",
    "ImageContext",
    "ImageView",
    "MidFusion",
    "PlacedImages",
    "RowImages",
    "build_fusion",
    "gather_images",
]

_NEVER = 2**62  # a place that no sequence reaches


@dataclass(frozen=True)
class RowImages:
    """The images of a batch.

    Attributes:
        pixels_I3SS: uint8.
        rows: of the batch that they are in.
        places, ends: as in `PlacedImages`, within the row.
    """

    pixels_I3SS: Tensor
    rows: tuple[int, ...]
    places: tuple[int, ...]
    ends: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "RowImages":
        """The same on `device`."""
        return replace(self, pixels_I3SS=self.pixels_I3SS.to(device))


@dataclass(frozen=True)
class PlacedImages:
    """The images of one row and where they are in its sequence.

    Attributes:
        memory_IPF: as `Fusion.remember` has it.
        places: of the first token of each.
        ends: of the first token that does not see it any more; None where all later ones do.
    """

    memory_IPF: Tensor
    places: Sequence[int]
    ends: Sequence[int] | None = None


@dataclass(frozen=True)
class ImageContext:
    """The images of the rows of a forward, padded to the same number.

    Attributes:
        memory_BIPF: as `Fusion.remember` has it; zero where there is no image.
        places_BI, ends_BI: as in `PlacedImages`; no token is at the place of padding.
    """

    memory_BIPF: Tensor
    places_BI: Tensor
    ends_BI: Tensor

    def view(self, starts_B: Tensor | None, num_tokens: int) -> "ImageView":
        """What `num_tokens` tokens of each row see, the first of which are at `starts_B`, or 0."""
        positions_BT = torch.arange(num_tokens, device=self.places_BI.device)[None]
        if starts_B is not None:
            positions_BT = starts_B[:, None] + positions_BT
        return ImageView(self, positions_BT.expand(len(self.places_BI), -1))


@dataclass(frozen=True)
class ImageView:
    """What the tokens of one forward see.

    Attributes:
        positions_BT: of the tokens, in their rows' sequences.
    """

    context: ImageContext
    positions_BT: Tensor

    def sees(self) -> Tensor:
        """Whether a token sees an image, [B, T, I]."""
        positions = self.positions_BT[:, :, None]
        return (positions >= self.context.places_BI[:, None]) & (
            positions < self.context.ends_BI[:, None]
        )

    def offsets(self) -> Tensor:
        """How far behind the beginning of each image a token is, [B, T, I]; negative before it."""
        return self.positions_BT[:, :, None] - self.context.places_BI[:, None]


def gather_images(rows: Sequence[PlacedImages | None]) -> ImageContext | None:
    """The images of `rows`, padded; None where no row has any."""
    found = [(index, row) for index, row in enumerate(rows) if row is not None and row.places]
    if not found:
        return None
    like, most = found[0][1].memory_IPF, max(len(row.places) for _, row in found)
    memory_BIPF = like.new_zeros(len(rows), most, *like.shape[1:])
    places_BI = torch.full((len(rows), most), _NEVER, device=like.device)
    ends_BI = torch.full((len(rows), most), _NEVER, device=like.device)
    for index, row in found:
        count = len(row.places)
        memory_BIPF[index, :count] = row.memory_IPF
        places_BI[index, :count] = torch.tensor(row.places, device=like.device)
        if row.ends is not None:
            ends_BI[index, :count] = torch.tensor(row.ends, device=like.device)
    return ImageContext(memory_BIPF, places_BI, ends_BI)


class Fusion(nn.Module, abc.ABC):
    """Image encoder, and what of it the decoder takes in where: nothing, until a type says so.

    Attributes:
        changes_layers: whether it is between the decoder's layers.
        is_read_once: whether tokens behind an image's place need the image no more.
    """

    changes_layers = False
    is_read_once = False

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)

    def look(self, images: RowImages | None, num_rows: int) -> ImageContext | None:
        """What a forward over `num_rows` rows takes in of their images; None without any."""
        if images is None:
            return None
        memory_IPF = self.remember(images.pixels_I3SS)
        rows: list[PlacedImages | None] = []
        for row in range(num_rows):
            own = [index for index, of in enumerate(images.rows) if of == row]
            rows.append(
                PlacedImages(
                    memory_IPF[own],
                    [images.places[index] for index in own],
                    None if images.ends is None else [images.ends[index] for index in own],
                )
            )
        return gather_images(rows)

    def remember(self, pixels_I3SS: Tensor) -> Tensor:
        """What tokens read of these images, whichever they are: [I, P, F]."""
        return self.digest(self.encoder(pixels_I3SS))

    def list_products(self) -> tuple[nn.Module, ...]:
        """The modules that multiply matrices, each called with float32 where that is asked."""
        found: list[nn.Module] = []
        for child in self.children():
            found += child.values() if isinstance(child, nn.ModuleDict) else [child]
        return tuple(found)

    @abc.abstractmethod
    def digest(self, features_IPE: Tensor) -> Tensor:
        """What is remembered of the encoder's features: [I, P, F]."""

    @abc.abstractmethod
    def embed(self, x_BTD: Tensor, view: ImageView) -> Tensor:
        """Embeddings of the tokens, those at images' places replaced."""

    def before_layer(self, layer: int, x_BTD: Tensor, view: ImageView) -> Tensor:  # noqa: ARG002
        """The residual stream that goes into the decoder's layer."""
        return x_BTD

    def after(self, h_BTD: Tensor, view: ImageView) -> Tensor:  # noqa: ARG002
        """The final states that logits are made of."""
        return h_BTD


class EarlyFusion(Fusion):
    """Patches as tokens."""

    is_read_once = True

    def __init__(self, config: FusionConfig, decoder: ModelConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(config.encoder_width, decoder.hidden_size)
        # As large as embeddings of words are, where a decoder is trained already.
        nn.init.normal_(self.proj.weight, std=0.02)

    def digest(self, features_IPE: Tensor) -> Tensor:
        memory_IPF: Tensor = self.proj(features_IPE)
        return memory_IPF

    def embed(self, x_BTD: Tensor, view: ImageView) -> Tensor:
        patches = self.config.num_patches
        offsets_BTI = view.offsets()
        is_inside_BTI = (offsets_BTI >= 0) & (offsets_BTI < patches)
        image_BT = is_inside_BTI.int().argmax(-1)
        offset_BT = offsets_BTI.gather(2, image_BT[..., None])[..., 0].clamp(0, patches - 1)
        rows_B1 = torch.arange(len(x_BTD), device=x_BTD.device)[:, None]
        taken_BTD = view.context.memory_BIPF[rows_B1, image_BT, offset_BT].to(x_BTD.dtype)
        return torch.where(is_inside_BTI.any(-1)[..., None], taken_BTD, x_BTD)


class MarkedFusion(Fusion):
    """An image takes one token, which has a learned embedding."""

    def __init__(self, config: FusionConfig, decoder: ModelConfig) -> None:
        super().__init__(config)
        self.marker_D = nn.Parameter(0.02 * torch.randn(decoder.hidden_size))

    def embed(self, x_BTD: Tensor, view: ImageView) -> Tensor:
        is_marked_BT = (view.offsets() == 0).any(-1)
        return torch.where(is_marked_BT[..., None], self.marker_D.to(x_BTD.dtype), x_BTD)


class MidFusion(MarkedFusion):
    """Cross-attention before chosen layers, behind gates that are closed at first."""

    changes_layers = True

    def __init__(self, config: FusionConfig, decoder: ModelConfig) -> None:
        super().__init__(config, decoder)
        width = config.width or decoder.hidden_size
        chosen = config.layers or list(range(0, decoder.num_layers, 2))
        if width % decoder.head_dim:
            raise ConfigError(
                f"fusion.width ({width}) is not a multiple of the decoder's head dimension "
                f"({decoder.head_dim}); change it"
            )
        if max(chosen) >= decoder.num_layers or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"fusion.layers {chosen} are not different layers of a decoder that has "
                f"{decoder.num_layers}; the first is 0"
            )
        self.crossings = nn.ModuleDict(
            {
                str(layer): _Crossing(decoder, config.encoder_width, width)
                for layer in sorted(chosen)
            }
        )
        self._numbers = {name: number for number, name in enumerate(self.crossings)}

    def list_products(self) -> tuple[nn.Module, ...]:
        return *super().list_products(), *self._list_readers()

    def _list_readers(self) -> list[nn.Module]:
        """What makes keys and values, which no crossing calls: k and v of the first, and so on."""
        return [
            crossing.get_submodule(name)
            for crossing in self.crossings.values()
            for name in ("k_proj", "v_proj")
        ]

    def digest(self, features_IPE: Tensor) -> Tensor:
        return torch.cat([project(features_IPE) for project in self._list_readers()], -1)

    def before_layer(self, layer: int, x_BTD: Tensor, view: ImageView) -> Tensor:
        number = self._numbers.get(str(layer))
        if number is None:
            return x_BTD
        memory_BIPX2C = view.context.memory_BIPF.unflatten(-1, (len(self._numbers), 2, -1))
        return self.crossings[str(layer)](x_BTD, *memory_BIPX2C[..., number, :, :].unbind(-2), view)


class _Crossing(nn.Module):
    """x + tanh(gate) · attention of tokens to the patches of the images that they see."""

    def __init__(self, decoder: ModelConfig, encoder_width: int, width: int) -> None:
        super().__init__()
        self.head_dim = decoder.head_dim
        self.norm = nn.RMSNorm(decoder.hidden_size, eps=decoder.rms_norm_eps)
        self.q_proj = nn.Linear(decoder.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(encoder_width, width, bias=False)
        self.v_proj = nn.Linear(encoder_width, width, bias=False)
        self.o_proj = nn.Linear(width, decoder.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, k_BIPC: Tensor, v_BIPC: Tensor, view: ImageView) -> Tensor:
        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        sees_BTI = view.sees()
        sees_none_BT1 = ~sees_BTI.any(-1, keepdim=True)
        # Who sees nothing attends to anything, so that no softmax is of nothing, and gets nothing.
        mask_BTI = sees_BTI | sees_none_BT1
        out_BNTH = F.scaled_dot_product_attention(
            heads(self.q_proj(self.norm(x_BTD))),
            heads(k_BIPC.flatten(1, 2)),
            heads(v_BIPC.flatten(1, 2)),
            attn_mask=mask_BTI.repeat_interleave(k_BIPC.shape[2], -1)[:, None],
        )
        out_BTD = self.o_proj(out_BNTH.transpose(1, 2).flatten(2))
        return x_BTD + torch.tanh(self.gate) * out_BTD.masked_fill(sees_none_BT1, 0.0)


class LateFusion(MarkedFusion):
    """A product of the final state and the pooled features, which adds nothing at first."""

    def __init__(self, config: FusionConfig, decoder: ModelConfig) -> None:
        super().__init__(config, decoder)
        width = config.width or decoder.hidden_size
        self.q_proj = nn.Linear(decoder.hidden_size, width)
        self.v_proj = nn.Linear(config.encoder_width, width)
        self.o_proj = nn.Linear(width, decoder.hidden_size, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def digest(self, features_IPE: Tensor) -> Tensor:
        memory_IPF: Tensor = self.v_proj(features_IPE.mean(1, keepdim=True))
        return memory_IPF

    def after(self, h_BTD: Tensor, view: ImageView) -> Tensor:
        sees_BTI = view.sees().to(h_BTD.dtype)
        shares_BTI = sees_BTI / sees_BTI.sum(-1, keepdim=True).clamp_min(1)
        pooled_BTC = shares_BTI @ view.context.memory_BIPF[:, :, 0]
        return h_BTD + self.o_proj(F.silu(self.q_proj(h_BTD)) * pooled_BTC)


_TYPES: dict[FusionType, Callable[[FusionConfig, ModelConfig], Fusion]] = {
    "early": EarlyFusion,
    "mid": MidFusion,
    "late": LateFusion,
}


def build_fusion(config: FusionConfig, decoder: ModelConfig) -> Fusion:
    """An untrained fusion for a decoder of this shape.

    Raises:
        ConfigError: `config` does not fit the decoder.
    """
    if config.num_image_tokens > decoder.max_context:
        raise ConfigError(
            f"fusion: an image of {config.num_image_tokens} patches does not fit the decoder's "
            f"{decoder.max_context} positions; raise fusion.patch_size"
        )
    return _TYPES[config.type](config, decoder)
