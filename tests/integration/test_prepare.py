"""The `prepare` stage on a local Ray: files in, batches and quarantine out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.config import PipelineConfig, load_config
from r1ray.data.batch_set import IGNORED, BatchSet
from r1ray.data.reasoning import draw_heldout
from r1ray.errors import ArtifactError
from r1ray.models.tokenizer import Tokenizer
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")


def _row(number: int) -> dict[str, object]:
    return {"prompt": f"question {number}", "completion": f"answer {number} " + "so " * number}


def _heldout_question() -> str:
    config = load_config("jobs/configs/tiny.yaml")
    return draw_heldout(config.tasks, config.evaluate.num_problems)[3].question


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    write_tiny_model(tmp_path / "model", max_positions=1024)
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps(_row(number)) for number in range(60)]
    lines[7] = '{"prompt": "no completion"}'
    lines[9] = "not json"
    lines[11] = json.dumps({"prompt": _heldout_question(), "completion": "leaked"})
    (data / "rows.jsonl").write_text("\n".join(lines) + "\n")
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello {n}"}]
        for n in range(10)
    ]
    pq.write_table(pa.table({"messages": chats}), data / "rows.parquet")
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={tmp_path}",
            f"base.source={tmp_path / 'model'}",
            f"prepare.sources=[{{type: files, paths: ['{data}']}}]",
        ],
    )


def test_every_good_row_is_batched_once_and_every_bad_one_is_quarantined(
    config: PipelineConfig,
) -> None:
    prepared = Pipeline(config).prepare()
    batches = BatchSet(prepared.local_dir)
    tokenizer = Tokenizer(prepared.local_dir.parents[1] / "base" / _base_id(prepared))
    answers = []
    for index in range(len(batches)):
        batch = batches[index]
        assert batch.input_ids_BT.numel() <= config.prepare.batch_tokens
        for labels in batch.labels_BT:
            answers.append(tokenizer.decode(labels[labels != IGNORED].tolist()).strip())
    expected = [f"answer {n} " + "so " * n for n in range(60) if n not in (7, 9, 11)]
    expected += [f"hello {n}" for n in range(10)]
    assert sorted(answers) == sorted(answer.strip() for answer in expected)
    quarantined = [json.loads(line) for line in (prepared.local_dir / "quarantine.jsonl").open()]
    assert [(row["row"], row["error"].split(" (")[0]) for row in quarantined] == [
        (7, "neither `messages` nor `prompt` and `completion`"),
        (9, "not JSON"),
        (11, "the question is held out for evaluation"),
    ]
    assert prepared.manifest.metrics["num_rows"] == 70


def test_too_many_bad_rows_stop_the_stage_and_say_where_the_reasons_are(
    config: PipelineConfig, tmp_path: Path
) -> None:
    bad = tmp_path / "data" / "bad.jsonl"
    bad.write_text("nonsense\n" * 30)
    with pytest.raises(ArtifactError, match=r"33 of 100 rows quarantined.*quarantine\.jsonl"):
        Pipeline(config).prepare()


def test_a_damaged_source_file_is_named_without_a_ray_traceback(
    config: PipelineConfig, tmp_path: Path
) -> None:
    (tmp_path / "data" / "damaged.parquet").write_bytes(b"PAR1 this is no Parquet file")
    with pytest.raises(ArtifactError, match=r"damaged\.parquet: cannot be read"):
        Pipeline(config).prepare()


def test_changed_source_files_are_another_run(config: PipelineConfig, tmp_path: Path) -> None:
    first = Pipeline(config).prepare()
    again = Pipeline(config).prepare()
    assert again.manifest == first.manifest
    with (tmp_path / "data" / "rows.jsonl").open("a") as stream:
        stream.write(json.dumps(_row(60)) + "\n")
    changed = Pipeline(config).prepare()
    assert changed.manifest.run_id != first.manifest.run_id
    assert changed.manifest.metrics["num_rows"] == 71


def _base_id(prepared: object) -> str:
    root = prepared.local_dir.parents[1] / "base"  # type: ignore[attr-defined]
    return next(root.glob("*/manifest.json")).parent.name
