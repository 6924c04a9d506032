"""What serves a model: engines, how many there are, and the endpoint in front of them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from r1ray.config.images import ImageLimits
from r1ray.config.names import ConfiguredPath, Name

__all__ = [
    "AttentionKind",
    "BackendKind",
    "DeviceKind",
    "EngineConfig",
    "GroupConfig",
    "ModelArgs",
    "ReplicaConfig",
    "ServeConfig",
    "list_groups",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
AttentionKind = Literal["auto", "dense", "sparse"]
BackendKind = Literal["native", "openvino"]
DeviceKind = Literal["auto", "cpu", "cuda", "intel_gpu", "intel_npu"]
_DEVICES: dict[BackendKind, Sequence[DeviceKind]] = {
    "native": ("auto", "cpu", "cuda"),
    "openvino": ("auto", "cpu", "intel_gpu", "intel_npu"),
}


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ReplicaConfig:
    """Replicas of one kind: how many, on what, and what each takes."""

    backend: BackendKind = "native"
    """native: our own kernels, or torch; openvino: OpenVINO, which attends densely."""
    device: DeviceKind = "auto"
    """auto: the GPU that Ray gives a replica, else its CPUs; intel_*: with backend openvino."""
    num_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Engine replicas; with max_replicas, the fewest."""
    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """The most replicas, started where tokens wait; null for always num_replicas."""
    tokens_per_replica: Annotated[int, Field(ge=1)] = 4096
    """With max_replicas: tokens yet to be read or written that are one replica's work."""
    num_cpus_per_replica: Annotated[float, Field(gt=0, le=256)] = 1
    """CPUs that Ray reserves for one replica; also its number of threads."""
    num_gpus_per_replica: Annotated[float, Field(ge=0, le=8)] = 0
    """GPUs that Ray reserves for one replica."""
    resources_per_replica: dict[Name, Annotated[float, Field(gt=0, le=1_000_000)]] = (
        dataclasses.field(default_factory=dict)
    )
    """Other resources of Ray's that it reserves for one replica, such as {NPU: 1}."""
    max_concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests decoded together in one replica."""
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests waiting in one replica before further ones are answered 429."""
    kv_cache: Literal["float", "int8"] = "float"
    """How keys and values are kept: as the weights' floating point, or in a quarter of float32."""
    kv_cache_mib: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Memory for keys and values; null for max_concurrency requests of max_context_tokens each."""
    budget_mib: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """What a replica may take of memory (of the GPU's, for its weights); the rest is streamed."""

    @property
    def max_open_requests(self) -> int:
        """In one replica, running and waiting; further ones are answered 429."""
        return self.max_concurrency + self.max_queued_requests

    @model_validator(mode="after")
    def _grows(self) -> "ReplicaConfig":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below num_replicas ({self.num_replicas}); "
                "raise it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _runs_on_its_device(self) -> "ReplicaConfig":
        if self.device not in (known := _DEVICES[self.backend]):
            raise ValueError(
                f"backend {self.backend} runs on {', '.join(known)}, not on device {self.device}; "
                "change one of them"
            )
        if self.device == "cuda" and not self.num_gpus_per_replica:
            raise ValueError("device cuda needs num_gpus_per_replica above 0; raise it")
        is_idle = self.device == "cpu" or (self.backend, self.device) == ("openvino", "auto")
        if is_idle and self.num_gpus_per_replica:
            raise ValueError(
                f"num_gpus_per_replica ({self.num_gpus_per_replica:g}) would be idle: backend "
                f"{self.backend} with device {self.device} computes on CPUs; change one of them"
            )
        if self.backend == "openvino" and self.budget_mib is not None:
            raise ValueError(
                f"budget_mib ({self.budget_mib}) goes with backend native, which streams weights; "
                "leave it out"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class GroupConfig(ReplicaConfig):
    """Some of a model's replicas, all of one kind; other groups may be of other kinds."""

    name: Name
    """Of the group, in metrics and in Serve's deployment."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EngineConfig(ReplicaConfig):
    """The engines of one model; each runs in a replica of its own."""

    model_name: Name
    """The name that requests carry in `model`."""
    groups: list[GroupConfig] = dataclasses.field(default_factory=list)
    """Replicas of several kinds, in place of the fields beside this one that a group has, too."""
    max_context_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Prompt and answer of one request together."""
    max_step_tokens: Annotated[int, Field(ge=64, le=1_048_576)] = 1024
    """Tokens that one step computes at most."""
    max_step_ms: Annotated[float, Field(gt=0, le=60_000)] = 75
    """How long a prompt being read may delay the others' next tokens, if 64 of its tokens fit."""
    attention: AttentionKind = "auto"
    """auto: block-sparse beyond 2,048 tokens if the model has gates; sparse: without them, too."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600
    """How long a request may be in a replica, waiting included; then it ends with an error."""
    images: ImageLimits = ImageLimits()
    """What images of a request may be, where the model sees any."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 60
    """How long a replica that is to stop may take for the answers it has begun."""

    @model_validator(mode="after")
    def _groups_say_it_all(self) -> "EngineConfig":
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups {names} have a name twice; give each its own")
        for field in dataclasses.fields(ReplicaConfig) if names else ():
            value = getattr(self, field.name)
            if value != getattr(ReplicaConfig(), field.name):
                raise ValueError(
                    f"{field.name} ({value}) beside groups is nobody's; move it into a group"
                )
        return self

    @model_validator(mode="after")
    def _attends_as_it_can(self) -> "EngineConfig":
        kinds = {group.backend for group in self.groups} or {self.backend}
        if self.attention == "sparse" and "openvino" in kinds:
            raise ValueError(
                "attention sparse goes with backend native; openvino attends densely: change one "
                "of them"
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


Engines = TypeVar("Engines", bound=EngineConfig)


def list_groups(config: Engines) -> dict[str | None, Engines]:
    """Every group's replicas as if they were the model's only ones; None names the only group."""
    if not config.groups:
        return {None: config}
    fields = [field.name for field in dataclasses.fields(ReplicaConfig)]
    return {
        group.name: dataclasses.replace(
            config, groups=[], **{name: getattr(group, name) for name in fields}
        )
        for group in config.groups
    }
