"""The whole pipeline on a tiny model, as processes: run, run again, killed, misused."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.pipeline import Pipeline
from tests.e2e.processes import (
    TINY_CONFIG,
    free_port,
    run_job,
    start_job,
    stop,
    wait_for_checkpoint,
)
from tests.fakes import write_tiny_model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model to start from."""
    directory = tmp_path_factory.mktemp("pipeline")
    write_tiny_model(directory / "model", max_positions=1024)
    return directory


def _overrides(workspace: Path, root: str) -> list[str]:
    return [f"run.root={workspace / root}", f"base.source={workspace / 'model'}"]


def _manifests(workspace: Path, root: str) -> dict[str, str]:
    files = (workspace / root / "tiny").glob("*/*/manifest.json")
    return {file.parent.parent.name: file.read_text() for file in files}


def test_pipeline_answers_and_reports_and_a_second_run_changes_nothing(workspace: Path) -> None:
    overrides = [*_overrides(workspace, "whole"), f"serve.port={free_port()}"]
    first = run_job("pipeline", *overrides)
    assert first.returncode == 0, first.stderr[-4000:]
    root = workspace / "whole" / "tiny"
    report = json.loads((root / "report.json").read_text())
    rows = {row["id"]: row for row in report["results"]}
    assert set(rows) == {
        "tiny.base_accuracy",
        "tiny.tuned_accuracy",
        "tiny.int8_accuracy",
        "tiny.tuned_gain_points",
        "tiny.int8_drop_points",
        "tiny.int8_size_share",
        "tiny.seconds",
    }
    assert rows["tiny.tuned_gain_points"]["met"] is False  # six steps teach a random model nothing
    assert set(report["durations_s"]) == {
        "base", "prepare", "train", "compress", "evaluate", "serve",
    }  # fmt: skip
    for name in ("training.png", "accuracy.png", "size_latency.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG"), name
        assert f"({name})" in (root / "report.md").read_text()
    assert "(expected: " in first.stdout, "the question went through the client"
    made = _manifests(workspace, "whole")
    assert set(made) == {"base", "prepare", "train", "compress", "evaluate"}

    second = run_job("pipeline", *overrides)
    assert second.returncode == 0, second.stderr[-4000:]
    assert _manifests(workspace, "whole") == made
    assert "train: step" not in second.stderr


def test_training_killed_with_its_driver_resumes_and_ends_bit_equal(workspace: Path) -> None:
    def settings(root: str) -> list[str]:
        return [*_overrides(workspace, root), "train.num_steps=30"]

    victim = start_job("pipeline", *settings("killed"), f"serve.port={free_port()}")
    checkpoints = workspace / "killed" / "tiny" / "train"
    wait_for_checkpoint(checkpoints, victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait(timeout=30)
    assert not list(checkpoints.glob("*/manifest.json")), "killed too late to test anything"
    for stage in ("base", "prepare"):
        made = Path("tiny") / stage
        shutil.copytree(workspace / "killed" / made, workspace / "uninterrupted" / made)

    resumed = run_job("train", *settings("killed"))
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    found = re.search(r"resuming after step (\d+)", resumed.stderr)
    assert found is not None, resumed.stderr[-4000:]
    assert 0 < int(found[1]) < 30
    uninterrupted = run_job("train", *settings("uninterrupted"))
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-4000:]
    weights = [
        next((workspace / root / "tiny" / "train").glob("*/model.safetensors")).read_bytes()
        for root in ("killed", "uninterrupted")
    ]
    assert weights[0] == weights[1]
    assert not list(checkpoints.glob("*/checkpoints")), "a finished run keeps no checkpoints"


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_pipeline_interrupted_while_training_leaves_only_finished_artifacts(
    workspace: Path, number: signal.Signals, exit_code: int
) -> None:
    root = f"interrupted-{number.name}"
    settings = [*_overrides(workspace, root), "train.num_steps=10000"]
    process = start_job("pipeline", *settings)
    train = workspace / root / "tiny" / "train"
    try:
        wait_for_checkpoint(train, process)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=90)
    finally:
        stop(process)
    assert process.returncode == exit_code, output
    assert ("the same command goes on" in output) == (number == signal.SIGINT)
    assert set(_manifests(workspace, root)) == {"base", "prepare"}


@pytest.mark.parametrize(
    ("job", "overrides", "message"),
    [
        ("train", ["train.learning_rat=1"], "train.learning_rat: unknown key; did you mean"),
        ("prepare", [], "run `python -m jobs.base` with the same configuration first"),
        ("base", ["base.source=no/such/model"], "no such file or directory"),
        ("base", ["serve.max_context_tokens=2048"], "above the base model's 1024 positions"),
    ],
)
def test_mistakes_exit_2_with_the_fix_and_no_traceback(
    workspace: Path, job: str, overrides: list[str], message: str
) -> None:
    done = run_job(job, *_overrides(workspace, "mistakes"), *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_config_file_is_named() -> None:
    done = run_job("train", config="no/such.yaml")
    assert done.returncode == 2
    assert "no/such.yaml" in done.stderr


def test_help_answers_within_a_second_and_lists_the_keys() -> None:
    run_job("train", "--help")  # the first import after a change compiles the sources
    started = time.perf_counter()
    done = run_job("train", "--help")
    assert time.perf_counter() - started < 1.0
    assert "train.learning_rate" in done.stdout


def test_an_address_where_no_ray_answers_is_named_at_once(workspace: Path) -> None:
    started = time.perf_counter()
    address = f"127.0.0.1:{free_port()}"
    done = run_job("base", *_overrides(workspace, "mistakes"), ray_address=address)
    assert done.returncode == 2
    assert f"RAY_ADDRESS is {address}, and no Ray answers there" in done.stderr
    assert time.perf_counter() - started < 30


def test_a_damaged_source_file_ends_in_one_line_without_a_traceback(workspace: Path) -> None:
    settings = _overrides(workspace, "damaged")
    Pipeline(load_config(TINY_CONFIG, settings), only="base").base()
    (workspace / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08 cut")
    source = f"prepare.sources=[{{type: files, paths: ['{workspace / 'cut.jsonl.gz'}']}}]"
    done = run_job("prepare", *settings, source)
    assert done.returncode == 2
    assert "cut.jsonl.gz: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
