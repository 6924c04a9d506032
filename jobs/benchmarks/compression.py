"""The compression benchmark: its parts, each stored when it has been measured, and the record."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks.compression_codebook import measure_tails, measure_uniform
from jobs.benchmarks.compression_exports import measure_exports
from jobs.benchmarks.compression_layers import measure_layers
from jobs.benchmarks.compression_measure import (
    compare_latency,
    heldout_batches,
    measure_arm,
)
from jobs.benchmarks.compression_models import (
    SEEDS,
    STUDENT_STEPS,
    Arm,
    equal_compute_steps,
    quantization_arms,
    student_config,
)
from jobs.benchmarks.compression_report import write_report
from jobs.benchmarks.compression_rows import OPTIONAL, build_rows
from jobs.cli import connected_to_ray
from r1ray.artifacts import Artifact
from r1ray.config import PipelineConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ArtifactError
from r1ray.evaluation.record import build_record, describe_circumstances, write_json
from r1ray.models import ModelConfig
from r1ray.pipeline import Pipeline

__all__ = ["CompressionBenchmark"]

_TARGET = Path("docs/benchmarks")


class CompressionBenchmark:
    """What `jobs.bench_compression` measures; every result is kept in `work`.

    Args:
        budget_s: nothing new starts after so many seconds; None for no limit.
    """

    def __init__(self, work: Path, budget_s: float | None) -> None:
        self._work = work
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._arms = {arm.name: arm for arm in quantization_arms(work)}
        self._batches: list[MicroBatch] | None = None

    def run(self, parts: Sequence[str] | None) -> None:
        """Measure what is missing of `parts`, or of all, until the budget ends."""
        for name, measure in self._plan(parts):
            if self._path(name).exists():
                continue
            if self._deadline is not None and time.monotonic() > self._deadline:
                print(f"the budget is spent; {name} and what follows is left")
                return
            print(f"bench_compression: {name}", flush=True)
            result = {"circumstances": describe_circumstances(), **measure()}
            partial = self._path(name).with_suffix(".tmp")
            write_json(partial, result)
            partial.rename(self._path(name))

    def file_record(self, command: str) -> str:
        """Write the record, its tables and the plots; returns the table of the record's rows.

        Raises:
            ArtifactError: a part was measured with uncommitted changes.
        """
        plan = [name for name, _ in self._plan(None)]
        results = {
            name: self._read(name)
            for name in plan
            if self._path(name).exists() or not name.startswith(OPTIONAL)
        }
        first = next(iter(results.values()))["circumstances"]
        commits = sorted({str(item["circumstances"]["commit"]) for item in results.values()})
        if changed := [commit for commit in commits if commit.endswith("+")]:
            raise ArtifactError(
                f"parts were measured with uncommitted changes ({', '.join(changed)}); commit, "
                f"remove them from {self._work}, and run the benchmark again"
            )
        rows = build_rows(results)
        circumstances = {**first, "commits_of_parts": commits}
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record("compression", command, rows, circumstances)
        write_json(_TARGET / "compression.json", {**record, "parts": _without_answers(results)})
        return write_report(record, rows, results, _TARGET)

    def _plan(self, parts: Sequence[str] | None) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        """(name of a result, what measures it) of these parts, or of all."""
        plan: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
            *(
                ("quantization", f"quantization_{name}", lambda arm=arm: self._measure_arm(arm))
                for name, arm in self._arms.items()
            ),
            ("uniform", "uniform", self._uniform),
            ("distillation", "student_0", lambda: self._student(0)),
            ("distillation", "latency", self._latency),
            ("tails", "tails", self._tails),
            ("layers", "layers_train", lambda: measure_layers("train")),
            ("layers", "layers_serve", lambda: measure_layers("serve")),
            ("exports", "exports", self._exports),
            ("distillation", "untaught_0", lambda: self._untaught(0)),
            *(
                ("distillation", f"{kind}_{seed}", lambda measure=measure, seed=seed: measure(seed))
                for seed in SEEDS[1:]
                for kind, measure in (("student", self._student), ("untaught", self._untaught))
            ),
        ]
        return [(name, measure) for part, name, measure in plan if parts is None or part in parts]

    def _measure_arm(self, arm: Arm) -> dict[str, Any]:
        model_dir = self._make(arm).local_dir
        return measure_arm(arm, model_dir, self._heldout())

    def _uniform(self) -> dict[str, Any]:
        plain = self._arms["fp32"]
        with connected_to_ray():
            pipeline = Pipeline(plain.config)
            trained, prepared = pipeline.train(), pipeline.prepare()
        return measure_uniform(
            trained.local_dir, prepared.local_dir, self._arms["codebook4"].config, self._heldout()
        )

    def _student(self, seed: int) -> dict[str, Any]:
        """One seed, taught, in float and INT8."""
        taught = self._taught(seed)
        with connected_to_ray():
            pipeline = Pipeline(taught)
            trained, compressed = pipeline.train(), pipeline.compress()
            assert taught.distill is not None
            assert taught.distill.logits.type == "stored"
            stored = pipeline.logits(taught.distill, taught.distill.logits)
        directories = {"kd": trained.local_dir, "kd_int8": compressed.local_dir}
        return self._measure_students(taught, directories) | {"logits": stored.manifest.metrics}

    def _untaught(self, seed: int) -> dict[str, Any]:
        """One seed, trained on the targets alone for as much work as the taught one was."""
        taught = self._taught(seed)
        teacher_dir = self._make(self._arms["fp32"]).local_dir
        with connected_to_ray():
            pipeline = Pipeline(taught)
            trained = pipeline.train()
            num_steps = equal_compute_steps(
                teacher=ModelConfig.load(teacher_dir),
                student=ModelConfig.load(trained.local_dir),
                stored_tokens=pipeline.prepare().manifest.metrics["num_tokens"],
                trained_tokens=trained.manifest.metrics["tokens"],
                num_steps=STUDENT_STEPS,
            )
            plain = student_config(
                self._work, teacher_dir, has_teacher=False, seed=seed, num_steps=num_steps
            )
            untaught = Pipeline(plain).train()
        return self._measure_students(taught, {"sft": untaught.local_dir}) | {"steps": num_steps}

    def _taught(self, seed: int) -> PipelineConfig:
        teacher_dir = self._make(self._arms["fp32"]).local_dir
        return student_config(
            self._work, teacher_dir, has_teacher=True, seed=seed, num_steps=STUDENT_STEPS
        )

    def _measure_students(
        self, config: PipelineConfig, directories: Mapping[str, Path]
    ) -> dict[str, Any]:
        arms = {
            name: measure_arm(
                Arm(name, config, is_compressed=name == "kd_int8"), directory, self._heldout()
            )
            for name, directory in directories.items()
        }
        paths = {
            name: str(path.relative_to(self._work.resolve())) for name, path in directories.items()
        }
        return {"arms": arms, "directories": paths}

    def _latency(self) -> dict[str, Any]:
        student = self._read("student_0")["directories"]
        return compare_latency(
            {
                "teacher_fp32": self._make(self._arms["fp32"]).local_dir,
                "teacher_int8": self._make(self._arms["int8_ptq"]).local_dir,
                "student_fp32": self._work / student["kd"],
                "student_int8": self._work / student["kd_int8"],
            },
            self._arms["fp32"].config,
        )

    def _tails(self) -> dict[str, Any]:
        student = self._work / self._read("student_0")["directories"]["kd"]
        return measure_tails(self._make(self._arms["fp32"]).local_dir, student, self._heldout())

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

    def _path(self, name: str) -> Path:
        return self._work / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path(name).read_text(encoding="utf-8")))
        except OSError as error:
            raise ArtifactError(f"{name} was not measured; run the benchmark again") from error


def _without_answers(value: Any) -> Any:
    """`value` without the lists of thousands of booleans in it."""
    if isinstance(value, dict):
        return {
            name: _without_answers(item) for name, item in value.items() if name != "is_correct"
        }
    return value
