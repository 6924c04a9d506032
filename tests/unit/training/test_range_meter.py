import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from r1ray.training.precision_policy import GroupRange
from r1ray.training.range_meter import MAX_SAMPLES, RangeMeter, TensorGroup, split_groups
from tests.fakes import tiny_model

FP16 = torch.finfo(torch.float16)
LEAST = FP16.tiny * FP16.eps


def _measure_plainly(gradients: list[Tensor], tiny: float, least: float) -> GroupRange:
    """The oracle: every element of a group, one after the other."""
    elements = torch.cat([gradient.flatten() for gradient in gradients]).tolist()
    nonzero = [abs(element) for element in elements if element != 0.0]
    nonfinite = sum(not math.isfinite(element) for element in elements)
    return GroupRange(
        amax=math.inf if nonfinite else max(nonzero, default=0.0),
        num_nonfinite=nonfinite,
        subnormal_share=sum(x < tiny for x in nonzero) / max(1, len(nonzero)),
        flushed_share=sum(x < least for x in nonzero) / max(1, len(nonzero)),
        forward_fault=0.0,
    )


def _wide(shape: tuple[int, ...], seed: int) -> Tensor:
    """Magnitudes from 1e-10 to 1e3, either sign, and one element in eight zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.empty(shape).uniform_(-10, 3, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    is_kept = torch.rand(shape, generator=generator) < 7 / 8
    return 10.0**exponents * signs * is_kept


def _group(name: str, *shapes: tuple[int, ...], seed: int = 0) -> TensorGroup:
    tensors = {}
    for index, shape in enumerate(shapes):
        tensor = nn.Parameter(torch.zeros(shape))
        tensor.grad = _wide(shape, seed + index)
        tensors[f"{name}.{index}"] = tensor
    return TensorGroup(name, tensors, (), None)


def _gradients(group: TensorGroup) -> list[Tensor]:
    return [tensor.grad for tensor in group.tensors.values() if tensor.grad is not None]


@pytest.mark.parametrize("seed", range(3))
def test_small_groups_are_measured_exactly_and_left_as_they_are(seed: int) -> None:
    groups = [
        _group("first", (64, 48), (64,), seed=seed),
        _group("second", (10, 3), seed=seed + 10),
        _group("third", (7,), (5, 2), (128, 128), seed=seed + 20),
    ]
    before = [gradient.clone() for group in groups for gradient in _gradients(group)]
    measured = RangeMeter(groups, torch.float16).measure()
    after = [gradient for group in groups for gradient in _gradients(group)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for group, seen in zip(groups, measured, strict=True):
        expected = _measure_plainly(_gradients(group), FP16.tiny, LEAST)
        assert 0.1 < expected.flushed_share < expected.subnormal_share < 0.6
        assert seen.amax == expected.amax
        assert seen.num_nonfinite == 0
        assert seen.subnormal_share == pytest.approx(expected.subnormal_share, rel=1e-6)
        assert seen.flushed_share == pytest.approx(expected.flushed_share, rel=1e-6)


@pytest.mark.parametrize("columns", [512, 576])
def test_large_groups_are_sampled_over_all_columns(columns: int) -> None:
    group = _group("large", (1200, columns), (columns,))
    weight = next(iter(group.tensors.values()))
    assert weight.grad is not None
    weight.grad[:, : columns // 4] = 1e-6  # a quarter of the columns is subnormal
    weight.grad[:, columns // 4 :] = 1.0
    weight.grad[-1, -1] = -123.0  # the largest is found wherever it is
    meter = RangeMeter([group], torch.float16)
    (seen,) = meter.measure()
    assert seen.amax == pytest.approx(_measure_plainly(_gradients(group), 0, 0).amax)
    # Five standard errors of a sample of 65,536.
    assert seen.subnormal_share == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / MAX_SAMPLES))


def test_zeros_and_missing_gradients_are_no_underflow() -> None:
    group = _group("zero", (8, 8), (8,))
    first, second = group.tensors.values()
    first.grad, second.grad = None, torch.zeros(8)
    (seen,) = RangeMeter([group], torch.float16).measure()
    assert seen == GroupRange(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_elements_that_are_not_finite_are_counted_and_their_tensor_is_named(value: float) -> None:
    groups = [_group("good", (8, 8)), _group("bad", (8, 8), (40, 8), (8,))]
    gradient = groups[1].tensors["bad.1"].grad
    assert gradient is not None
    gradient[3, :5] = value
    meter = RangeMeter(groups, torch.float16)
    good, bad = meter.measure()
    assert (good.num_nonfinite, bad.num_nonfinite) == (0, 5)
    assert math.isfinite(good.amax)
    assert bad.amax == math.inf
    assert meter.culprits == {1: "bad.1"}


def test_a_matrix_that_is_embedding_and_head_is_to_blame_only_if_nothing_else_is() -> None:
    model = tiny_model(tie_embeddings=True)
    meter = RangeMeter(split_groups(model), torch.float16)
    shared, layer = model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
    shared.grad = torch.full_like(shared, math.nan)
    assert [seen.num_nonfinite for seen in meter.measure()] == [0, 0, shared.numel()]
    layer.grad = torch.full_like(layer, math.inf)
    assert [seen.num_nonfinite for seen in meter.measure()] == [layer.numel(), 0, 0]
    assert meter.culprits == {0: "model.layers.0.mlp.up_proj.weight"}


def test_the_limits_are_those_of_the_dtype() -> None:
    group = _group("any", (64, 64))
    (seen,) = RangeMeter([group], torch.bfloat16).measure()
    assert seen.subnormal_share == seen.flushed_share == 0.0
    tensor = next(iter(group.tensors.values()))
    tensor.grad = torch.full((64, 64), 1.0)
    tensor.grad[:16] = 2.0**-127  # subnormal in bfloat16, whose least is 2^-133
    tensor.grad[:8] = 2.0**-135
    (seen,) = RangeMeter([group], torch.bfloat16).measure()
    assert (seen.subnormal_share, seen.flushed_share) == (0.25, 0.125)


def test_an_output_that_is_not_finite_is_seen_once() -> None:
    model = tiny_model()
    groups = split_groups(model)
    meter = RangeMeter(groups, torch.float16)
    ids = torch.arange(6)[None]
    model(ids)
    model.model.layers[1].mlp.register_forward_hook(lambda *arguments: arguments[2] * math.nan)
    model(ids)
    assert [seen.forward_fault for seen in meter.measure()] == [0.0, 0.0, 1.0, 0.0]
    with torch.no_grad():
        model(ids)  # an evaluation is no step
    assert [seen.forward_fault for seen in meter.measure()] == [0.0] * 4


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_trainable_tensor_belongs_to_one_group(tie_embeddings: bool) -> None:
    model = tiny_model("qwen3", tie_embeddings=tie_embeddings)
    groups = split_groups(model)
    assert [group.name for group in groups] == [
        *([] if tie_embeddings else ["embedding"]),
        "layers.0",
        "layers.1",
        "head",
    ]
    names = Counter(name for group in groups for name in group.tensors)
    assert names == Counter(name for name, _ in model.named_parameters())
    for group in groups:
        for name, tensor in group.tensors.items():
            assert model.get_parameter(name) is tensor
    assert groups[-1].products == (model.lm_head,)
    assert any(tensor is model.lm_head.weight for tensor in groups[-1].tensors.values())


def test_frozen_tensors_are_left_out() -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    groups = split_groups(model)
    assert [group.name for group in groups] == ["layers.1", "head"]
    assert not any("mlp" in name for name in groups[0].tensors)
