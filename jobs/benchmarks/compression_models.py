"""The models that `jobs.bench_compression` compares: pipelines over the demo's task.

Every quantization arm trains the same number of tokens from the same checkpoint: the float one, and
one through the rounding of each scheme. Students are cut out of the float one, and trained with its
help and without; those without get the steps that asking the teacher would have cost.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from r1ray.config import PipelineConfig, load_config
from r1ray.models import Decoder, ModelConfig

__all__ = [
    "NUM_PROBLEMS",
    "SEEDS",
    "STUDENT_STEPS",
    "Arm",
    "equal_compute_steps",
    "quantization_arms",
    "student_config",
]

NUM_PROBLEMS = 1000
SEEDS = (0, 1, 2)
STUDENT_STEPS = 2000
_CONFIG = "jobs/configs/demo.yaml"
_TRAINING = (
    "train.num_steps=100",
    "prepare.sources=[{type: tasks, num_samples: 2400}]",
)
_STUDENT = (
    "student={layers: [0, 3, 6, 10, 13, 16, 19, 22, 26, 29]}",  # 10 of 30
    "prepare.sources=[{type: tasks, num_samples: 6500}]",
    "train.batches_per_step=1",  # many small steps: what a cut-up model needs first
    "train.learning_rate=6e-4",
    "train.warmup_steps=100",
)


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
        return _configure(work, "quantization", *_TRAINING, *overrides)

    plain, four = configure(), "compress.scheme=w4a8"
    yield Arm("fp32", plain, is_compressed=False)
    yield Arm("bf16", plain, is_compressed=False, is_bf16=True)
    yield Arm("int8_ptq", plain, is_compressed=True)
    yield Arm("int8_qat", configure("train.fake_quant=w8a8"), is_compressed=True)
    yield Arm("w4a8_ptq", configure(four), is_compressed=True)
    yield Arm("w4a8_qat", configure("train.fake_quant=w4a8", four), is_compressed=True)
    yield Arm("codebook4", configure("compress.scheme=codebook4"), is_compressed=True)


def student_config(
    work: Path, teacher_dir: Path, *, has_teacher: bool, seed: int, num_steps: int
) -> PipelineConfig:
    """A student of the tuned model in `teacher_dir`, taught by it or by the targets alone."""
    overrides = [
        *_STUDENT,
        f"base.source={teacher_dir}",
        f"run.seed={seed}",
        f"train.num_steps={num_steps}",
    ]
    if has_teacher:
        resources = f"{{num_teachers: {len(os.sched_getaffinity(0))}}}"
        overrides.append(
            f"distill={{teacher: {teacher_dir}, ce_share: 0.5, resources: {resources}}}"
        )
    return _configure(work, "students", *overrides)


def equal_compute_steps(
    *,
    teacher: ModelConfig,
    student: ModelConfig,
    stored_tokens: int,
    trained_tokens: int,
    num_steps: int,
) -> int:
    """Steps without a teacher that take the operations of `num_steps` and of asking it.

    A forward takes 2 operations a parameter and token, a step 6; head and embedding are counted as
    the one product with the vocabulary that they are.
    """
    asking = 2 * _count(teacher) * stored_tokens
    training = 6 * _count(student) * trained_tokens
    return round(num_steps * (1 + asking / training))


def _count(shape: ModelConfig) -> int:
    with torch.device("meta"):
        model = Decoder(shape)
    return sum(parameter.numel() for parameter in model.parameters())


def _configure(work: Path, name: str, *overrides: str) -> PipelineConfig:
    settings = [
        f"run.root={work}",
        f"run.name={name}",
        f"evaluate.num_problems={NUM_PROBLEMS}",
        "train.resources.num_workers=1",
        f"train.resources.num_cpus_per_worker={len(os.sched_getaffinity(0))}",
    ]
    return load_config(_CONFIG, [*settings, *overrides])
