"""A student cut out of its teacher, taught by it, on a local Ray."""

import json
from pathlib import Path

import pytest

from r1ray.compression import logits as logits_module
from r1ray.compression.logit_store import LogitStore, part_name
from r1ray.config import PipelineConfig, load_config
from r1ray.data.batch_set import BatchSet
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.config import ModelConfig
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")


def _configure(directory: Path, *overrides: str) -> PipelineConfig:
    for name in ("model", "teacher"):
        write_tiny_model(directory / name, max_positions=1024)
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={directory}",
            f"base.source={directory / 'model'}",
            "student={layers: [1], num_kv_heads: 1}",
            f"distill={{teacher: {directory / 'teacher'}, logits: {{type: stored, top_k: 8}}}}",
            "prepare.batch_tokens=512",
            *overrides,
        ],
    )


def test_a_student_learns_from_stored_logits_and_then_from_its_own_answers(tmp_path: Path) -> None:
    config = _configure(
        tmp_path, "distill.on_policy={last_steps: 2, max_new_tokens: 8}", "train.num_steps=5"
    )
    pipeline = Pipeline(config)
    for stage in ("base", "prepare", "train"):  # as the jobs do, one after the other
        trained = getattr(Pipeline(config, only=stage), stage)()
    shape = ModelConfig.load(trained.local_dir)
    assert (shape.num_layers, shape.num_kv_heads) == (1, 1)
    assert set(trained.manifest.inputs) == {"student", "prepare", "teacher"}
    assert config.distill is not None
    assert config.distill.logits.type == "stored"
    stored = pipeline.logits(config.distill, config.distill.logits)
    batches = BatchSet(pipeline.prepare().local_dir)
    store = LogitStore(stored.local_dir)
    assert store.index.num_batches == len(batches)
    for index in (0, len(batches) - 1):
        assert len(store.read(index).tail_P) == batches.read(index).num_targets
    targets = sum(batches.read(index).num_targets for index in range(len(batches)))
    assert store.index.num_targets == targets
    assert stored.manifest.metrics["bytes_per_target"] > 0
    history = json.loads((trained.local_dir / "history.json").read_text())
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5]
    assert all(record["loss"] is not None for record in history)


def test_an_online_teacher_needs_no_store(tmp_path: Path) -> None:
    config = _configure(tmp_path, "distill.logits={type: online}", "train.num_steps=3")
    Pipeline(config).train()
    assert not (tmp_path / "tiny" / "logits").exists()


def test_interrupted_logits_go_on_with_the_parts_that_are_missing(
    tmp_path: Path,
) -> None:
    config = _configure(tmp_path, "prepare.sources=[{type: tasks, num_samples: 400}]")
    assert config.distill is not None
    assert config.distill.logits.type == "stored"
    arguments = (config.distill, config.distill.logits)
    seen: list[int] = []

    def stop_after_one_part(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    pipeline = Pipeline(config)
    teacher, prepared = pipeline.teacher(config.distill), pipeline.prepare()
    num_batches = len(BatchSet(prepared.local_dir))
    assert num_batches > 64
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    with pytest.raises(KeyboardInterrupt):
        logits_module.store_logits(
            *arguments, teacher.local_dir, prepared.local_dir, out_dir, stop_after_one_part
        )
    (first,) = (out_dir / "parts").iterdir()
    before = first.stat().st_mtime_ns
    logits_module.store_logits(
        *arguments, teacher.local_dir, prepared.local_dir, out_dir, seen.append
    )
    assert (out_dir / first.name).stat().st_mtime_ns == before  # not made again
    assert (out_dir / part_name(0)).exists()
    assert seen[2] == 32
    assert seen[-1] == num_batches
    store = LogitStore(out_dir)
    assert len(store.read(num_batches - 1).tail_P) > 0


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = _configure(tmp_path, "distill.logits.top_k=301")
    with pytest.raises(ConfigError, match=r"top_k \(301\) is above the vocabulary of 300"):
        Pipeline(config).train()
    config = _configure(tmp_path, "student.layers=[2]")
    with pytest.raises(ConfigError, match=r"student\.layers names layer 2"):
        Pipeline(config).train()
    config = _configure(tmp_path, f"distill.teacher={tmp_path / 'nowhere'}")
    with pytest.raises(ArtifactError, match=r"distill\.teacher .*nowhere"):
        Pipeline(config).train()
    config = _configure(tmp_path)
    path = tmp_path / "teacher" / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    ids = raw["model"]["vocab"]
    ids["!"], ids["#"] = ids["#"], ids["!"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"has another tokenizer .*: 2 tokens differ, such as '!'"
    ):
        Pipeline(config).train()
    assert not (tmp_path / "tiny" / "prepare").exists()
