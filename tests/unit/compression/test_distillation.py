import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.compression.distillation import (
    dense_kl,
    keep_top_k,
    reverse_kl,
    sparse_kl,
    top_k_kl,
)
from r1ray.errors import ShapeError


def _logits(seed: int, positions: int = 6, vocabulary: int = 50, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(positions, vocabulary, generator=generator)


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_dense_kl_is_torchs(seed: int, temperature: float) -> None:
    student, teacher = _logits(seed), _logits(seed + 1)
    expected = F.kl_div(
        torch.log_softmax(student / temperature, -1),
        torch.softmax(teacher / temperature, -1),
        reduction="sum",
    )
    torch.testing.assert_close(dense_kl(student, teacher, temperature).sum(), expected)


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(1, 50),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_kept_tokens_and_tail_make_a_distribution_whose_kl_bounds_the_dense_one(
    seed: int, top_k: int, temperature: float
) -> None:
    student, teacher = _logits(seed), _logits(seed + 1)
    targets = keep_top_k(teacher, top_k, temperature)
    mass = targets.log_probs_PK.exp().sum(1) + targets.tail_P.exp()
    torch.testing.assert_close(mass, torch.ones(6))
    found = sparse_kl(student, targets, temperature)
    dense = dense_kl(student, teacher, temperature)
    assert torch.all(found >= -1e-4)
    assert torch.all(found <= dense + 1e-4)  # merging outcomes can only lose divergence
    if top_k == 50:
        torch.testing.assert_close(found, dense)


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient() -> None:
    teacher = _logits(0)
    student = teacher.clone().requires_grad_()
    sparse_kl(student, keep_top_k(teacher, 5, 2.0), 2.0).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(teacher), atol=1e-6, rtol=0)


def test_the_tail_stops_a_student_that_spreads_its_mass_where_top_k_alone_does_not() -> None:
    """With the right ratios among the kept tokens, plain top-k sees nothing wrong."""
    teacher = torch.zeros(1, 50)
    teacher[0, :4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    student = teacher.clone()
    student[0, 4:] += 5.0  # most of its mass is in the tail
    targets = keep_top_k(teacher, 4, 1.0)
    assert top_k_kl(student, targets, 1.0).item() == pytest.approx(0.0, abs=1e-5)
    dense = dense_kl(student, teacher, 1.0).item()
    assert sparse_kl(student, targets, 1.0).item() == pytest.approx(dense, rel=0.01)
    assert dense > 0.3


@pytest.mark.parametrize("peak", [40.0, 300.0])
def test_a_certain_teacher_gives_finite_losses_and_gradients(peak: float) -> None:
    teacher = torch.zeros(2, 50)
    teacher[:, 3] = peak
    targets = keep_top_k(teacher, 8, 1.0)
    student = _logits(1, positions=2).requires_grad_()
    loss = sparse_kl(student, targets, 1.0).sum()
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert loss.item() == pytest.approx(
        float(F.cross_entropy(student.detach(), torch.tensor([3, 3]), reduction="sum")), rel=1e-4
    )


def test_reverse_kl_swaps_the_sides_and_reaches_the_student() -> None:
    student, teacher = _logits(0).requires_grad_(), _logits(1)
    loss = reverse_kl(student, teacher, 1.0).sum()
    torch.testing.assert_close(loss, dense_kl(teacher, student, 1.0).sum())
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0


def test_more_tokens_than_the_vocabulary_has_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"top_k \(51\) is above the vocabulary of 50"):
        keep_top_k(_logits(0), 51, 1.0)
    assert torch.all(keep_top_k(_logits(0), 50, 1.0).tail_P == -math.inf)
