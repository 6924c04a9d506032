"""The compression benchmark: its parts, each stored when it has been measured, and the record."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.compression_codebook import measure_tails, measure_uniform
from jobs.benchmarks.compression_exports import measure_exports
from jobs.benchmarks.compression_layers import measure_layers
from jobs.benchmarks.compression_measure import (
    compare_latency,
    heldout_batches,
    measure_answers,
    measure_costs,
)
from jobs.benchmarks.compression_models import (
    COSTS_AS,
    NUM_PROBLEMS,
    Arm,
    quantization_arms,
    seed_arms,
)
from jobs.benchmarks.compression_report import write_report
from jobs.benchmarks.compression_rows import NEEDS_GPU, OPTIONAL, build_rows
from jobs.benchmarks.compression_students import (
    SEEDS,
    STUDENT_STEPS,
    build_untrained,
    equal_compute_steps,
    train_student,
    train_teacher,
)
from jobs.benchmarks.parts import StoredParts
from jobs.cli import connected_to_ray
from r1ray.artifacts import Artifact
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ArtifactError
from r1ray.evaluation.record import build_record, describe_circumstances, write_json
from r1ray.models import load_model
from r1ray.models.quantization import quantize_modules
from r1ray.pipeline import Pipeline

__all__ = ["CompressionBenchmark"]

_TARGET = Path("docs/benchmarks")
_ELSEWHERE = _TARGET / "parts" / "compression"  # of other machines and days; nothing that is timed


class CompressionBenchmark:
    """What `jobs.bench_compression` measures; every result is kept in `work`.

    Args:
        budget_s: nothing new starts after so many seconds; None for no limit.
    """

    def __init__(self, work: Path, budget_s: float | None) -> None:
        self._work = work
        self._parts = StoredParts(work, _ELSEWHERE)
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._arms = {arm.name: arm for arm in quantization_arms(work)}
        self._batches: list[MicroBatch] | None = None

    def run(self, parts: Sequence[str] | None) -> None:
        """Measure what is missing of `parts`, or of all, until the budget ends."""
        for name, measure in self._plan(parts):
            if self._parts.has(name):
                continue
            if parts is None and name.startswith(NEEDS_GPU) and not torch.cuda.is_available():
                print(f"{name} is left out: hours without a GPU; --only distillation trains it")
                continue
            if self._deadline is not None and time.monotonic() > self._deadline:
                print(f"the budget is spent; {name} and what follows is left")
                return
            print(f"bench_compression: {name}", flush=True)
            self._parts.store(name, {"circumstances": describe_circumstances(), **measure()})

    def file_record(self, command: str) -> str:
        """Write the record, its tables and the plots; returns the table of the record's rows.

        Raises:
            ArtifactError: a part was not measured, or with uncommitted changes.
        """
        plan = [name for name, _ in self._plan(None)]
        results = {
            name: self._parts.read(name)
            for name in plan
            if self._parts.has(name) or not name.startswith(OPTIONAL)
        }
        rows = build_rows(results)
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record("compression", command, rows, self._parts.circumstances())
        write_json(_TARGET / "compression.json", {**record, "parts": _without_answers(results)})
        return write_report(record, rows, results, _TARGET)

    def _plan(self, parts: Sequence[str] | None) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        """(name of a result, what measures it) of these parts, or of all."""
        plan: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
            *(
                ("quantization", f"quantization_{name}", lambda arm=arm: self._answers(arm))
                for name, arm in self._arms.items()
            ),
            ("uniform", "uniform", self._uniform),
            *(
                ("costs", f"costs_{name}", lambda arm=arm: self._costs(arm))
                for name, arm in self._arms.items()
                if name not in COSTS_AS
            ),
            ("latency", "latency", self._latency),
            ("tails", "tails", self._tails),
            ("layers", "layers_train", lambda: measure_layers("train")),
            ("layers", "layers_serve", lambda: measure_layers("serve")),
            ("exports", "exports", self._exports),
            *(
                ("seeds", f"quantization_{arm.name}", lambda arm=arm: self._answers(arm))
                for arm in seed_arms(self._work)
            ),
            ("distillation", "teacher", self._teacher),
            *(
                ("distillation", f"{kind}_{seed}", lambda measure=measure, seed=seed: measure(seed))
                for seed in SEEDS
                for kind, measure in (("student", self._student), ("untaught", self._untaught))
            ),
        ]
        return [(name, measure) for part, name, measure in plan if parts is None or part in parts]

    def _answers(self, arm: Arm) -> dict[str, Any]:
        made = self._make(arm)
        agreement = {
            name: value
            for name, value in made.manifest.metrics.items()
            if name == "max_fake_quant_difference"
        }
        return {**measure_answers(arm, made.local_dir, self._heldout()), **agreement}

    def _costs(self, arm: Arm) -> dict[str, Any]:
        plain = self._make(self._arms["fp32"])
        return measure_costs(arm, self._make(arm).local_dir, plain.local_dir)

    def _uniform(self) -> dict[str, Any]:
        plain = self._arms["fp32"]
        with connected_to_ray():
            pipeline = Pipeline(plain.config)
            trained, prepared = pipeline.train(), pipeline.prepare()
        return measure_uniform(
            trained.local_dir, prepared.local_dir, self._arms["codebook4"].config, self._heldout()
        )

    def _teacher(self) -> dict[str, Any]:
        """SmolLM2 tuned in this process, which is also where its students learn."""
        base = BaseFiles(self._work, self._arms["fp32"].config.base.source).base()
        return train_teacher(base, self._work / "teacher", NUM_PROBLEMS)

    def _student(self, seed: int) -> dict[str, Any]:
        """One seed, taught, in float and INT8."""
        return self._train_student(f"student_{seed}", seed, STUDENT_STEPS, has_teacher=True)

    def _untaught(self, seed: int) -> dict[str, Any]:
        """One seed, trained on the targets alone for as much work as the taught one was."""
        teacher_dir = self._teacher_dir()
        student = build_untrained(teacher_dir)
        num_steps = equal_compute_steps(load_model(teacher_dir), student, STUDENT_STEPS)
        return self._train_student(f"untaught_{seed}", seed, num_steps, has_teacher=False)

    def _train_student(
        self, name: str, seed: int, num_steps: int, *, has_teacher: bool
    ) -> dict[str, Any]:
        return train_student(
            self._teacher_dir(),
            self._work / name,
            has_teacher=has_teacher,
            seed=seed,
            num_steps=num_steps,
            num_problems=NUM_PROBLEMS,
        )

    def _teacher_dir(self) -> Path:
        directory = self._work / "teacher"
        if not directory.exists():
            raise ArtifactError(
                f"{directory} is not there: the teacher was measured on another machine; remove "
                f"{_ELSEWHERE} to train it and its students here"
            )
        return directory

    def _latency(self) -> dict[str, Any]:
        """Of a student as it is cut: what a token costs does not depend on the weights' values."""
        teacher_dir = self._make(self._arms["fp32"]).local_dir
        models = {
            "teacher_fp32": load_model(teacher_dir),
            "teacher_int8": load_model(self._make(self._arms["int8_ptq"]).local_dir),
            "student_fp32": build_untrained(teacher_dir),
            "student_int8": build_untrained(teacher_dir),
        }
        quantize_modules(models["student_int8"])
        return compare_latency(models, teacher_dir, self._arms["fp32"].config)

    def _tails(self) -> dict[str, Any]:
        """Between the tuned model and what four bits leave of it, a student that has lost some."""
        teacher, student = (self._make(self._arms[name]) for name in ("fp32", "w4a8_ptq"))
        return measure_tails(teacher.local_dir, student.local_dir, self._heldout())

    def _exports(self) -> dict[str, Any]:
        return measure_exports(self._make(self._arms["int8_ptq"]).local_dir, self._work / "exports")

    def _make(self, arm: Arm) -> Artifact:
        with connected_to_ray():
            pipeline = Pipeline(arm.config)
            return pipeline.compress() if arm.is_compressed else pipeline.train()

    def _heldout(self) -> list[MicroBatch]:
        if self._batches is None:
            plain = self._arms["fp32"]
            with connected_to_ray():
                base = Pipeline(plain.config).base()
            self._batches = heldout_batches(plain.config, base.local_dir, self._work / "heldout")
        return self._batches


def _without_answers(value: Any) -> Any:
    """`value` without the lists of thousands of booleans in it."""
    if isinstance(value, dict):
        return {
            name: _without_answers(item) for name, item in value.items() if name != "is_correct"
        }
    return value
