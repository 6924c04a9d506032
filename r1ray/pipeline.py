"""The stages chained: which artifacts each one reads, and what it writes.

    base ─► prepare ─► train ─► compress ─► evaluate ─► report, serve

A stage that has finished with the same config and inputs is not run again. `only` restricts a
pipeline to one stage: the ones before it must then have finished.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from r1ray import __version__
from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.export import export_model
from r1ray.config.schema import FileSourceConfig, PipelineConfig, identity
from r1ray.data.pipeline import prepare_batches
from r1ray.data.reasoning import Problem, draw_heldout
from r1ray.data.sources import list_files
from r1ray.errors import ConfigError
from r1ray.evaluation.evaluate import evaluate_models
from r1ray.evaluation.report import write_report
from r1ray.manifest import compute_run_id, digest_path
from r1ray.models.base import import_base, resolve_source
from r1ray.models.config import ModelConfig
from r1ray.observability.progress import StageProgress
from r1ray.training.step import StepRecord
from r1ray.training.trainer import CHECKPOINTS_DIR, train_model

__all__ = ["STAGES", "Pipeline"]

logger = logging.getLogger(__name__)

STAGES = ("base", "prepare", "train", "compress", "evaluate")


class Pipeline:
    """The artifacts of one configuration, made on demand.

    Args:
        only: run this stage alone and require the others; None runs whatever is missing.
    """

    def __init__(self, config: PipelineConfig, *, only: str | None = None) -> None:
        self.config = config
        self.store = ArtifactStore(config.run.root, config.run.name)
        self._only = only
        self._made: dict[str, Artifact] = {}

    def base(self) -> Artifact:
        """A clean Hugging Face checkpoint of the base model."""
        source = resolve_source(self.config.base.source)

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("base", "checkpoint", 1) as progress:
                metrics = import_base(source, out_dir)
                progress.update(1)
            return metrics

        base = self._stage(
            "base", identity(self.config.base), {"source": digest_path(source)}, body
        )
        _check_lengths(self.config, ModelConfig.load(base.local_dir).max_positions)
        return base

    def prepare(self) -> Artifact:
        """The BatchSet."""
        config, base = self.config, self.base()

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("prepare", "rows") as progress:
                return prepare_batches(
                    config.prepare,
                    config.tasks,
                    base.local_dir,
                    self.heldout_problems(),
                    out_dir,
                    on_rows=progress.update,
                )

        inputs = {"base": base.digest, **_describe_files(config)}
        values = identity(config.prepare, config.tasks)
        values["heldout_problems"] = config.evaluate.num_problems
        return self._stage("prepare", values, inputs, body)

    def train(self) -> Artifact:
        """The fine-tuned checkpoint."""
        config, base, prepared = self.config, self.base(), self.prepare()
        values = identity(config.train) | {"seed": config.run.seed}
        inputs = {"base": base.digest, "prepare": prepared.digest}

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("train", "step", config.train.num_steps) as progress:
                return train_model(
                    config.train,
                    seed=config.run.seed,
                    store=self.store,
                    base=base,
                    prepared=prepared,
                    run_id=self._run_id("train", values, inputs),
                    out_dir=out_dir,
                    on_step=lambda record: progress.update(record.step, _describe_step(record)),
                )

        return self._stage("train", values, inputs, body, keep=(CHECKPOINTS_DIR,))

    def compress(self) -> Artifact:
        """The quantized model directory; `<root>/<run>/model` leads to it."""
        trained = self.train()

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("compress", "model", 1) as progress:
                metrics = export_model(self.config.compress, trained, out_dir)
                progress.update(1)
            return metrics

        exported = self._stage(
            "compress", identity(self.config.compress), {"train": trained.digest}, body
        )
        self.store.link("model", exported)
        return exported

    def evaluate(self) -> Artifact:
        """Accuracy, perplexity, size and latency of base, tuned and INT8."""
        config = self.config
        models = {"base": self.base(), "tuned": self.train(), "int8": self.compress()}

        def body(out_dir: Path) -> dict[str, Any]:
            problems = self.heldout_problems()
            order = list(models)
            with StageProgress("evaluate", "answers", len(problems) * len(order)) as progress:
                return evaluate_models(
                    config.evaluate,
                    {name: artifact.local_dir for name, artifact in models.items()},
                    problems,
                    config.tasks.system_prompt,
                    out_dir,
                    on_problem=lambda name, finished: progress.update(
                        order.index(name) * len(problems) + finished, name
                    ),
                )

        inputs = {name: artifact.digest for name, artifact in models.items()}
        return self._stage("evaluate", identity(config.evaluate, config.tasks), inputs, body)

    def write_report(self, *, command: str, serve_s: float | None = None) -> str:
        """Write report.md, report.json and plots of the finished run; returns report.md's path."""
        self.evaluate()
        return write_report(
            self.store,
            {stage: self._made[stage] for stage in STAGES},
            name=self.config.run.name,
            command=command,
            serve_s=serve_s,
        )

    def heldout_problems(self) -> list[Problem]:
        return draw_heldout(self.config.tasks, self.config.evaluate.num_problems)

    def _stage(
        self,
        stage: str,
        values: Mapping[str, Any],
        inputs: Mapping[str, str],
        body: Callable[[Path], dict[str, Any]],
        keep: tuple[str, ...] = (),
    ) -> Artifact:
        if stage not in self._made:
            if self._only in (None, stage):
                self._made[stage] = self.store.run(
                    stage, _with_version(values), inputs, body, keep=keep
                )
            else:
                self._made[stage] = self.store.require(
                    stage,
                    self._run_id(stage, values, inputs),
                    hint=f"run `python -m jobs.{stage}` with the same configuration first",
                )
        return self._made[stage]

    @staticmethod
    def _run_id(stage: str, values: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        return compute_run_id(stage, _with_version(values), inputs)


def _check_lengths(config: PipelineConfig, max_positions: int) -> None:
    """Raise ConfigError where a stage would go beyond the positions that the model knows."""
    lengths = {
        "prepare.max_tokens": config.prepare.max_tokens,
        "evaluate.max_new_tokens": config.evaluate.max_new_tokens,
        "evaluate.perplexity_window": config.evaluate.perplexity_window,
        "serve.max_context_tokens": config.serve.max_context_tokens,
    }
    for key, length in lengths.items():
        if length > max_positions:
            raise ConfigError(
                f"{key} ({length}) is above the base model's {max_positions} positions; lower it"
            )


def _with_version(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "r1ray": __version__}


def _describe_files(config: PipelineConfig) -> dict[str, str]:
    """Size and modification time of every source file: contents may be too large to hash."""
    described = {}
    for source in config.prepare.sources:
        if not isinstance(source, FileSourceConfig):
            continue
        for path in list_files(source.paths):
            filesystem, inner = (
                fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
            )
            info = filesystem.get_file_info(inner)
            described[path] = f"{info.size} bytes, {info.mtime_ns}"
    return described


def _describe_step(record: StepRecord) -> str:
    if record.was_skipped:
        return "not finite, skipped"
    if record.loss is None or record.learning_rate is None:
        return "the first update is under way"
    return (
        f"loss {record.loss:.3f}  lr {record.learning_rate:.1e}  "
        f"{record.num_tokens / record.seconds:.0f} tokens/s  "
        f"stalled {100 * record.exchange_wait_s / record.seconds:.0f}%"
    )
