"""Updating a published model: learn new data from where it ended, judge, and only then publish.

1. The sources of the configuration are learned in phases (`r1ray.pipeline`) that begin with the
   published model's float weights and its memory. A model that was trained without `continual` has
   none: its reservoir is drawn from its BatchSets.
2. The quantized result and the published model answer the same held-out problems, which no data
   set of the run has.
3. Where a family lost more than `update.max_forgetting_points`, nothing is published. Else the link
   that servers follow is replaced.

Made again, an update that was published is found; a killed one goes on from where it was.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.config.schema import BaseConfig, PipelineConfig, identity
from r1ray.data.pipeline import describe_sources
from r1ray.data.reasoning import Problem, read_questions
from r1ray.data.reservoir import Reservoir, read_samples
from r1ray.errors import ArtifactError, ConfigError, ForgettingError
from r1ray.evaluation.forgetting import find_forgotten, measure_changes, render_changes
from r1ray.evaluation.record import write_json
from r1ray.manifest import compute_run_id
from r1ray.models.fusion_file import read_fusion
from r1ray.models.memory import FISHER_NAME, RESERVOIR_NAME, memory_path
from r1ray.observability.progress import StageProgress
from r1ray.pipeline import Pipeline
from r1ray.publication import JUDGE, LINK, Published, find_published, list_versions

__all__ = ["UpdateOutcome", "run_update"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateOutcome:
    """A published update.

    Attributes:
        version: of the model that is published.
        judged: the artifact with the comparison.
        is_new: False where the update had been published before.
    """

    version: str
    judged: Artifact
    is_new: bool


def run_update(config: PipelineConfig) -> UpdateOutcome:
    """Update the published model of the run `config.run`.

    Raises:
        ForgettingError: the new model forgets too much, and is not published.
        ConfigError, ArtifactError: there is nothing to update, or not in this way; or another
            update of the run is under way, or something else was published meanwhile.
    """
    _check(config)
    store = ArtifactStore(config.run.root, config.run.name)
    with store.lock(JUDGE, "update"):
        return _update(config, store)


def _update(config: PipelineConfig, store: ArtifactStore) -> UpdateOutcome:
    published = find_published(store)
    if read_fusion(published.trained.local_dir) is not None:
        raise ConfigError(
            "the published model sees images, which an update neither replays nor asks about; "
            "train it anew on all data with `python -m jobs.pipeline`"
        )
    learns = _identify(config)
    if (judged := _find_made(store, published, learns)) is not None:
        return UpdateOutcome(published.served.manifest.run_id, judged, is_new=False)
    taught = _find_taught(store, published)
    _check_families(taught, config)
    base = BaseConfig(source=str(published.trained.local_dir))
    memory = _find_memory(store, published, config)
    _warn_of_ewc(published, config)
    pipeline = Pipeline(dataclasses.replace(config, base=base), memory=memory)
    new = pipeline.compress(publish=False)
    judged = _judge(pipeline, published, new, taught, learns)
    if judged.manifest.metrics["forgotten"]:
        raise ForgettingError(_explain(config, judged))
    if find_published(store).served.digest != published.served.digest:
        raise ArtifactError(
            f"{store.path}/{LINK} leads to another model since this update began, and the new "
            "model was not compared with that one; start the update again"
        )
    store.link(LINK, new)
    logger.info("published %s in place of %s", new.location, published.served.location)
    return UpdateOutcome(new.manifest.run_id, judged, is_new=True)


def _check(config: PipelineConfig) -> None:
    if config.continual is None:
        raise ConfigError("an update needs `continual`, which says how old data is kept in mind")
    if config.student is not None:
        raise ConfigError("an update keeps the published model's shape; leave `student` out")
    if "://" in config.run.root:
        raise ConfigError(
            f"run.root {config.run.root!r} is a URI, where no link can lead servers to a model; "
            "an update needs a directory that all nodes see"
        )


def _identify(config: PipelineConfig) -> str:
    """What the update teaches and how, whatever model it begins with."""
    assert config.continual is not None
    sections = (config.prepare, config.tasks, config.train, config.continual, config.compress)
    values = identity(*sections) | {"seed": config.run.seed}
    return compute_run_id("update", values, describe_sources(config.prepare))


def _find_made(store: ArtifactStore, published: Published, learns: str) -> Artifact | None:
    """The judgement by which this very update was published."""
    for judged in store.find_all(JUDGE):
        manifest = judged.manifest
        is_this = manifest.config["learns"] == learns and not manifest.metrics["forgotten"]
        if is_this and manifest.inputs["new"] == published.served.digest:
            return judged
    return None


def _check_families(taught: set[str], config: PipelineConfig) -> None:
    """Refuse a configuration that does not ask for all that the published model was taught."""
    missing = sorted(taught - {family.name for family in config.tasks.families})
    if missing:
        raise ConfigError(
            f"the published model was taught {', '.join(missing)}, which tasks.families leaves "
            "out; list them all, or nobody would see what the update forgets"
        )


def _find_taught(store: ArtifactStore, published: Published) -> set[str]:
    """Names of the families that the published model was taught, over all updates."""
    for judged in store.find_all(JUDGE):
        if judged.manifest.inputs["new"] == published.served.digest:
            return set(judged.manifest.metrics["taught"])
    taught = set[str]()
    for item in _list_prepared(store, published):
        config = item.manifest.config
        taught |= _list_families(config["PrepareConfig"], config["TasksConfig"])
    return taught


def _list_prepared(store: ArtifactStore, published: Published) -> list[Artifact]:
    """The BatchSets that a model was trained on, those that are gone left out.

    Phase by phase, and update by update.
    """
    phases, prepared, served = (
        {item.digest: item for item in store.find_all(stage)}
        for stage in ("train", "prepare", "compress")
    )
    found: list[Artifact] = []
    for version in list_versions(store, published.served):
        trained = served[version].manifest.inputs["train"] if version in served else ""
        phase = phases.get(trained)
        while phase is not None:
            inputs = phase.manifest.inputs
            found += [prepared[inputs["prepare"]]] if inputs["prepare"] in prepared else []
            phase = phases.get(inputs.get("train", ""))
    return found[::-1]


def _find_memory(
    store: ArtifactStore, published: Published, config: PipelineConfig
) -> Artifact | None:
    """A reservoir of what the published model was trained on, where it has none itself."""
    replay = None if config.continual is None else config.continual.replay
    if replay is None or _has_reservoir(published.trained):
        return None
    prepared, seed = _list_prepared(store, published), config.run.seed
    if not prepared:
        logger.warning("the published model's BatchSet is gone; nothing of it can be replayed")
        return None

    def body(out_dir: Path) -> dict[str, Any]:
        # What was replayed is in a BatchSet as well, but no new sample: its reservoir has all.
        first = max((at for at, item in enumerate(prepared) if _has_reservoir(item)), default=0)
        reservoir = Reservoir.recall(prepared[first].local_dir, replay.reservoir_rows, seed=seed)
        for item in prepared[first + 1 if reservoir.num_seen else first :]:
            for samples in read_samples(item.local_dir):
                reservoir.add(samples)
        reservoir.save(out_dir)
        return {"num_seen": reservoir.num_seen}

    values = {"reservoir_rows": replay.reservoir_rows, "seed": seed}
    inputs = {f"prepare {number}": item.digest for number, item in enumerate(prepared, 1)}
    return store.run("memory", values, inputs, body)


def _has_reservoir(artifact: Artifact) -> bool:
    return memory_path(artifact.local_dir, RESERVOIR_NAME).is_file()


def _warn_of_ewc(published: Published, config: PipelineConfig) -> None:
    assert config.continual is not None
    path = memory_path(published.trained.local_dir, FISHER_NAME)
    if config.continual.ewc is not None and not path.is_file():
        logger.warning(
            "continual.ewc holds nothing in this update: the published model was trained without "
            "it, and nothing says which weights matter; the next update will know"
        )


def _list_families(prepare: Mapping[str, Any], tasks: Mapping[str, Any]) -> set[str]:
    """Names of those that these sections write traces for."""
    known = {family["name"] for family in tasks["families"]}
    sources = [item for item in prepare["sources"] if item["type"] == "tasks"]
    return {name for source in sources for name in source.get("families") or known}


def _judge(
    pipeline: Pipeline, published: Published, new: Artifact, taught: set[str], learns: str
) -> Artifact:
    config, problems = pipeline.config, _draw_unseen(pipeline, taught)
    max_points = config.update.max_forgetting_points

    def body(out_dir: Path) -> dict[str, Any]:
        with StageProgress(JUDGE, "answers", 2 * len(problems)) as progress:
            changes = measure_changes(
                config.evaluate,
                published.served.local_dir,
                new.local_dir,
                problems,
                config.tasks.system_prompt,
                taught,
                out_dir,
                on_problem=lambda name, finished: progress.update(
                    finished + (len(problems) if name == "new" else 0), name
                ),
            )
        write_json(out_dir / "forgetting.json", [asdict(item) for item in changes])
        (out_dir / "summary.md").write_text(render_changes(changes, max_points), encoding="utf-8")
        return {
            "forgotten": [item.family for item in find_forgotten(changes, max_points)],
            "taught": sorted(taught | _list_families(asdict(config.prepare), asdict(config.tasks))),
            "points": {item.family: 100 * item.change[0] for item in changes},
        }

    values = identity(config.evaluate, config.tasks, config.update) | {"learns": learns}
    inputs = {"old": published.served.digest, "new": new.digest}
    return pipeline.store.run(JUDGE, values, inputs, body)


def _draw_unseen(pipeline: Pipeline, taught: set[str]) -> list[Problem]:
    """Held-out problems that no data set of the run has: another number of them was kept apart.

    Raises:
        ConfigError: there are none of some family that was taught.
    """
    seen = set[str]()
    for prepared in pipeline.store.find_all("prepare"):
        seen |= read_questions(prepared.local_dir)
    problems = [item for item in pipeline.heldout_problems() if item.question.strip() not in seen]
    if missing := sorted(taught - {item.family for item in problems}):
        raise ConfigError(
            f"evaluate.num_problems ({pipeline.config.evaluate.num_problems}) leaves no held-out "
            f"problem of {', '.join(missing)} to be asked; raise it"
        )
    return problems


def _explain(config: PipelineConfig, judged: Artifact) -> str:
    metrics = judged.manifest.metrics
    lost = ", ".join(f"{-metrics['points'][name]:.1f} on {name}" for name in metrics["forgotten"])
    table = (judged.local_dir / "summary.md").read_text(encoding="utf-8")
    return (
        f"not published: the new model loses {lost}, and update.max_forgetting_points is "
        f"{config.update.max_forgetting_points:g}; raise continual.replay.share, train fewer "
        f"steps, or allow more\n\n{table}"
    )
