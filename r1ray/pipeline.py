"""The stages chained: which artifacts each one reads, and what it writes.

    base ─► prepare ─► train ─► compress ─► evaluate ─► report, serve
      └─► student ──────┘│
    teacher ─► logits ───┘

The second and third line are there where the configuration has a `student` or `distill`; they are
made with `base` and, the logits, with `train`. A stage that has finished with the same config and
inputs is not run again. `only` restricts a pipeline to one stage: the ones before it must then have
finished.

With `continual` each source is learned in a phase of its own, of one `prepare` and one `train`: the
former mixes in what the reservoir of the phase before holds, the latter begins with its weights.
Phases that are the same as in an earlier run are found again, so that a source can be appended.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1ray import __version__
from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.export import export_model
from r1ray.compression.gguf import check_gguf
from r1ray.compression.logits import PARTS_DIR, store_logits
from r1ray.config.checks import check_lengths, check_padding
from r1ray.config.distill import DistillConfig, StoredLogitsConfig
from r1ray.config.prepare import PrepareConfig
from r1ray.config.schema import BaseConfig, PipelineConfig, identity
from r1ray.data.batch_set import BatchSet
from r1ray.data.pipeline import describe_sources, prepare_batches
from r1ray.data.reasoning import Problem, draw_heldout
from r1ray.data.reservoir import Replay, Reservoir
from r1ray.data.sources import describe_files, list_files
from r1ray.errors import ConfigError
from r1ray.evaluation.evaluate import evaluate_models
from r1ray.evaluation.report import write_report
from r1ray.manifest import compute_run_id, digest_path
from r1ray.models.base import (
    check_same_vocabulary,
    count_parameters,
    import_base,
    resolve_source,
)
from r1ray.models.checkpoint import copy_tokenizer, load_model, save_model
from r1ray.models.config import ModelConfig
from r1ray.models.fusion_file import read_fusion
from r1ray.models.student import build_student, plan_student
from r1ray.observability.progress import StageProgress
from r1ray.publication import LINK, has_replaced
from r1ray.training.trainer import CHECKPOINTS_DIR, train_model
from r1ray.training.worker import Teaching

__all__ = ["STAGES", "Pipeline"]

logger = logging.getLogger(__name__)

STAGES = ("base", "prepare", "train", "compress", "evaluate")
_IMAGE_PATHS = "evaluate.images.paths"


class Pipeline:
    """The artifacts of one configuration, made on demand.

    Args:
        only: run this stage alone and require the others; None runs whatever is missing.
        memory: has a reservoir to begin with, where the base has none.
    """

    def __init__(
        self, config: PipelineConfig, *, only: str | None = None, memory: Artifact | None = None
    ) -> None:
        self.config = config
        self.store = ArtifactStore(config.run.root, config.run.name)
        self._only = only
        self._memory = memory
        self._made: dict[str, Artifact] = {}

    def base(self) -> Artifact:
        """A clean Hugging Face checkpoint of the base model."""
        if "base" in self._made:
            return self._made["base"]
        config = self.config.base
        base = self._import("base", "base.source", config)
        shape = ModelConfig.load(base.local_dir)
        check_lengths(self.config, shape.max_context)
        check_padding(self.config, shape.even_context)
        if (images := self.config.evaluate.images) is not None:
            list_files(images.paths, key=_IMAGE_PATHS)
            if read_fusion(base.local_dir) is None:
                raise ConfigError(
                    f"evaluate.images asks about images, and the model at base.source "
                    f"{config.source} reads text alone; set base.fusion, or leave images out"
                )
        if self.config.unfit_for_fusion and read_fusion(base.local_dir) is not None:
            raise ConfigError(
                f"base.source {config.source} sees images, and does not go with "
                f"{self.config.unfit_for_fusion[0]}; leave one of them out"
            )
        if "gguf" in self.config.compress.exports:
            check_gguf(base.local_dir)
        if self.config.student is not None:
            plan_student(shape, self.config.student)
        if self.config.distill is not None:
            self._check_teacher(self.config.distill, base)
        return base

    def teacher(self, config: DistillConfig) -> Artifact:
        """A clean Hugging Face checkpoint of the teacher."""
        return self._import("teacher", "distill.teacher", BaseConfig(source=config.teacher))

    def _check_teacher(self, config: DistillConfig, base: Artifact) -> None:
        teacher = self.teacher(config)
        check_same_vocabulary(base.local_dir, teacher.local_dir)
        shape = ModelConfig.load(teacher.local_dir)
        check_lengths(self.config, shape.max_context, of="the teacher", stages=("prepare",))
        check_padding(self.config, shape.even_context)
        if config.logits.type == "stored" and config.logits.top_k > shape.vocab_size:
            raise ConfigError(
                f"distill.logits.top_k ({config.logits.top_k}) is above the vocabulary of "
                f"{shape.vocab_size}; lower it"
            )

    def start(self) -> Artifact:
        """What training starts from: the base model, or the student that is cut out of it."""
        base, config = self.base(), self.config.student
        if config is None:
            return base

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("student", "model", 1) as progress:
                student = build_student(load_model(base.local_dir), config)
                save_model(student, out_dir)
                copy_tokenizer(base.local_dir, out_dir)
                progress.update(1)
            return {"parameters": count_parameters(student)}

        return self._stage("student", identity(config), {"base": base.digest}, body, job="train")

    @property
    def num_phases(self) -> int:
        """Data sets that are learned one after the other."""
        return 1 if self.config.continual is None else len(self.config.prepare.sources)

    def _sources_of(self, phase: int) -> PrepareConfig:
        prepare = self.config.prepare
        if self.config.continual is None:
            return prepare
        return dataclasses.replace(prepare, sources=[prepare.sources[phase]])

    def prepare(self) -> Artifact:
        """The BatchSet; where there are several phases all of theirs, of which this is the last."""
        return [self._prepare(phase) for phase in range(self.num_phases)][-1]

    def _prepare(self, phase: int) -> Artifact:
        config, base, prepare = self.config, self.base(), self._sources_of(phase)
        values = identity(prepare, config.tasks)
        values["heldout_problems"] = config.evaluate.num_problems
        inputs = {"base": base.digest, **describe_sources(prepare)}
        before = base
        if config.continual is not None and config.continual.replay is not None:
            values |= identity(config.continual.replay) | {"seed": config.run.seed}
            if phase > 0:
                before = self._prepare(phase - 1)
                inputs["prepare"] = before.digest
            elif self._memory is not None:
                before = self._memory
                inputs["memory"] = before.digest

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress(self._name("prepare", phase), "rows") as progress:
                return prepare_batches(
                    prepare,
                    config.tasks,
                    base.local_dir,
                    self.heldout_problems(),
                    out_dir,
                    name=f"{self.store.name}-prepare",
                    on_rows=progress.update,
                    replay=self._replay(before.local_dir),
                )

        return self._stage("prepare", values, inputs, body, phase=phase)

    def _replay(self, before: Path) -> Replay | None:
        """Of what the directory `before` remembers; from the first phase on, samples are kept."""
        config, seed = self.config.continual, self.config.run.seed
        if config is None or config.replay is None:
            return None
        reservoir = Reservoir.recall(before, config.replay.reservoir_rows, seed=seed)
        max_tokens = self.config.prepare.max_tokens
        return Replay(reservoir, config.replay.share, seed=seed, max_tokens=max_tokens)

    def train(self) -> Artifact:
        """The fine-tuned checkpoint; after the last phase, where there are several."""
        return self._train(self.num_phases - 1)

    def _train(self, phase: int) -> Artifact:
        config, prepared = self.config, self._prepare(phase)
        start = self.start() if phase == 0 else self._train(phase - 1)
        values = identity(config.train) | {"seed": config.run.seed}
        if config.continual is not None:
            values |= identity(config.continual)
        inputs = {start.manifest.stage: start.digest, "prepare": prepared.digest}
        if config.distill is not None:
            values |= identity(config.distill)
            del values["DistillConfig"]["teacher"]  # its digest says more than its path
            inputs["teacher"] = self.teacher(config.distill).digest

        def body(out_dir: Path) -> dict[str, Any]:
            teaching = None if config.distill is None else self._teaching(config.distill)
            name = self._name("train", phase)
            with StageProgress(name, "step", config.train.num_steps) as progress:
                return train_model(
                    config.train,
                    seed=config.run.seed,
                    store=self.store,
                    start=start,
                    prepared=prepared,
                    teaching=teaching,
                    continual=config.continual,
                    run_id=self._run_id("train", values, inputs),
                    out_dir=out_dir,
                    on_step=lambda record: progress.update(record.step, record.describe()),
                )

        return self._stage("train", values, inputs, body, keep=(CHECKPOINTS_DIR,), phase=phase)

    def logits(self, config: DistillConfig, stored: StoredLogitsConfig) -> Artifact:
        """What the teacher thinks of every target of the BatchSet."""
        teacher, prepared = self.teacher(config), self.prepare()
        values = {"top_k": stored.top_k, "temperature": config.temperature}
        inputs = {"teacher": teacher.digest, "prepare": prepared.digest}

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("logits", "micro-batches") as progress:
                return store_logits(
                    config,
                    stored,
                    teacher.local_dir,
                    prepared.local_dir,
                    out_dir,
                    name=f"{self.store.name}-logits",
                    on_batches=progress.update,
                )

        return self._stage("logits", values, inputs, body, keep=(PARTS_DIR,), job="train")

    def _teaching(self, config: DistillConfig) -> Teaching:
        """The teacher for the workers, its logits stored where it is not to run beside them."""
        logits_run_id = None
        if config.logits.type == "stored":
            logits_run_id = self.logits(config, config.logits).manifest.run_id
        return Teaching(config, self.teacher(config).manifest.run_id, logits_run_id)

    def compress(self, *, publish: bool = True) -> Artifact:
        """The quantized model directory.

        Args:
            publish: let `<root>/<run>/model` lead to it, unless updates of it are there already.
        """
        trained, prepared = self.train(), self.prepare()

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress("compress", "model", 1) as progress:
                batches = BatchSet(prepared.local_dir)
                metrics = export_model(self.config.compress, trained, batches, out_dir)
                progress.update(1)
            return metrics

        exported = self._stage(
            "compress", identity(self.config.compress), {"train": trained.digest}, body
        )
        if publish and not has_replaced(self.store, exported):
            self.store.link(LINK, exported)
        return exported

    def served_dir(self) -> Path:
        """What a server is to serve: a link that leads to what is published, where there are links.

        That is `compress`, or an update of it (`r1ray.updates`).
        """
        exported = self.compress()
        return exported.local_dir if "://" in self.store.root else Path(self.store.path) / LINK

    def evaluate(self) -> Artifact:
        """Accuracy, perplexity, size and latency of base, tuned and quantized model."""
        config = self.config
        scheme = config.compress.scheme
        quantized = "int8" if scheme == "w8a8" else scheme
        compressed = self.compress(publish=self._only is None)  # a report alone publishes nothing
        models = {"base": self.base(), "tuned": self.train(), quantized: compressed}

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
        if config.evaluate.images is not None:
            inputs |= describe_files(config.evaluate.images.paths, key=_IMAGE_PATHS)
        return self._stage("evaluate", identity(config.evaluate, config.tasks), inputs, body)

    def write_report(self, *, command: str, serve_s: float | None = None) -> str:
        """Write report.md, report.json and plots of the finished run; returns report.md's path."""
        self.evaluate()
        return write_report(
            self.store,
            dict(self._made),
            name=self.config.run.name,
            command=command,
            serve_s=serve_s,
        )

    def heldout_problems(self) -> list[Problem]:
        return draw_heldout(self.config.tasks, self.config.evaluate.num_problems)

    def _import(self, stage: str, key: str, config: BaseConfig) -> Artifact:
        """The checkpoint at the source that `key` gives, as the artifact of `stage`."""
        if stage in self._made:
            return self._made[stage]
        source, seed = resolve_source(config.source, key=key), self.config.run.seed

        def body(out_dir: Path) -> dict[str, Any]:
            with StageProgress(stage, "checkpoint", 1) as progress:
                metrics = import_base(
                    source,
                    out_dir,
                    key=key,
                    context=config.context,
                    fusion=config.fusion,
                    seed=seed,
                )
                progress.update(1)
            return metrics

        values: dict[str, Any] = {"BaseConfig": {"source": config.source}}
        if config.context is not None:
            values |= identity(config.context)
        if config.fusion is not None:
            values |= identity(config.fusion) | {"seed": seed}
        return self._stage(stage, values, {"source": digest_path(source)}, body, job="base")

    def _stage(
        self,
        stage: str,
        values: Mapping[str, Any],
        inputs: Mapping[str, str],
        body: Callable[[Path], dict[str, Any]],
        keep: tuple[str, ...] = (),
        job: str | None = None,
        phase: int | None = None,
    ) -> Artifact:
        """The artifact of `stage`, made by the job of that name, or by `job`.

        Args:
            phase: of those that are learned one after the other, where the stage is of one.
        """
        key = stage if phase is None else self._name(stage, phase)
        if key not in self._made:
            job = job or stage
            if self._only in (None, job):
                self._made[key] = self.store.run(
                    stage, _with_version(values), inputs, body, keep=keep
                )
            else:
                self._made[key] = self.store.require(
                    stage,
                    self._run_id(stage, values, inputs),
                    hint=f"run `python -m jobs.{job}` with the same configuration first",
                )
        return self._made[key]

    def _name(self, stage: str, phase: int) -> str:
        """Of one phase; the last one's is the stage's own."""
        return stage if phase == self.num_phases - 1 else f"{stage} {phase + 1}"

    @staticmethod
    def _run_id(stage: str, values: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        return compute_run_id(stage, _with_version(values), inputs)


def _with_version(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "r1ray": __version__}
