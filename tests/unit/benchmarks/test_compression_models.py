"""What is compared with what: the same data and steps for every quantization arm."""

import dataclasses
from pathlib import Path

from jobs.benchmarks.compression_models import quantization_arms


def test_quantization_arms_differ_in_rounding_alone(tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in quantization_arms(tmp_path)}
    plain = arms["fp32"].config
    for arm in arms.values():
        unrounded = dataclasses.replace(
            arm.config.train, fake_quant=None, fake_quant_start_share=0, fake_quant_rotate=False
        )
        assert unrounded == plain.train
        assert arm.config.prepare == plain.prepare
        assert arm.config.base == plain.base
    assert arms["int8_ptq"].config.train.fake_quant is None
    assert arms["int8_qat"].config.train.fake_quant == "w8a8"
    assert arms["w4a8_qat"].config.train.fake_quant == arms["w4a8_qat"].config.compress.scheme
    rotated = {name for name, arm in arms.items() if arm.config.compress.rotate}
    assert rotated == {"int8_ptq_rotated", "int8_qat", "w4a8_ptq_rotated"}
    assert not arms["bf16"].is_compressed
