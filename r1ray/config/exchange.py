"""The configuration of `train.exchange`: how workers are brought together."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

__all__ = [
    "AutoExchangeConfig",
    "Delta4AsyncExchangeConfig",
    "Delta4ExchangeConfig",
    "DenseExchangeConfig",
    "ExchangeConfig",
    "StreamExchangeConfig",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class DenseExchangeConfig:
    """Uncompressed all-reduce of the summed gradients."""

    type: Literal["dense"]
    """Every gradient element is sent."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format on the wire."""


_MatrixCodec = Literal["int8", "int4", "int3", "int8_zstd", "int4_zstd", "int3_zstd"]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Delta4ExchangeConfig:
    """Sharded AdamW; quantized gradients to a shard's owner, quantized weight deltas back."""

    type: Literal["delta4"]
    """Every step waits for its exchange."""
    codec: _MatrixCodec = "int4_zstd"
    """Number format of matrices on the wire; zstd is lossless and a sixth smaller."""
    error_feedback: bool = True
    """Add what rounding took from a gradient to the next one."""
    checksum_every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between two comparisons of the weights over the workers."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Delta4AsyncExchangeConfig:
    """As delta4, while the next gradient is computed: every gradient is one update old."""

    type: Literal["delta4_async"]
    """The exchange has a thread and a process group of its own."""
    codec: _MatrixCodec = "int4_zstd"
    """Number format of matrices on the wire."""
    error_feedback: bool = True
    """Add what rounding took from a gradient to the next one."""
    checksum_every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between two comparisons of the weights over the workers."""
    sync_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the run, from its start, in which gradients are not stale."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """In place of train.adam_beta1, over the whole run: a stale gradient acts as more momentum."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class StreamExchangeConfig:
    """Local steps; int4 deltas of one fragment of the weights at a time, merged in the background.

    While streaming, loss and tokens in a step's record are those of one worker.
    """

    type: Literal["stream"]
    """Streaming DiLoCo over TCP connections of its own."""
    local_steps: Annotated[int, Field(ge=1)] = 100
    """Steps between two merges of the same fragment."""
    num_fragments: Annotated[int, Field(ge=1, le=64)] = 4
    """Parts of the weights, merged in turn."""
    overlap_steps: Annotated[int, Field(ge=0)] = 5
    """Steps from sending a fragment to taking its merge over."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum of merges; it falls to 0 over the last fifth of the streaming phase."""
    tail_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the run, at its end, made with delta4; even so it sends about as many bytes."""
    grace_s: Annotated[float, Field(ge=0, le=3600)] = 10
    """How long a merge that half of the workers are ready for waits for the others, in seconds."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120
    """Longest time without news of any worker, in seconds, before the run counts as failed."""

    @model_validator(mode="after")
    def _a_merge_ends_before_the_next(self) -> "StreamExchangeConfig":
        if self.overlap_steps >= self.local_steps:
            raise ValueError(
                f"overlap_steps ({self.overlap_steps}) is not below local_steps "
                f"({self.local_steps}); lower overlap_steps"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class AutoExchangeConfig:
    """The exchange that pays on the links and the computing time at hand."""

    type: Literal["auto"]
    """Measures both at the start, says what each alternative would cost, and picks one."""


ExchangeConfig = Annotated[
    DenseExchangeConfig
    | Delta4ExchangeConfig
    | Delta4AsyncExchangeConfig
    | StreamExchangeConfig
    | AutoExchangeConfig,
    Field(discriminator="type"),
]
