"""The models that `jobs.bench_compression` compares: pipelines over the demo's task.

Every quantization arm trains the same number of tokens from the same checkpoint: the float one, and
one through the rounding of each scheme. Rotated arms are rounded in another basis of the residual
stream (`compress.rotate`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1ray.config import PipelineConfig, load_config

__all__ = ["COSTS_AS", "NUM_PROBLEMS", "Arm", "quantization_arms", "seed_arms"]

NUM_PROBLEMS = 1000
COSTS_AS = {
    "int8_qat": "int8_ptq_rotated",
    "int8_qat_unrotated": "int8_ptq",
    "w4a8_qat": "w4a8_ptq",
}
"""Arms that cost what another does: the same operators and shapes, whatever the weights hold."""
_MORE_SEEDS = (1, 2)
_CONFIG = "jobs/configs/demo.yaml"
_TRAINING = (
    "train.num_steps=100",
    "prepare.sources=[{type: tasks, num_samples: 2400}]",
)
# Eight bits lose little after training: through all of it, they lose more (docs/experiments.md).
_THROUGH_INT8 = ("train.fake_quant=w8a8", "train.fake_quant_start_share=0.7")
_ROTATED = "compress.rotate=true"
_THROUGH_ROTATED_INT8 = (*_THROUGH_INT8, "train.fake_quant_rotate=true", _ROTATED)


@dataclass(frozen=True)
class Arm:
    """One model.

    Attributes:
        config: of the pipeline that makes it.
        is_compressed: whether it is what `compress` makes, or what `train` makes.
        is_bf16: whether a float model is run in bf16.
    """

    name: str
    config: PipelineConfig
    is_compressed: bool
    is_bf16: bool = False


def quantization_arms(work: Path) -> Iterator[Arm]:
    """Float, and every scheme after and through training."""

    def configure(*overrides: str) -> PipelineConfig:
        return _configure(work, *_TRAINING, *overrides)

    plain, four = configure(), "compress.scheme=w4a8"
    yield Arm("fp32", plain, is_compressed=False)
    yield Arm("bf16", plain, is_compressed=False, is_bf16=True)
    yield Arm("int8_ptq", plain, is_compressed=True)
    yield Arm("int8_ptq_rotated", configure(_ROTATED), is_compressed=True)
    yield Arm("int8_qat", configure(*_THROUGH_ROTATED_INT8), is_compressed=True)
    yield Arm("int8_qat_unrotated", configure(*_THROUGH_INT8), is_compressed=True)
    yield Arm("w4a8_ptq", configure(four), is_compressed=True)
    yield Arm("w4a8_ptq_rotated", configure(_ROTATED, four), is_compressed=True)
    yield Arm("w4a8_qat", configure("train.fake_quant=w4a8", four), is_compressed=True)
    yield Arm("codebook4", configure("compress.scheme=codebook4"), is_compressed=True)


def seed_arms(work: Path) -> Iterator[Arm]:
    """Float and INT8 through training, of further seeds: one run says little to a point."""
    for seed in _MORE_SEEDS:
        one = (*_TRAINING, f"run.seed={seed}")
        yield Arm(f"fp32.seed_{seed}", _configure(work, *one), is_compressed=False)
        for name, overrides in (
            ("int8_qat", _THROUGH_ROTATED_INT8),
            ("int8_qat_unrotated", _THROUGH_INT8),
        ):
            config = _configure(work, *one, *overrides)
            yield Arm(f"{name}.seed_{seed}", config, is_compressed=True)


def _configure(work: Path, *overrides: str) -> PipelineConfig:
    settings = [
        f"run.root={work}",
        "run.name=quantization",
        f"evaluate.num_problems={NUM_PROBLEMS}",
        "train.resources.num_workers=1",
        f"train.resources.num_cpus_per_worker={len(os.sched_getaffinity(0))}",
    ]
    return load_config(_CONFIG, [*settings, *overrides])
