"""The students of `jobs.bench_compression`: taught by the tuned model, and by the targets alone.

1. The teacher is SmolLM2, tuned as the demo does it.
2. A student is ten of its layers. Taught, it learns from the targets and from all of the teacher's
   logits, which runs beside it; untaught, from the targets, for as many more steps as asking the
   teacher would have cost.
3. All of them answer the same problems; the taught one also in INT8.

Everything runs in this process (`jobs.benchmarks.local_training`): minutes a student on a GPU,
hours on two cores.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.compression_measure import task_perplexity
from jobs.benchmarks.exchange_data import tokenize_problems
from jobs.benchmarks.local_training import batch_by_length, pick_device, save_trained, train_steps
from r1ray.config import PipelineConfig, load_config
from r1ray.config.distill import DistillConfig, OnlineLogitsConfig
from r1ray.config.schema import StudentConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.data.reasoning import draw_heldout, draw_training
from r1ray.evaluation.accuracy import answer_problems
from r1ray.models import Decoder, load_model
from r1ray.models.quantization import quantize_modules
from r1ray.models.student import build_student
from r1ray.models.tokenizer import Tokenizer
from r1ray.training.objective import OnlineDistillation

__all__ = [
    "SEEDS",
    "STUDENT_STEPS",
    "build_untrained",
    "equal_compute_steps",
    "train_student",
    "train_teacher",
]

SEEDS = (0, 1, 2)
STUDENT_STEPS = 2000
_CONFIG = "jobs/configs/demo.yaml"
_STUDENT = StudentConfig(layers=[0, 3, 6, 10, 13, 16, 19, 22, 26, 29])  # 10 of 30
_TEACHER_SAMPLES, _TEACHER_STEPS = 2_400, 100
_TEACHER_BATCH = 1_536  # tokens of a step, as in the demo
_SAMPLES = 13_000
_BATCH = 4_096  # tokens of a step, padding included
_WARMUP_STEPS = 100
_CONCURRENCY = 256


def train_teacher(base_dir: Path, target: Path, num_problems: int) -> dict[str, Any]:
    """Tune the base model as the demo does, write it to `target`, and judge it."""
    config = _config(f"train.num_steps={_TEACHER_STEPS}")
    batches = _draw_batches(
        base_dir,
        config,
        _TEACHER_SAMPLES,
        _TEACHER_BATCH,
        seed=0,
        num_batches=_TEACHER_STEPS,
    )
    model = load_model(base_dir, dtype=torch.float32).to(pick_device())
    steps = train_steps(model, config.train, batches)
    judged = _judge(model, base_dir, config, num_problems)
    save_trained(model, base_dir, target)
    return {"arms": {"teacher": judged}, "tokens": steps[-1]["tokens"]}


def train_student(
    teacher_dir: Path,
    target: Path,
    *,
    has_teacher: bool,
    seed: int,
    num_steps: int,
    num_problems: int,
) -> dict[str, Any]:
    """Train a student, write it to `target`, and judge it; the taught one also in INT8."""
    config = _config(
        f"train.num_steps={num_steps}",
        "train.learning_rate=8e-4",
        f"train.warmup_steps={_WARMUP_STEPS}",
    )
    batches = _draw_batches(teacher_dir, config, _SAMPLES, _BATCH, seed=seed, num_batches=num_steps)
    teacher = load_model(teacher_dir, dtype=torch.float32)
    student = build_student(teacher, _STUDENT).to(pick_device())
    objective = None
    if has_teacher:
        teaching = DistillConfig(
            teacher=str(teacher_dir), logits=OnlineLogitsConfig(type="online"), ce_share=0.5
        )
        objective = OnlineDistillation(teaching, teacher.to(pick_device()).eval())
    steps = train_steps(student, config.train, batches, objective)
    arms = {"kd" if has_teacher else "sft": _judge(student, teacher_dir, config, num_problems)}
    save_trained(student, teacher_dir, target)
    if has_teacher:
        quantize_modules(student)
        arms["kd_int8"] = _judge(student.to(pick_device()), teacher_dir, config, num_problems)
    return {"arms": arms, "tokens": steps[-1]["tokens"], "steps": num_steps}


def _judge(
    model: Decoder, tokenizer_dir: Path, config: PipelineConfig, num_problems: int
) -> dict[str, Any]:
    """Which held-out problems `model` solves, and its perplexity on their own traces."""
    model.eval()
    problems = draw_heldout(config.tasks, num_problems)
    tokenizer = Tokenizer(tokenizer_dir)
    samples = tokenize_problems(tokenizer, problems, config)
    device = model.model.norm.weight.device
    batches = [batch.to(device) for batch in batch_by_length(samples, _BATCH)]
    answers = answer_problems(
        model,
        tokenizer,
        problems,
        config.tasks.system_prompt,
        max_new_tokens=config.evaluate.max_new_tokens,
        max_concurrency=_CONCURRENCY,
        on_finish=lambda _: None,
    )
    is_correct = [answer.is_correct for answer in answers]
    print(f"  {sum(is_correct)} of {len(is_correct)} solved", flush=True)
    return {"is_correct": is_correct, "task_perplexity": task_perplexity(model, batches)}


def build_untrained(teacher_dir: Path) -> Decoder:
    """A student as it is cut out of its teacher."""
    return build_student(load_model(teacher_dir, dtype=torch.float32), _STUDENT)


def equal_compute_steps(teacher: Decoder, student: Decoder, num_steps: int) -> int:
    """Steps without a teacher that take the operations of `num_steps` and of asking it.

    A forward takes 2 operations a parameter and token, a step 6; head and embedding are counted as
    the one product with the vocabulary that they are.
    """
    asking, training = (
        times * sum(parameter.numel() for parameter in model.parameters())
        for times, model in ((2, teacher), (6, student))
    )
    return round(num_steps * (1 + asking / training))


def _config(*overrides: str) -> PipelineConfig:
    precision = "bf16" if torch.cuda.is_available() else "auto"
    one_batch = ("train.batches_per_step=1", "train.resources.num_workers=1")
    return load_config(_CONFIG, [f"train.precision={precision}", *one_batch, *overrides])


def _draw_batches(
    tokenizer_dir: Path,
    config: PipelineConfig,
    num_samples: int,
    most: int,
    *,
    seed: int,
    num_batches: int,
) -> Sequence[MicroBatch]:
    """Enough batches for all steps; every pass over the samples puts others together."""
    problems = draw_training(config.tasks, num_samples, draw_heldout(config.tasks, 1000))
    samples = tokenize_problems(Tokenizer(tokenizer_dir), problems, config)
    order = random.Random(seed)
    batches: list[MicroBatch] = []
    while len(batches) < num_batches:
        order.shuffle(samples)
        batches += batch_by_length(samples, most)
    return batches
