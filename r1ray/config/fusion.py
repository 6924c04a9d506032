"""How a model sees images: the encoder, and where its decoder takes in what the encoder says."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

__all__ = ["FusionConfig", "FusionType"]

FusionType = Literal["early", "mid", "late"]


@dataclass(
    frozen=True,
    kw_only=True,
    slots=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class FusionConfig:
    """An image encoder and one of three ways into the decoder (`r1ray.models.fusion`)."""

    type: FusionType
    """early: patches are tokens; mid: gated cross-attention; late: a pooled product at the end."""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 64
    """Pixels on a side; images of other sizes are fitted into the square."""
    patch_size: Annotated[int, Field(ge=2, le=256)] = 16
    """Pixels on a side of a patch; each becomes one feature vector."""
    encoder_width: Annotated[int, Field(ge=8, le=8192)] = 128
    """Channels of the image encoder."""
    encoder_heads: Annotated[int, Field(ge=1, le=256)] = 4
    """Attention heads of the image encoder."""
    encoder_mlp: Annotated[int, Field(ge=8, le=32_768)] = 256
    """Neurons of the MLP in each of the encoder's blocks."""
    encoder_layers: Annotated[int, Field(ge=0, le=64)] = 2
    """Blocks of the image encoder; 0 leaves patch embeddings with positions."""
    encoder_rounds: Annotated[int, Field(ge=1, le=64)] = 1
    """Times that all blocks are run, one after the other: more work, no more parameters."""
    width: Annotated[int, Field(ge=8, le=32_768)] | None = None
    """Channels of cross-attention (mid) or of the product (late); null for the decoder's."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """mid: the decoder's layers that cross-attention comes before; null for every second one."""

    @model_validator(mode="after")
    def _is_cut_evenly(self) -> "FusionConfig":
        for name, whole, other, part in (
            ("image_size", self.image_size, "patch_size", self.patch_size),
            ("encoder_width", self.encoder_width, "encoder_heads", self.encoder_heads),
        ):
            if whole % part:
                raise ValueError(
                    f"{name} ({whole}) is not a multiple of {other} ({part}); change one of them"
                )
        return self

    @model_validator(mode="after")
    def _layers_are_of_mid(self) -> "FusionConfig":
        if self.layers is not None and self.type != "mid":
            raise ValueError(f"layers go with type mid, not with {self.type}; leave them out")
        return self

    @property
    def num_patches(self) -> int:
        """Feature vectors of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Positions that an image takes in the sequence; one marks it where patches take none."""
        return self.num_patches if self.type == "early" else 1
