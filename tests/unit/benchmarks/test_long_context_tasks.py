"""The benchmark's tasks with a tiny model: it is taught, gets gates, and is asked."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.benchmarks import long_context_models, long_context_tasks
from jobs.benchmarks.long_context_arms import Arm
from jobs.benchmarks.long_context_models import Lesson, TaskSize, render_prompt
from jobs.benchmarks.long_context_tasks import TaskBenchmark
from jobs.benchmarks.parts import StoredParts
from r1ray.data.long_context import TASKS
from r1ray.errors import ArtifactError
from r1ray.models import load_model, save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.gates import attach_gates, is_gate
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model

_ASKED = ("niah_multikey_2", "fwe")
_LENGTH = 2400
_LESSON = Lesson(_ASKED, 4, 1500, batch_tokens=1500, batches_per_step=1, learning_rate=1e-3)
_SIZE = TaskSize(
    (_LESSON, dataclasses.replace(_LESSON, num_texts=2, max_tokens=2000, batch_tokens=2000)),
    num_gate_texts=2,
    num_gate_documents=1,
    num_questions=4,
    max_questions_per_text=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def benchmark(folder: Path) -> Iterator[TaskBenchmark]:
    """It has run."""
    tasks = {name: TASKS[name] for name in _ASKED}
    base = write_tiny_model(folder / "base", max_positions=4096)
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32)
    attach_gates(model)
    save_model(model, folder / "gates")
    copy_tokenizer(base, folder / "gates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1RAY_COMMIT", "abc")
        patch.setattr(long_context_tasks, "TASKS", tasks)
        patch.setattr(long_context_models, "CONTEXT", _LENGTH)
        patch.setattr(long_context_tasks, "LENGTHS", (_LENGTH,))
        patch.setattr(long_context_tasks, "PRECISIONS", ("int8",))
        work = folder / "work"
        benchmark = TaskBenchmark(
            StoredParts(work), work, str(base), _SIZE, lambda: folder / "gates"
        )
        assert benchmark.results() == {}
        benchmark.run()
        yield benchmark


def test_questions_about_a_text_are_asked_together_and_answered_as_if_alone(
    benchmark: TaskBenchmark, folder: Path
) -> None:
    parts, tokenizer = StoredParts(folder / "work"), Tokenizer(folder / "base")
    found = benchmark.results()["int8"]
    asked = {
        cell: [[len(text) for text in texts] for texts in both]
        for cell, both in found["scores"].items()
    }
    assert asked == {
        ("niah_multikey_2", _LENGTH): [[2, 2], [2, 2]],
        ("fwe", _LENGTH): [[1] * 4, [1] * 4],
    }
    sheets = [parts.read(f"tasks_int8_sparse_fwe_{_LENGTH}_{sheet}") for sheet in (0, 1)]
    assert list(map(len, sheets)) == [2, 2]
    [several] = parts.read(f"tasks_int8_sparse_niah_multikey_2_{_LENGTH}_1")
    arm, model = Arm("int8", "sparse"), folder / "work" / "gated"
    [text] = benchmark.write_texts("niah_multikey_2", _LENGTH, sheet=1)
    prompts = [render_prompt(tokenizer, task.prompt) for task in text]
    loaded = arm.load(model)
    alone = [arm.complete(loaded, tokenizer, [prompt], 16)[0] for prompt in prompts]
    assert alone == several["outputs"]


def test_a_missing_sheet_alone_is_asked_again(benchmark: TaskBenchmark, folder: Path) -> None:
    work = folder / "work"
    before = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    lost = work / f"tasks_int8_dense_fwe_{_LENGTH}_1.json"
    said = lost.read_bytes()
    lost.unlink()
    benchmark.run()
    after = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert {path for path in after if after[path] != before[path]} == {lost}
    assert lost.read_bytes() == said


def test_answers_of_models_that_are_gone_are_refused(
    benchmark: TaskBenchmark, folder: Path
) -> None:
    gates = folder / "work" / "tasks_gates.json"
    gates.rename(folder / "away")
    try:
        with pytest.raises(ArtifactError, match=r"^tasks_int8_sparse_.*what tasks_gates was") as no:
            benchmark.run()
        assert "dense" not in str(no.value)
    finally:
        (folder / "away").rename(gates)


def test_gates_go_on_from_those_of_the_published_model(
    benchmark: TaskBenchmark, folder: Path
) -> None:
    before, after, tuned = (
        load_model(folder / name, dtype=torch.float32).state_dict()
        for name in ("gates", "work/gated", "work/learned_1")
    )
    gates = [name for name in before if is_gate(name)]
    assert gates
    assert any(not torch.equal(before[name], after[name]) for name in gates)
    weights = [name for name in before if not is_gate(name)]
    assert all(torch.equal(after[name], tuned[name]) for name in weights)
    assert any(not torch.equal(before[name], after[name]) for name in weights)
    assert len(benchmark.gate_training()["result"]) == 3
