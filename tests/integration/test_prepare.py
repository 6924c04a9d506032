"""The `prepare` stage on a local Ray: files in, batches and quarantine out."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from r1ray.artifacts import Artifact
from r1ray.config import PipelineConfig, load_config
from r1ray.config.prepare import BucketsConfig, LongContextSourceConfig, PackingConfig
from r1ray.data import batch_writer, pipeline, planners
from r1ray.data.batch_set import IGNORED, BatchSet
from r1ray.data.reasoning import draw_heldout
from r1ray.data.tokenize_table import tokenize_table
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


def test_long_texts_are_written_and_batched(config: PipelineConfig) -> None:
    source = LongContextSourceConfig(
        type="long_context", num_tasks=2, num_documents=3, first_seed=600
    )
    prepare = dataclasses.replace(
        config.prepare, sources=[source], max_tokens=1000, batch_tokens=1000
    )
    made = Pipeline(dataclasses.replace(config, prepare=prepare)).prepare()
    assert made.manifest.metrics["num_samples"] == 5
    batches = BatchSet(made.local_dir)
    rows = [batches[index] for index in range(len(batches))]
    assert sum(row.num_targets for row in rows) > 3 * 500  # documents are targets throughout


def test_changed_source_files_are_another_run(config: PipelineConfig, tmp_path: Path) -> None:
    first = Pipeline(config).prepare()
    again = Pipeline(config).prepare()
    assert again.manifest == first.manifest
    with (tmp_path / "data" / "rows.jsonl").open("a") as stream:
        stream.write(json.dumps(_row(60)) + "\n")
    changed = Pipeline(config).prepare()
    assert changed.manifest.run_id != first.manifest.run_id
    assert changed.manifest.metrics["num_rows"] == 71


def _with_prepare(config: PipelineConfig, **changes: Any) -> PipelineConfig:
    return dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, **changes))


def test_split_rows_are_packed_and_the_artifact_shows_what_was_made(config: PipelineConfig) -> None:
    config = _with_prepare(
        config,
        batching=PackingConfig(type="packing"),
        overflow="split",
        max_tokens=96,
        batch_tokens=400,
    )
    prepared = Pipeline(config).prepare()
    metrics = prepared.manifest.metrics
    tokenizer = Tokenizer(prepared.local_dir.parents[1] / "base" / _base_id(prepared))
    batches = BatchSet(prepared.local_dir)
    texts: list[str] = []
    for index in range(len(batches)):
        batch = batches[index]
        assert batch.input_ids_BT.shape[0] == 1
        assert batch.input_ids_BT.shape[1] <= 400
        for labels in batch.labels_BT[0].split(batch.document_lengths):
            targets = labels[labels != IGNORED].tolist()
            if targets:  # padding has none
                assert len(labels) <= 96
                texts.append(tokenizer.decode(targets))
    assert len(texts) == metrics["num_samples"]
    numbers = [int(match[1]) for text in texts if (match := re.match(r"answer (\d+) ", text))]
    assert sorted(numbers) == [n for n in range(60) if n not in (7, 9, 11)]
    # A split may end within a "so", but no letter is lost.
    assert sum(text.count("o") for text in texts) == sum(numbers) + 10  # one of each "hello"
    assert metrics["num_over_long"] > 0
    assert metrics["num_samples"] > metrics["num_rows"] - metrics["num_quarantined"] == 67
    assert metrics["padding_share"] < 0.05

    summary = (prepared.local_dir / "summary.md").read_text()
    assert f"| {metrics['num_over_long']:,} |" in re.sub(" +", " ", summary)
    assert (prepared.local_dir / "summary.png").read_bytes().startswith(b"\x89PNG")
    outputs = {output.path for output in prepared.manifest.outputs}
    assert outputs >= {"summary.md", "summary.png", "summary.json"}


def test_drifting_files_are_fitted_anew_and_tokenized_by_several_tasks(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, log = tmp_path / "drifting", tmp_path / "tasks"
    for directory in (data, log):
        directory.mkdir()
    for name, repeats in (("a.jsonl", 2), ("b.jsonl", 60)):
        rows = [
            {"prompt": name, "completion": f"{name} {n:03} " + "so " * (repeats + n % 10)}
            for n in range(300)
        ]
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def logged(table: pa.Table, **options: Any) -> pa.Table:
        task = ray.get_runtime_context().get_task_id()
        (log / f"{task} {table.num_rows}").touch()
        return tokenize_table(table, **options)

    monkeypatch.setattr(pipeline, "tokenize_table", logged)
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 16_384)
    monkeypatch.setattr(batch_writer, "WINDOW_SAMPLES", 100)
    monkeypatch.setattr(planners, "DRIFT_ROWS", 100)
    batching = BucketsConfig(type="buckets", num_buckets=4, fit_rows=100)
    sources = [dataclasses.replace(config.prepare.sources[0], paths=[str(data)])]
    prepared = Pipeline(_with_prepare(config, batching=batching, sources=sources)).prepare()

    tasks = [path.name.split() for path in log.iterdir()]
    assert len({task for task, _ in tasks}) > 2  # a file is more than one task's work
    assert sum(int(num_rows) for _, num_rows in tasks) == 600
    first, *between, last = prepared.manifest.metrics["fits"]
    assert len(between) <= 1  # a window may hold rows of both files
    assert first["first_sample"] == 0
    assert 200 <= last["first_sample"] <= 500
    assert last["distance"] > 0.3
    assert first["ceilings"][-1] == last["ceilings"][-1] == config.prepare.max_tokens
    assert first["ceilings"][-2] < last["ceilings"][-2]
    batches = BatchSet(prepared.local_dir)
    rows_read = sum(len(batches[index].input_ids_BT) for index in range(len(batches)))
    assert rows_read == prepared.manifest.metrics["num_samples"] == 600


def _base_id(prepared: Artifact) -> str:
    root = prepared.local_dir.parents[1] / "base"
    return next(root.glob("*/manifest.json")).parent.name
