"""Images from Parquet files through prepare, train, compress and evaluate, on one local Ray."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from r1ray.config import PipelineConfig, load_config
from r1ray.data.batch_set import BatchSet
from r1ray.data.scene_files import write_scenes
from r1ray.data.scenes import KINDS
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models import load_model
from r1ray.models.fusion_file import FUSION_NAME
from r1ray.ops.int8 import Int8Linear
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

FUSION = "image_size: 32, patch_size: 16, encoder_width: 16, encoder_heads: 2, encoder_mlp: 32"
NUM_ROWS = 40


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_tiny_model(root / "model", max_positions=1024)
    write_scenes(root / "scenes.parquet", NUM_ROWS, first_seed=10**6)
    table = pq.read_table(root / "scenes.parquet")
    broken = {"image": b"no image", "question": "what ?", "answer": "nothing", "kind": "none"}
    pq.write_table(
        pa.concat_tables([table, pa.Table.from_pylist([broken], schema=table.schema)]),
        root / "scenes.parquet",
    )
    write_scenes(root / "heldout.parquet", 10, first_seed=0)
    return root


def _config(workspace: Path, kind: str, *overrides: str) -> PipelineConfig:
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={workspace}",
            f"run.name={kind}",
            f"base.source={workspace / 'model'}",
            f"base.fusion={{type: {kind}, {FUSION}}}",
            f"prepare.sources=[{{type: images, paths: ['{workspace / 'scenes.parquet'}']}}, "
            "{type: tasks, num_samples: 12}]",
            f"evaluate.images={{paths: ['{workspace / 'heldout.parquet'}']}}",
            "train.num_steps=3",
            "evaluate.num_problems=2",
            "evaluate.max_new_tokens=4",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("early", ["prepare.batching={type: packing}", "train.exchange={type: delta4}"]),
        ("mid", ["train.freeze_decoder=true", "train.resources.num_workers=1"]),
        ("late", ["train.resources.num_workers=1"]),
    ],
)
def test_images_go_from_files_to_an_int8_model(
    workspace: Path, kind: str, overrides: list[str]
) -> None:
    pipeline = Pipeline(_config(workspace, kind, *overrides))

    prepared = pipeline.prepare()
    batches = BatchSet(prepared.local_dir)
    found = [batches.read(index).images for index in range(len(batches))]
    bad = [
        json.loads(line)
        for line in (prepared.local_dir / "quarantine.jsonl").read_text().splitlines()
    ]
    compressed = pipeline.compress()

    assert sum(len(images.rows) for images in found if images is not None) == NUM_ROWS
    assert ["cannot be read" in row["error"] for row in bad] == [True]
    assert bad[0]["row"] == NUM_ROWS
    base, trained = (
        load_file(artifact.local_dir / FUSION_NAME)
        for artifact in (pipeline.base(), pipeline.train())
    )
    learned = {name for name in base if not torch.equal(base[name], trained[name])}
    assert {"encoder.patch_proj.weight", "encoder.positions_PE"} <= learned
    model = load_model(compressed.local_dir)
    assert model.fusion is not None
    assert isinstance(model.fusion.encoder.patch_proj, Int8Linear)
    # Trained through the rounding that it is served with: ties apart, the same logits.
    assert compressed.manifest.metrics["max_fake_quant_difference"] < 1e-3


def test_questions_about_images_are_evaluated_and_reported_by_kind(workspace: Path) -> None:
    pipeline = Pipeline(_config(workspace, "late", "train.resources.num_workers=1"))

    text = Path(pipeline.write_report(command="a test")).read_text()

    evaluation = json.loads((pipeline.evaluate().local_dir / "evaluation.json").read_text())
    assert set(evaluation["images"]) == {"base", "tuned", "int8"}
    assert evaluation["images"]["int8"]["accuracy"]["count"] == 10
    assert len(evaluation["images"]["int8"]["by_kind"]) == 5
    assert "| model | accuracy | " + " | ".join(sorted(KINDS)) + " |" in text
    assert "`late.int8_image_accuracy`" in text


def test_a_frozen_decoder_stays_as_it_was(workspace: Path) -> None:
    overrides = ["train.freeze_decoder=true", "train.resources.num_workers=1"]
    pipeline = Pipeline(_config(workspace, "mid", *overrides))

    base, trained = (
        load_file(artifact.local_dir / "model.safetensors")
        for artifact in (pipeline.base(), pipeline.train())
    )

    assert all(torch.equal(base[name], trained[name]) for name in base)


def test_questions_about_images_want_files_and_a_fusion_before_anything_is_trained(
    workspace: Path,
) -> None:
    missing = f"evaluate.images={{paths: ['{workspace / 'no.parquet'}']}}"
    with pytest.raises(ConfigError, match=r"evaluate\.images\.paths: .* matches no"):
        Pipeline(_config(workspace, "late", missing, "run.name=missing")).base()
    text = ["base.fusion=null", "run.name=blind", "prepare.sources=[{type: tasks, num_samples: 4}]"]
    with pytest.raises(ConfigError, match=r"evaluate\.images asks about images"):
        Pipeline(_config(workspace, "late", *text)).base()


def test_a_base_that_sees_images_is_not_cut_into_a_student(workspace: Path) -> None:
    seeing = Pipeline(_config(workspace, "late")).base().local_dir
    student = ["base.fusion=null", "student={layers: [0]}", "run.name=student"]

    with pytest.raises(ConfigError, match="sees images, and does not go with student"):
        Pipeline(_config(workspace, "late", f"base.source={seeing}", *student)).start()


def test_images_for_a_text_model_are_refused(workspace: Path) -> None:
    config = _config(workspace, "late", "base.fusion=null", "run.name=text")

    with pytest.raises(ConfigError, match=r"set base\.fusion"):
        Pipeline(config).prepare()


def test_a_column_that_is_not_there_is_named(workspace: Path) -> None:
    path = workspace / "scenes.parquet"
    sources = f"[{{type: images, paths: ['{path}'], image_column: picture}}]"
    config = _config(workspace, "late", f"prepare.sources={sources}", "run.name=column")

    with pytest.raises(ArtifactError, match="no column 'picture' of images, only image, question"):
        Pipeline(config).prepare()
