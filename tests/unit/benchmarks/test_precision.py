"""The precision benchmark: an honest baseline, fair provocations, the arithmetic of its rows."""

import math
import random
from typing import Any

import pytest
import torch

from jobs.benchmarks.precision_arms import ARMS, GradScalerPolicy, Shape, draw_batches
from jobs.benchmarks.precision_failures import FAILURES, has_survived, run_failure
from jobs.benchmarks.precision_report import failure_rows, render_failures, step_rows
from jobs.benchmarks.precision_steps import POISONED_STEPS, SHAPES, STEP_ARMS, run_steps
from r1ray.data.batch_set import IGNORED
from r1ray.training.precision_policy import StepRange


def test_the_baseline_scales_as_torchs_own_grad_scaler() -> None:
    rng = random.Random(0)
    policy = GradScalerPolicy(2.0**16, growth_interval=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for _ in range(100):
        is_finite = rng.random() < 0.9
        weight.grad = None
        scaler.scale(weight.sum() * (1.0 if is_finite else math.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        policy.update(StepRange(is_finite=is_finite))
        assert policy.loss_scale == scaler.get_scale()
        assert policy.strikes == 0


def test_a_seed_gives_the_same_text_whose_tokens_but_the_first_are_targets() -> None:
    batches = draw_batches(2, 3, 8, vocab_size=16, seed=1)
    for batch in batches:
        assert batch.num_tokens == 24
        assert batch.num_targets == int((batch.labels_BT != IGNORED).sum()) == 21
        assert torch.equal(batch.labels_BT[:, :-1], batch.input_ids_BT[:, 1:])
    again, other = (draw_batches(2, 3, 8, vocab_size=16, seed=seed) for seed in (1, 2))
    assert torch.equal(again[0].input_ids_BT, batches[0].input_ids_BT)
    assert not torch.equal(other[0].input_ids_BT, batches[0].input_ids_BT)


def test_all_arms_take_the_same_steps_and_the_controller_promotes_and_demotes() -> None:
    clean_steps, num_steps = 5, 25
    shape = Shape(16, 44, num_heads=4, num_kv_heads=2, num_layers=4, vocab_size=64)
    steps = run_steps(shape, num_steps, rows=1, tokens=8, patience=(10, clean_steps))
    assert set(steps["arms"]) == set(STEP_ARMS)
    for arm, result in steps["arms"].items():
        assert result["num_updates"] == num_steps - len(POISONED_STEPS)
        is_ours = arm == "range"
        assert result["num_promotions"] == result["num_demotions"] == is_ours
        assert (sum(result["controller"]) > 0) == (arm in ("range", "gradscaler"))
    share = clean_steps / (5 * num_steps)  # one of five groups
    assert steps["arms"]["range"]["fp32_share"] == pytest.approx(share)
    assert {row.id for row in step_rows(dict.fromkeys(SHAPES, steps))} >= {
        "precision.throughput_vs_fp32",
        "precision.loss_gap",
        "precision.controller_overhead_share",
    }


@pytest.mark.parametrize("failure", ["underflow", "wide_gradients"])
def test_in_fp32_a_provocation_does_no_harm(failure: Any) -> None:
    untouched = run_failure("nan", "fp32", num_steps=20)  # which begins later
    run = run_failure(failure, "fp32", num_steps=20)
    for result in (untouched, run):
        assert result["error"] is None
        assert result["num_updates"] == 20
    assert untouched["final_loss"] < math.log(16) - 0.1  # it learns
    assert run["final_loss"] < 1.01 * untouched["final_loss"]


def test_an_arm_that_gives_up_is_a_result() -> None:
    run = run_failure("wide_gradients", "plain", num_steps=20)
    assert run["num_updates"] == 0
    assert "not finite in 3 steps in a row" in run["error"]


def _run(**changes: Any) -> dict[str, Any]:
    run = {"error": None, "is_finite": True, "final_loss": 1.0, "num_updates": 9, "num_skipped": 0}
    return {**run, "loss_scales": [1.0, 2.0], "max_promoted": 0, "fp32_share": 0.0, **changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"final_loss": 1.019}, True),
        ({"final_loss": 1.021}, False),
        ({"final_loss": math.nan}, False),
        ({"final_loss": None}, False),
        ({"is_finite": False}, False),
        ({"error": "stopped"}, False),
    ],
)
def test_survival_is_a_finished_run_with_finite_weights_and_a_loss_within_two_percent(
    changes: dict[str, Any], expected: bool
) -> None:
    assert has_survived(_run(**changes), _run()) is expected


def test_a_kind_is_survived_only_in_all_its_forms() -> None:
    runs: dict[str, dict[str, Any]] = {
        failure: {arm: _run() for arm in ARMS} for failure in FAILURES
    }
    runs["wide_gradients"]["gradscaler"] = _run(final_loss=2.0)
    runs["overflow"]["plain"] = _run(error="stopped")
    rows = {row.id: row for row in failure_rows(runs)}
    survived = "precision.provoked_failures_survived"
    assert rows[survived].value == 4
    assert rows[survived].met
    assert rows[f"{survived}.gradscaler"].value == rows[f"{survived}.plain"].value == 3
    table = render_failures(runs).splitlines()
    assert len(table) == 2 + len(FAILURES) * len(ARMS)
    assert sum("**no**" in line for line in table) == 2


def test_ratios_are_those_of_the_summed_times() -> None:
    def arm(seconds: float, controller: float, loss: float) -> dict[str, Any]:
        times = {"seconds": [seconds] * 10, "controller": [controller] * 10, "final_loss": loss}
        return {**times, "fp32_share": 0.1, "num_promotions": 1, "num_demotions": 1}

    arms = {"fp32": arm(3.0, 0.0, 2.0), "plain": arm(1.0, 0.0, 2.1), "gradscaler": arm(1, 0, 2)}
    arms["range"] = arm(2.0, 0.1, 1.98)
    steps = {"arms": arms, "step_tokens": 600}
    rows = {row.id: row for row in step_rows(dict.fromkeys(SHAPES, steps))}
    assert rows["precision.throughput_vs_fp32"].value == pytest.approx(1.5)
    assert rows["precision.throughput_vs_fp32"].met
    assert rows["precision.throughput_vs_fp32"].baseline_value == pytest.approx(200.0)
    assert rows["precision.loss_gap"].value == pytest.approx(0.01)  # better or worse
    assert rows["precision.loss_gap"].met is False
    assert rows["precision.controller_overhead_share"].value == pytest.approx(0.05)
    assert rows["precision.controller_overhead_share"].met is False
    assert rows["precision.tokens_per_s.bf16_range"].value == pytest.approx(300.0)
