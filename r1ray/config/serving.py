"""What serves a model: engines, how many there are, and the endpoint in front of them."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from r1ray.config.images import ImageLimits
from r1ray.config.names import ConfiguredPath, Name

__all__ = ["AttentionKind", "EngineConfig", "ModelArgs", "ServeConfig"]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
AttentionKind = Literal["auto", "dense", "sparse"]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EngineConfig:
    """The engines of one model; each runs in a replica of its own."""

    model_name: Name
    """The name that requests carry in `model`."""
    num_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Engine replicas; with max_replicas, the fewest."""
    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """The most replicas, started where tokens wait; null for always num_replicas."""
    tokens_per_replica: Annotated[int, Field(ge=1)] = 4096
    """With max_replicas: tokens yet to be read or written that are one replica's work."""
    num_cpus_per_replica: Annotated[float, Field(gt=0, le=256)] = 1
    """CPUs that Ray reserves for one replica; also its number of torch threads."""
    num_gpus_per_replica: Annotated[float, Field(ge=0, le=8)] = 0
    """GPUs that Ray reserves for one replica."""
    max_concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests decoded together in one replica."""
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests waiting in one replica before further ones are answered 429."""
    max_context_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Prompt and answer of one request together."""
    max_step_tokens: Annotated[int, Field(ge=64, le=1_048_576)] = 1024
    """Tokens that one step computes at most."""
    max_step_ms: Annotated[float, Field(gt=0, le=60_000)] = 75
    """How long a prompt being read may delay the others' next tokens, if 64 of its tokens fit."""
    attention: AttentionKind = "auto"
    """auto: block-sparse beyond 2,048 tokens if the model has gates; sparse: without them, too."""
    kv_cache: Literal["float", "int8"] = "float"
    """How keys and values are kept: as the weights' floating point, or in a quarter of float32."""
    kv_cache_mib: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Memory for keys and values; null for max_concurrency requests of max_context_tokens each."""
    budget_mib: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """What a replica may take of memory (of the GPU's, for its weights); the rest is streamed."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600
    """How long a request may take, waiting included; it is ended with an error then."""
    images: ImageLimits = ImageLimits()
    """What images of a request may be, where the model sees any."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 60
    """How long a replica that is to stop may take for the answers it has begun."""

    @model_validator(mode="after")
    def _grows(self) -> "EngineConfig":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below num_replicas ({self.num_replicas}); "
                "raise it, or leave it out"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ModelArgs(EngineConfig):
    """A model of a Serve application."""

    model_dir: ConfiguredPath
    """Model directory, at the same absolute path on every node that runs a replica."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ServeConfig(EngineConfig):
    """The OpenAI-compatible endpoint of the model that the pipeline makes."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; loopback unless the network in front of it is trusted."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    """TCP port."""
    playground: bool = True
    """Whether a web page at / lets people chat with the model."""
