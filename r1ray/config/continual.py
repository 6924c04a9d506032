"""How training on one data set after another keeps what the earlier ones taught."""

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

__all__ = [
    "AveragingConfig",
    "ContinualConfig",
    "EwcConfig",
    "LoraConfig",
    "ReplayConfig",
    "UpdateConfig",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ReplayConfig:
    """Samples of earlier data sets among those of the new one."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the samples trained on, those that are replayed."""
    reservoir_rows: Annotated[int, Field(ge=1, le=10_000_000)] = 4096
    """Samples kept of all data so far, each with the same chance."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EwcConfig:
    """Elastic weight consolidation: weights that earlier data sets need are held where they are."""

    strength: Annotated[float, Field(gt=0, le=1e12)] = 100.0
    """Factor of the penalty beside the mean loss of a target token."""
    fisher_batches: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Micro-batches that say, after training, how much each weight matters."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class LoraConfig:
    """Low-rank changes of the layers' linear maps are trained, and merged into them at the end."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Of the change of every matrix."""
    alpha: Annotated[float, Field(gt=0, le=10_000)] = 32.0
    """The change is scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class AveragingConfig:
    """Weights are averaged with those that training on this data set began with."""

    start_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the old ones in the average."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ContinualConfig:
    """The sources of `prepare` are learned one after the other, each from where the last ended."""

    replay: ReplayConfig | None = ReplayConfig()
    """Replay of earlier samples; null for none."""
    ewc: EwcConfig | None = None
    """A penalty on changing what mattered; null for none."""
    lora: LoraConfig | None = None
    """Low-rank training; null trains all weights."""
    averaging: AveragingConfig | None = None
    """Averaging of old and new weights; null keeps the new ones."""

    @model_validator(mode="after")
    def _one_restraint(self) -> "ContinualConfig":
        if self.ewc is not None and self.lora is not None:
            raise ValueError(
                "ewc and lora are both given; with lora the weights that ewc holds do not move: "
                "leave one of them out"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class UpdateConfig:
    """When `jobs.update` publishes what it has trained."""

    max_forgetting_points: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Points of accuracy that the new model may lose on any family of `tasks`."""
