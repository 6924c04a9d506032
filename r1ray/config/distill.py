"""What a student learns from a teacher, and how the teacher is asked."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from r1ray.config.names import ConfiguredPath

__all__ = [
    "DistillConfig",
    "DistillResources",
    "OnPolicyConfig",
    "OnlineLogitsConfig",
    "StoredLogitsConfig",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class StoredLogitsConfig:
    """The teacher runs once over the BatchSet, before training."""

    type: Literal["stored"]
    """Its likeliest tokens are kept on disk."""
    top_k: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tokens kept at each target; the mass of all others is one number."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class OnlineLogitsConfig:
    """The teacher runs beside the student, in every worker."""

    type: Literal["online"]
    """All its logits are used, and nothing is stored."""


LogitsConfig = Annotated[StoredLogitsConfig | OnlineLogitsConfig, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class OnPolicyConfig:
    """The student answers the prompts itself, and a teacher in every worker scores each token."""

    last_steps: Annotated[int, Field(ge=1)]
    """Optimizer steps at the end of training that are on-policy."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest answer that is sampled, in tokens."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Temperature that the student samples at."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class DistillResources:
    """Where the teacher's logits are stored."""

    num_cpus_per_teacher: Annotated[float, Field(gt=0, le=256)] = 1
    """CPUs that Ray reserves for one copy of the teacher; also its number of torch threads."""
    num_teachers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Copies of the teacher that work at once."""
    use_gpu: bool = False
    """One GPU for each."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class DistillConfig:
    """loss = ce_share · CE + (1 - ce_share) · T² · KL(teacher ‖ student), at temperature T."""

    teacher: ConfiguredPath
    """A checkpoint directory, a .gguf file, or package:NAME; its vocabulary is the base's."""
    logits: LogitsConfig = StoredLogitsConfig(type="stored")
    ce_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Weight of the cross-entropy with the targets themselves."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """T: above 1, less likely tokens count for more."""
    on_policy: OnPolicyConfig | None = None
    """A last part of training on the student's own answers; null leaves it out."""
    resources: DistillResources = DistillResources()
