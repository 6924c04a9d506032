"""How a model is trained, where, and how it survives failures."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from r1ray.config.exchange import DenseExchangeConfig, ExchangeConfig
from r1ray.config.names import ConfiguredPath

__all__ = ["GatesConfig", "TiersConfig", "TrainConfig", "TrainResources"]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class TiersConfig:
    """Layered memory on a CPU: what does not fit the budget is streamed from files, layer by layer.

    Gradients and optimizer state are in files, and a static layer's forward is repeated.
    """

    budget_mib: Annotated[int, Field(ge=1, le=2**24)]
    """What resident memory may grow by in a worker, in MiB, checked as training goes."""
    directory: ConfiguredPath | None = None
    """On a disk with 16 bytes a parameter and worker free; null: the system's temporary one."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class TrainResources:
    """Where `train` runs and how it survives failures."""

    num_workers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ray Train workers, one model replica each."""
    num_cpus_per_worker: Annotated[float, Field(gt=0, le=256)] = 1
    """CPUs that Ray reserves for one worker; also its number of torch threads."""
    use_gpu: bool = False
    """One GPU per worker."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints: the most that a failure can lose."""
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    """Worker failures survived before the run gives up."""
    timeout_s: Annotated[float, Field(ge=5, le=3600)] = 120
    """Longest wait for a collective before the worker counts as failed."""
    tiers: TiersConfig | None = None
    """Layered memory; null keeps everything in memory."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class GatesConfig:
    """Train the gates of block-sparse attention, and nothing else; the model stays as it is."""

    num_units: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Blocks of 64 queries, of each micro-batch, whose attention gates learn from."""
    exact_heads: Annotated[float, Field(ge=0, le=1)] = 0.075
    """Share of all layers' heads that choose by the keys themselves: those that miss most."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class TrainConfig:
    """Full fine-tuning with AdamW on the target tokens."""

    num_steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Optimizer steps; the BatchSet is repeated, reshuffled, as often as needed."""
    batches_per_step: Annotated[int, Field(ge=1, le=65_536)] = 2
    """Micro-batches summed over all workers into one step; a multiple of num_workers."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """Peak learning rate."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak that the cosine ends at."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay on matrices."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean gradient per step."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the mean squared gradient per step."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Global gradient norm that larger ones are scaled down to."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype of matmuls; auto is what the hardware multiplies: bf16, fp16, else fp32."""
    precision_policy: Literal["range", "threshold", "none"] = "range"
    """range: loss scaling, and fp32 for groups it cannot help; threshold: fp32 where |g| > 6."""
    fake_quant: Literal["w8a8", "w4a8"] | None = None
    """Train through the rounding of this scheme (quantization-aware); null trains in float."""
    fake_quant_start_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps that train in float before fake_quant begins."""
    fake_quant_rotate: bool = False
    """Train through the rounding in the basis of compress.rotate, which has to be on as well."""
    gates: GatesConfig | None = None
    """Train the gates of block-sparse attention; null trains the model."""
    freeze_decoder: bool = False
    """Train what sees images (base.fusion), and nothing else."""
    exchange: ExchangeConfig = DenseExchangeConfig(type="dense")
    resources: TrainResources = TrainResources()

    @model_validator(mode="after")
    def _tiers_are_dense(self) -> "TrainConfig":
        if self.resources.tiers is None:
            return self
        if self.exchange != DenseExchangeConfig(type="dense") or self.precision != "fp32":
            raise ValueError(
                f"resources.tiers go with exchange {{type: dense}} and precision fp32, not with "
                f"{self.exchange.type} and {self.precision}; change them or leave tiers out"
            )
        if self.resources.use_gpu:
            raise ValueError("resources.tiers are for CPUs; set resources.use_gpu: false")
        if self.fake_quant_start_share:
            raise ValueError(
                f"resources.tiers train through the rounding from the first step on; leave "
                f"fake_quant_start_share ({self.fake_quant_start_share}) out"
            )
        return self

    @model_validator(mode="after")
    def _only_rounding_is_rotated(self) -> "TrainConfig":
        if self.fake_quant_rotate and (self.fake_quant is None or self.resources.tiers is not None):
            raise ValueError(
                "fake_quant_rotate goes with fake_quant, and without resources.tiers, which leave "
                "no room for the rotated weights; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _rounding_begins_somewhere(self) -> "TrainConfig":
        if self.fake_quant_start_share and self.fake_quant is None:
            raise ValueError(
                f"fake_quant_start_share ({self.fake_quant_start_share}) without fake_quant does "
                "nothing; set fake_quant: w8a8, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _gates_train_alone(self) -> "TrainConfig":
        others = self.fake_quant is not None or self.resources.tiers is not None
        if self.gates is not None and (others or self.precision != "fp32"):
            raise ValueError(
                "gates are trained beside a model that does not change: set precision: fp32, and "
                "leave fake_quant and resources.tiers out"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_batches(self) -> "TrainConfig":
        if self.batches_per_step % self.resources.num_workers:
            raise ValueError(
                f"batches_per_step ({self.batches_per_step}) is not a multiple of "
                f"resources.num_workers ({self.resources.num_workers}); change one of them"
            )
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) is not below num_steps ({self.num_steps}); "
                "lower warmup_steps"
            )
        return self
