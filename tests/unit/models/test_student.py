import pytest
import torch

from r1ray.config.schema import StudentConfig
from r1ray.errors import ConfigError
from r1ray.models.config import Family
from r1ray.models.student import build_student, plan_student
from tests.fakes import tiny_config, tiny_model
from tests.unit.oracle import FAMILIES, random_ids


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_keeps_everything_is_its_teacher(
    family: Family, tie_embeddings: bool
) -> None:
    teacher = tiny_model(family, tie_embeddings=tie_embeddings)
    student = build_student(teacher, StudentConfig(layers=[0, 1]))
    ids = random_ids(2, 12)
    with torch.inference_mode():
        assert torch.equal(student(ids), teacher(ids))
    assert student.model.norm.weight is not teacher.model.norm.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_off_what_is_zero_changes_nothing(family: Family) -> None:
    """Silent neurons, groups and layers are found and left out, wherever they are."""
    teacher = tiny_model(family)
    kept = torch.arange(1, 64, 2)  # of 64 neurons, those with odd numbers
    with torch.no_grad():
        for block in teacher.model.layers:
            block.mlp.down_proj.weight[:, ::2] = 0.0
            block.self_attn.o_proj.weight[:, :16] = 0.0  # group 0: two heads of 8
        teacher.model.layers[0].mlp.down_proj.weight.zero_()
        teacher.model.layers[0].self_attn.o_proj.weight.zero_()
    config = StudentConfig(layers=[1], intermediate_size=len(kept), num_kv_heads=1)
    student = build_student(teacher, config)
    ids = random_ids(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(student(ids), teacher(ids), rtol=1e-5, atol=1e-5)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


def test_a_narrower_residual_stream_keeps_the_channels_with_the_largest_embedding() -> None:
    teacher = tiny_model(tie_embeddings=True)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, ::2] *= 0.01
    student = build_student(teacher, StudentConfig(hidden_size=16))
    expected = torch.arange(1, 32, 2)
    weight = student.model.embed_tokens.weight
    assert torch.equal(weight, teacher.model.embed_tokens.weight[:, expected])
    assert student.lm_head.weight is weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_residual_stream_takes_the_same_channels_everywhere(family: Family) -> None:
    """With the other channels silent all along, and norms made to fit, nothing changes."""
    teacher = tiny_model(family, tie_embeddings=True)
    silent = torch.arange(0, 32, 2)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, silent] = 0.0
        for block in teacher.model.layers:
            block.self_attn.o_proj.weight[silent] = 0.0
            block.mlp.down_proj.weight[silent] = 0.0
    student = build_student(teacher, StudentConfig(hidden_size=16))
    ids = random_ids(2, 12)
    with torch.inference_mode():
        hidden = teacher.model.embed_tokens(ids)
        assert torch.equal(student.model.embed_tokens(ids), hidden[..., 1::2])
        # A norm over half the channels divides by a root mean square that is sqrt(2) larger.
        for norm in (module for module in student.modules() if type(module).__name__ == "RMSNorm"):
            if norm.weight.shape == (16,):
                norm.weight.mul_(2**0.5)
                norm.eps *= 2
        torch.testing.assert_close(student(ids), teacher(ids), rtol=1e-4, atol=1e-4)


def test_a_narrower_student_answers() -> None:
    student = build_student(tiny_model(), StudentConfig(hidden_size=16))
    assert student(random_ids(1, 4)).shape == (1, 4, 300)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (StudentConfig(layers=[0, 2]), "layer 2, but the base model's last one is 1"),
        (StudentConfig(hidden_size=64), r"hidden_size \(64\) is above the base model's 32"),
        (StudentConfig(intermediate_size=65), r"intermediate_size \(65\)"),
        (StudentConfig(num_kv_heads=3), r"num_kv_heads \(3\)"),
    ],
)
def test_a_student_larger_than_its_teacher_is_refused(
    config: StudentConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_student(tiny_config(), config)
