"""The configuration of the whole pipeline: one frozen dataclass per stage.

Every field states its unit and bounds. Where a stage runs (`resources`) is kept apart from what it
makes: `identity` leaves it out, so that a run is found again on another machine.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from r1ray.config.continual import ContinualConfig, UpdateConfig
from r1ray.config.distill import DistillConfig
from r1ray.config.fusion import FusionConfig
from r1ray.config.images import ImageLimits
from r1ray.config.names import ConfiguredPath, Name
from r1ray.config.prepare import PrepareConfig, TasksConfig
from r1ray.config.serving import ServeConfig, list_groups
from r1ray.config.training import TrainConfig

__all__ = [
    "BaseConfig",
    "CompressConfig",
    "ContextConfig",
    "EvaluateConfig",
    "ImageQuestionsConfig",
    "PipelineConfig",
    "RunConfig",
    "Scheme",
    "StudentConfig",
    "identity",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Scheme = Literal["w8a8", "w4a8", "codebook4"]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class RunConfig:
    """Where the artifacts go and what seeds everything random."""

    name: Name
    """Directory of the run below `root`."""
    root: ConfiguredPath = "runs"
    """Local directory or URI (such as s3://bucket/runs) of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds data order and sampling."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ContextConfig:
    """Positions beyond those that the checkpoint was trained on."""

    type: Literal["yarn", "dynamic"]
    """yarn: all positions are scaled; dynamic (NTK): longer sequences alone, dense attention."""
    factor: Annotated[float, Field(gt=1, le=128)]
    """Times the trained number of positions."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class BaseConfig:
    """The checkpoint that the run starts from."""

    source: ConfiguredPath
    """A checkpoint directory, a .gguf file, or package:NAME for the .gguf in a Python package."""
    context: ContextConfig | None = None
    """Scaling of rotary positions for longer contexts; null leaves them as the checkpoint has."""
    fusion: FusionConfig | None = None
    """What the model is to see images with, untrained at first; null for what the source has."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class StudentConfig:
    """A smaller model to train, cut out of the base; what is not named stays as it is."""

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Layers to keep, in their order; 0 is the first."""
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    """Channels of the residual stream to keep."""
    intermediate_size: Annotated[int, Field(ge=1)] | None = None
    """Neurons of every MLP to keep."""
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Key/value heads of every layer to keep, with their query heads."""

    @model_validator(mode="after")
    def _is_smaller(self) -> "StudentConfig":
        if all(getattr(self, field.name) is None for field in dataclasses.fields(self)):
            raise ValueError("nothing is named to be smaller; give layers or a width, or null")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class CompressConfig:
    """From the trained checkpoint to the served format."""

    scheme: Scheme = "w8a8"
    """w8a8: int8 weights and activations; w4a8: 4-bit weights; codebook4: 16 values a row."""
    rotate: bool = False
    """Round in another basis of the same function: INT8 loses less there; unties a tied head."""
    calibration_batches: Annotated[int, Field(ge=1, le=100_000)] = 32
    """codebook4: micro-batches whose gradients say which weights matter."""
    outlier_share: Annotated[float, Field(ge=0, le=0.1)] = 0.0045
    """codebook4: share of a matrix's weights that are kept as int8."""
    exports: list[Literal["compressed_tensors", "gguf"]] = dataclasses.field(default_factory=list)
    """Further copies for other programs: for transformers and vLLM, or for llama.cpp (Q8_0)."""

    @model_validator(mode="after")
    def _exports_differ(self) -> "CompressConfig":
        if len(set(self.exports)) < len(self.exports):
            raise ValueError(f"exports {self.exports} has one twice; name each once")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ImageQuestionsConfig:
    """Held-out questions about images, each with its one right answer."""

    paths: Annotated[list[ConfiguredPath], Field(min_length=1)]
    """Parquet files with the columns question, answer, one of images, and perhaps kind."""
    image_column: Annotated[str, Field(min_length=1, max_length=256)] = "image"
    """As in prepare.sources of type images."""
    limits: ImageLimits = ImageLimits()
    """Others are an error here."""
    num_questions: Annotated[int, Field(ge=1, le=1_000_000)] = 240
    """The first of them that are asked."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EvaluateConfig:
    """Held-out accuracy, perplexity, size and latency of base, tuned and INT8."""

    num_problems: Annotated[int, Field(ge=1, le=1_000_000)] = 240
    """Held-out problems over all families together."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest answer in tokens, the reasoning included."""
    max_concurrency: Annotated[int, Field(ge=1, le=1024)] = 48
    """Problems decoded together."""
    perplexity_tokens: Annotated[int, Field(ge=16, le=10_000_000)] = 2048
    """Tokens of English documentation that perplexity is measured on."""
    perplexity_window: Annotated[int, Field(ge=16, le=131_072)] = 1024
    """Context of the perplexity measurement in tokens."""
    latency_tokens: Annotated[int, Field(ge=4, le=4096)] = 32
    """Tokens decoded one at a time for the latency figures."""
    images: ImageQuestionsConfig | None = None
    """Questions about images that are asked besides; null for none."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class PipelineConfig:
    """Everything `python -m jobs.pipeline` reads, one section a stage."""

    run: RunConfig
    base: BaseConfig
    student: StudentConfig | None = None
    distill: DistillConfig | None = None
    tasks: TasksConfig
    prepare: PrepareConfig
    train: TrainConfig
    compress: CompressConfig
    evaluate: EvaluateConfig
    serve: ServeConfig
    continual: ContinualConfig | None = None
    update: UpdateConfig = UpdateConfig()

    @model_validator(mode="after")
    def _task_sources_name_families(self) -> "PipelineConfig":
        known = {family.name for family in self.tasks.families}
        for source in self.prepare.sources:
            named = set((source.families or ()) if source.type == "tasks" else ())
            if named - known:
                raise ValueError(
                    f"prepare.sources names the family {min(named - known)!r}, which is not in "
                    "tasks.families; add it there"
                )
        return self

    @model_validator(mode="after")
    def _a_sequence_trains_the_model(self) -> "PipelineConfig":
        train = self.train
        if self.continual is None:
            return self
        if any(source.type == "images" for source in self.prepare.sources):
            raise ValueError(
                "continual goes without sources of type images, which its reservoir does not "
                "keep; train on them in a run of their own"
            )
        others = (self.distill, train.gates, train.resources.tiers)
        if any(other is not None for other in others):
            raise ValueError(
                "continual goes without distill, train.gates and train.resources.tiers; leave "
                "them out, or continual"
            )
        if self.continual.ewc is not None and train.fake_quant_rotate:
            raise ValueError(
                "continual.ewc holds weights, which train.fake_quant_rotate has in another basis; "
                "leave one of them out"
            )
        if self.continual.lora is not None and train.fake_quant is not None:
            raise ValueError(
                f"continual.lora trains beside weights that train.fake_quant "
                f"({train.fake_quant}) would round alone; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _teachers_stay_out_of_budgets(self) -> "PipelineConfig":
        distill = self.distill
        if self.train.resources.tiers is None or distill is None:
            return self
        if distill.logits.type == "online" or distill.on_policy is not None:
            raise ValueError(
                "train.resources.tiers leave no room for a teacher in every worker; take "
                "distill.logits {type: stored} without on_policy"
            )
        return self

    @model_validator(mode="after")
    def _gates_learn_from_whole_sequences(self) -> "PipelineConfig":
        if self.train.gates is None:
            return self
        if self.prepare.batching.type == "packing" or self.distill is not None:
            raise ValueError(
                "train.gates goes with prepare.batching {type: buckets} and without distill; "
                "train the model first, and its gates in a run of their own"
            )
        return self

    @property
    def unfit_for_fusion(self) -> list[str]:
        """What is chosen here that models which see images cannot do."""
        groups = list_groups(self.serve).values()
        chosen = {
            "student": self.student is not None,
            "distill": self.distill is not None,
            "train.gates": self.train.gates is not None,
            "train.resources.tiers": self.train.resources.tiers is not None,
            "compress.rotate": self.compress.rotate,
            "compress.scheme: codebook4": self.compress.scheme == "codebook4",
            "compress.exports": bool(self.compress.exports),
            "budget_mib in serve": any(group.budget_mib for group in groups),
            "backend openvino in serve": any(group.backend == "openvino" for group in groups),
        }
        return [name for name, is_chosen in chosen.items() if is_chosen]

    @model_validator(mode="after")
    def _a_frozen_decoder_sees_images(self) -> "PipelineConfig":
        if self.train.freeze_decoder and not self.prepare.has_images:
            raise ValueError(
                "train.freeze_decoder trains what sees images alone, and prepare.sources has none; "
                "add a source of type images, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fusion_goes_with(self) -> "PipelineConfig":
        if self.base.fusion is not None and self.unfit_for_fusion:
            raise ValueError(
                f"base.fusion does not go with {self.unfit_for_fusion[0]}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_streams_int8(self) -> "PipelineConfig":
        for group in list_groups(self.serve).values():
            is_on_cpu = group.num_gpus_per_replica == 0
            if group.budget_mib is not None and is_on_cpu and self.compress.scheme != "w8a8":
                raise ValueError(
                    "serve.budget_mib goes with compress.scheme w8a8, not with "
                    f"{self.compress.scheme}, whose weights are decoded when they are loaded; "
                    "change one of them"
                )
        return self

    @model_validator(mode="after")
    def _on_policy_steps_are_steps(self) -> "PipelineConfig":
        on_policy = None if self.distill is None else self.distill.on_policy
        if on_policy is not None and on_policy.last_steps > self.train.num_steps:
            raise ValueError(
                f"distill.on_policy.last_steps ({on_policy.last_steps}) is above train.num_steps "
                f"({self.train.num_steps}); lower it"
            )
        return self

    @model_validator(mode="after")
    def _trained_for_the_served_scheme(self) -> "PipelineConfig":
        if self.train.fake_quant not in (None, self.compress.scheme):
            raise ValueError(
                f"train.fake_quant ({self.train.fake_quant}) is not compress.scheme "
                f"({self.compress.scheme}); serve what was trained for: change one of them"
            )
        through = self.train.fake_quant is not None
        if self.train.fake_quant_rotate != (through and self.compress.rotate):
            raise ValueError(
                f"train.fake_quant_rotate ({self.train.fake_quant_rotate}) with fake_quant "
                f"{self.train.fake_quant} is not compress.rotate ({self.compress.rotate}); serve "
                "what was trained for: change one of them (with train.resources.tiers, "
                "compress.rotate)"
            )
        return self


def identity(*sections: Any) -> dict[str, Any]:
    """The parts of `sections` that decide what a stage makes, as JSON values by class name."""
    merged: dict[str, Any] = {}
    for section in sections:
        values = dataclasses.asdict(section)
        values.pop("resources", None)
        merged[type(section).__name__] = values
    return merged
