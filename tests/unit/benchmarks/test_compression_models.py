"""What is compared with what: the same data and steps for every arm."""

import dataclasses
from pathlib import Path

from jobs.benchmarks.compression_models import (
    equal_compute_steps,
    quantization_arms,
    student_config,
)
from tests.fakes import tiny_config


def test_quantization_arms_differ_in_rounding_alone(tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in quantization_arms(tmp_path)}
    plain = arms["fp32"].config
    for arm in arms.values():
        assert dataclasses.replace(arm.config.train, fake_quant=None) == plain.train
        assert arm.config.prepare == plain.prepare
        assert arm.config.base == plain.base
    assert arms["int8_ptq"].config.train.fake_quant is None
    assert arms["int8_qat"].config.train.fake_quant == "w8a8"
    assert arms["w4a8_qat"].config.train.fake_quant == arms["w4a8_qat"].config.compress.scheme
    assert not arms["bf16"].is_compressed


def test_students_differ_in_their_teacher_and_steps_alone(tmp_path: Path) -> None:
    taught = student_config(tmp_path, tmp_path, has_teacher=True, seed=1, num_steps=500)
    plain = student_config(tmp_path, tmp_path, has_teacher=False, seed=1, num_steps=600)
    assert taught.distill is not None
    assert plain.distill is None
    assert plain.student == taught.student
    assert plain.prepare == taught.prepare
    assert dataclasses.replace(plain.train, num_steps=500) == taught.train
    assert plain.run == taught.run


def test_steps_without_a_teacher_make_up_for_its_forward() -> None:
    shape = tiny_config()
    steps = equal_compute_steps(
        teacher=shape, student=shape, stored_tokens=300, trained_tokens=1000, num_steps=100
    )
    assert steps == 110  # a forward is a third of a step
