import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1ray.compression.distillation import target_logits
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.errors import ArtifactError, ShapeError
from r1ray.models.decoder import Decoder
from r1ray.training.consolidation import (
    Consolidation,
    add_fisher,
    load_fisher,
    measure_fisher,
    save_fisher,
)
from r1ray.training.objective import CrossEntropy
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch


def _two_targets() -> MicroBatch:
    batch = random_batch(1, 6, seed=0)
    labels_BT = torch.full_like(batch.labels_BT, IGNORED)
    labels_BT[0, [2, 4]] = batch.labels_BT.clamp(min=3)[0, [2, 4]]
    return MicroBatch(batch.input_ids_BT, labels_BT, 6, 2)


def _exact_fisher(model: Decoder, batch: MicroBatch) -> dict[str, Tensor]:
    """Σ over targets and tokens of p · (∇ log p)², by autograd, a mean over the targets."""
    parameters = dict(model.named_parameters())
    exact = {name: torch.zeros_like(item) for name, item in parameters.items()}
    log_probs_PV = target_logits(model, batch).log_softmax(-1)
    for row in log_probs_PV:
        for log_prob in row:
            gradients = torch.autograd.grad(
                log_prob, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    exact[name] += log_prob.exp().detach() * gradient.square()
    return {name: total / len(log_probs_PV) for name, total in exact.items()}


def test_the_measured_fisher_information_is_that_of_autograd() -> None:
    model, batch = tiny_model(), _two_targets()
    exact = _exact_fisher(model, batch)
    draws = 1500
    measured = measure_fisher(model, [batch] * draws, seed=0)
    for name, expected in exact.items():
        # A sum over a tensor averages 1,500 draws of two tokens: a few percent.
        assert measured[name].sum().item() == pytest.approx(expected.sum().item(), rel=0.1), name
    mine, theirs = (torch.cat([item.flatten() for item in of.values()]) for of in (measured, exact))
    assert torch.corrcoef(torch.stack([mine, theirs]))[0, 1] > 0.99
    assert all(item.grad is None for item in model.parameters())


def test_it_is_of_the_model_and_not_of_the_targets() -> None:
    batch = _two_targets()
    other = MicroBatch(
        batch.input_ids_BT, torch.where(batch.labels_BT == IGNORED, IGNORED, 7), 6, 2
    )
    first, second = (measure_fisher(tiny_model(), [item], seed=1) for item in (batch, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    nothing = MicroBatch(batch.input_ids_BT, torch.full_like(batch.labels_BT, IGNORED), 6, 0)
    with pytest.raises(ShapeError, match="target tokens, and there are none"):
        measure_fisher(tiny_model(), [nothing], seed=0)


def test_the_penalty_pulls_by_strength_times_importance_times_distance() -> None:
    model, batch = tiny_model(), random_batch(3, 8, seed=1)
    fisher = {name: torch.rand_like(item) for name, item in model.named_parameters()}
    objective = Consolidation(CrossEntropy(), model, fisher, strength=5.0)
    anchors = {name: item.detach().clone() for name, item in model.named_parameters()}
    assert objective.penalty(model).item() == 0.0
    with torch.no_grad():
        for item in model.parameters():
            item.add_(torch.randn_like(item), alpha=0.01)
    CrossEntropy().loss(model, batch).backward()
    alone = {
        name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None
    }
    model.zero_grad()
    objective.loss(model, batch).backward()
    for name, item in model.named_parameters():
        assert item.grad is not None
        pull = 5.0 * fisher[name] * (item.detach() - anchors[name])
        # Once for each target token: after the division by their number, once.
        expected = alone[name] + batch.num_targets * pull
        torch.testing.assert_close(item.grad, expected, atol=1e-4, rtol=1e-4)


def test_fisher_information_adds_up_and_comes_back_from_its_file(tmp_path: Path) -> None:
    model = tiny_model()
    one = {name: torch.rand_like(item) for name, item in model.named_parameters()}
    assert all(torch.equal(add_fisher(None, one)[name], one[name]) for name in one)
    path = tmp_path / "memory" / "fisher.safetensors"
    assert load_fisher(path, model) is None
    save_fisher(add_fisher(one, one), path)
    loaded = load_fisher(path, model)
    assert loaded is not None
    assert all(torch.equal(loaded[name], 2 * one[name]) for name in one)
    with pytest.raises(ArtifactError, match=r"has no model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_fisher(path, tiny_model("qwen2"))
    path.write_bytes(b"no safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_fisher(path, model)


def test_the_objective_is_the_inner_one_where_nothing_moved() -> None:
    model, batch = tiny_model(), random_batch(3, 8, seed=1)
    fisher = {name: torch.ones_like(item) for name, item in model.named_parameters()}
    objective = Consolidation(CrossEntropy(), model, fisher, strength=1e3)
    assert objective.recall is None
    assert objective.draw(model, batch, 0) is batch
    inner = CrossEntropy().loss(model, batch).item()
    assert math.isclose(objective.loss(model, batch).item(), inner, rel_tol=1e-6)
