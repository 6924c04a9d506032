import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r1ray.config.exchange import StreamExchangeConfig
from r1ray.config.fusion import FusionType
from r1ray.config.training import TrainConfig
from r1ray.errors import DivergenceError
from r1ray.exchange import LocalTransport, StepOutcome, StepTotals, build_exchange
from r1ray.exchange.dense import DenseExchange
from r1ray.models.fusion import RowImages
from r1ray.training.loss import summed_loss
from r1ray.training.precision import Precision, agree_precision, resolve_precision
from r1ray.training.range_controller import RangeController
from r1ray.training.range_meter import split_groups
from r1ray.training.step import TrainState
from tests.fakes import tiny_model
from tests.unit.exchange.threads import run_workers
from tests.unit.models.test_fusion import TYPES, build_model, build_row, random_pixels
from tests.unit.training.batches import random_batch, split

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _config(precision: str = "fp16", policy: str = "range", **changes: Any) -> TrainConfig:
    settings = {"num_steps": 200, "warmup_steps": 4, "learning_rate": 3e-3}
    return TrainConfig(precision=precision, precision_policy=policy, **{**settings, **changes})


class Worker(TrainState):
    """A `TrainState` whose precision may be looked at."""

    @property
    def precision(self) -> Precision:
        return self._precision

    @property
    def policy(self) -> Any:
        return self._precision._policy


def _state(precision: str = "fp16", policy: str = "range", **options: Any) -> Worker:
    model = tiny_model(tie_embeddings=options.pop("tie_embeddings", False))
    return Worker(model, _config(precision, policy, **options), DenseExchange(), LocalTransport())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_f": True, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_multiplies_it(
    capabilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "range", CPU) == expected
    for choice in ("fp32", "bf16", "fp16"):
        assert resolve_precision(choice, "range", CPU) == choice


@pytest.mark.parametrize(
    ("has_bf16", "policy", "expected"),
    [(True, "none", "bf16"), (False, "range", "fp16"), (False, "none", "fp32")],
)
def test_auto_on_a_gpu_without_bf16_is_fp16_if_the_loss_is_scaled(
    has_bf16: bool, policy: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision("auto", policy, CUDA) == expected


class _OtherWorker(LocalTransport):
    """Two workers, of which the other one adds `vote`."""

    world_size = 2

    def __init__(self, vote: list[float]) -> None:
        super().__init__()
        self._vote = torch.tensor(vote)

    def all_reduce_sum(self, x: Tensor) -> Any:
        x += self._vote
        return super().all_reduce_sum(x)


def test_workers_whose_hardware_differs_fall_back_to_fp32() -> None:
    bf16 = _OtherWorker([0.0, 1.0, 0.0])
    assert agree_precision("bf16", CPU, bf16) == "bf16"
    assert agree_precision("fp16", CPU, bf16) == "fp32"
    assert agree_precision("fp32", CPU, bf16) == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_keeps_float32_weights_gradients_and_loss(precision: str) -> None:
    model, batch = tiny_model(), random_batch(2, 12, seed=0)
    exact = summed_loss(model, batch)
    with Precision(model, _config(precision), LocalTransport()).autocast():
        loss = summed_loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits of every product; the loss sums some ten targets.
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert loss.item() != exact.item()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("settings", [("fp32", "range"), ("bf16", "none"), ("fp16", "none")])
def test_nothing_is_watched_in_fp32_or_without_a_policy(settings: tuple[str, str]) -> None:
    model, batch = tiny_model(), random_batch(2, 12, seed=0)
    precision = Precision(model, _config(*settings), LocalTransport())
    assert not any(module._forward_hooks for module in model.modules())
    with precision.autocast():
        summed_loss(model, batch).backward()
    assert precision.measure() == ()
    if settings[0] == "fp32":
        with precision.autocast():
            assert torch.equal(summed_loss(model, batch), summed_loss(tiny_model(), batch))


def test_a_scaled_loss_gives_the_same_gradient() -> None:
    batch, gradients = random_batch(2, 12, seed=0), []
    for scale in (1.0, 2.0**10, 2.0**-10):
        model = tiny_model()
        precision = Precision(model, _config("bf16"), LocalTransport())
        precision._policy.loss_scale = scale
        with precision.autocast():
            loss = summed_loss(model, batch)
        (loss * precision.loss_scale).backward()
        precision.measure()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, up, down in zip(*gradients, strict=True):
        # Powers of two change no bit of a bfloat16 product.
        assert torch.equal(one, up)
        assert torch.equal(one, down)


def _dtypes_of_products(state: Worker, promoted: set[int]) -> list[torch.dtype]:
    """Of the first layer's, the second layer's and the head's products in one forward."""
    state.policy.promoted = frozenset(promoted)
    seen: list[torch.dtype] = []
    modules: list[nn.Module] = [layer.mlp.down_proj for layer in state.model.model.layers]
    hooks = [
        module.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
        for module in [*modules, state.model.lm_head]
    ]
    with state.precision.autocast():
        summed_loss(state.model, random_batch(2, 12, seed=0)).backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_only_promoted_groups_multiply_in_float32(precision: str, tie_embeddings: bool) -> None:
    state = _state(precision, tie_embeddings=tie_embeddings)
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    first = 0 if tie_embeddings else 1  # after the embedding's group
    assert _dtypes_of_products(state, set()) == [low, low, low]
    assert _dtypes_of_products(state, {first}) == [torch.float32, low, low]
    assert _dtypes_of_products(state, {first + 1, first + 2}) == [low, *[torch.float32] * 2]
    assert _dtypes_of_products(state, set()) == [low, low, low]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("is_promoted", [False, True])
def test_what_sees_images_multiplies_in_float32_once_it_is_promoted(
    kind: FusionType, is_promoted: bool
) -> None:
    model = build_model(kind)
    assert model.fusion is not None
    precision = Precision(model, _config("bf16"), LocalTransport())
    if is_promoted:
        precision._policy.promoted = frozenset({0})
    ids_T, places = build_row(model, 3, 5)
    products = [module for module in model.fusion.modules() if isinstance(module, nn.Linear)]
    seen: list[torch.dtype] = []
    for module in products:
        module.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))

    with precision.autocast():
        images = model.fusion.look(RowImages(random_pixels(1), (0,), tuple(places)), 1)
        model(ids_T[None], images=images).sum().backward()

    assert seen == [torch.float32 if is_promoted else torch.bfloat16] * len(products)


def test_a_forward_that_fails_leaves_autocast_as_it_was() -> None:
    state = _state()

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = state.model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        _dtypes_of_products(state, {1})
    hook.remove()
    assert not torch.is_autocast_enabled("cpu")
    for module in state.model.modules():
        module._forward_hooks.clear()


def test_workers_that_see_different_gradients_decide_alike() -> None:
    precisions = [Precision(tiny_model(), _config(), LocalTransport()) for _ in range(2)]
    for step in range(6):
        peaks = []
        for rank, precision in enumerate(precisions):
            for parameter in precision._parameters:
                parameter.grad = torch.full_like(parameter, 10.0 ** (step * rank))
                if (step, rank) == (2, 1):
                    parameter.grad.fill_(math.inf)
            peaks.append(precision.measure())
        joint = StepTotals(1.0, 2, 2, tuple(map(max, *peaks)))
        for precision in precisions:
            precision.update(StepOutcome("skip" if step == 2 else "apply", joint))
        assert precisions[0].state_dict() == precisions[1].state_dict()
    assert precisions[0].loss_scale < 1.0


def test_an_exchange_that_finished_nothing_decides_nothing() -> None:
    precision = Precision(tiny_model(), _config(), LocalTransport())
    before = precision.state_dict()
    precision.update(StepOutcome("wait"))
    assert precision.state_dict() == before


@pytest.mark.parametrize("policy", ["range", "threshold", "none"])
def test_fp16_trains_through_a_poisoned_batch_that_counts_for_nothing(policy: str) -> None:
    state, batch = _state(policy=policy), random_batch(4, 16, seed=0)
    losses = [state.run_step([batch]).loss for _ in range(5)]
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    layer = state.model.model.layers[0]
    hook = layer.register_forward_hook(lambda *arguments: arguments[2] * math.nan)
    record = state.run_step([batch])
    hook.remove()
    assert record.was_skipped
    assert record.precision == "fp16"
    assert state.exchange.num_updates == 5
    after = list(state.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    losses += [state.run_step([batch]).loss for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.isfinite().all() for parameter in after)
    assert state.exchange.num_updates == 15
    if policy == "range":
        assert state.run_step([batch]).loss_scale == 1.0  # the batch was to blame, not the scale


def test_a_layer_whose_activations_leave_the_range_is_promoted_and_training_goes_on() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    exact = _state("fp32")
    for worker in (state, exact):
        mlp = worker.model.model.layers[1].mlp
        mlp.up_proj.register_forward_hook(lambda *arguments: arguments[2] * 2.0**24)
        mlp.down_proj.register_forward_hook(lambda *arguments: arguments[2] * 2.0**-24)
    records = [state.run_step([batch]) for _ in range(12)]
    assert [record.was_skipped for record in records[:3]] == [True, True, False]
    assert not any(record.was_skipped for record in records[3:])
    assert records[-1].num_promoted == 1
    expected = [exact.run_step([batch]).loss for _ in range(10)]
    # fp16 keeps 11 bits of the other groups' products.
    assert records[-1].loss == pytest.approx(expected[-1], rel=5e-3)


def test_a_gradient_that_overflows_lowers_the_scale_below_one() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    state.run_step([batch])

    def enlarge(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        logits.register_hook(lambda gradient: gradient * 2.0**20)

    state.model.lm_head.register_forward_hook(enlarge)
    records = [state.run_step([batch]) for _ in range(6)]
    assert 1 <= sum(record.was_skipped for record in records) <= 2
    assert not any(record.was_skipped for record in records[2:])
    assert records[-1].loss_scale < 1.0
    assert records[-1].grad_norm > 2.0**15  # unscaled again


@pytest.mark.parametrize("policy", ["range", "threshold", "none"])
def test_three_steps_that_are_not_finite_end_training(policy: str) -> None:
    state, batch = _state(policy=policy), random_batch(4, 16, seed=0)
    state.run_step([batch])
    with torch.no_grad():
        state.model.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    for _ in range(2):
        assert state.run_step([batch]).was_skipped
    expected = "not finite in 3 steps in a row"
    if policy != "none":
        expected += r"; the weight model\.layers\.1\.mlp\.up_proj\.weight is itself not finite"
    with pytest.raises(DivergenceError, match=expected):
        state.run_step([batch])


def test_what_persists_as_the_scale_falls_is_traced_to_its_tensor() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    weight = state.model.model.layers[1].self_attn.o_proj.weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(2):
        assert state.run_step([batch]).was_skipped
    name = r"model\.layers\.1\.self_attn\.o_proj\.weight"
    with pytest.raises(DivergenceError, match=f"backward of layers.1, .* gradient of {name}"):
        state.run_step([batch])


def test_after_streaming_all_workers_go_on_from_rank_0s_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While streaming, a fault on one worker is its own; the tail judges the steps of all."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    exchange = StreamExchangeConfig(
        type="stream", local_steps=4, num_fragments=1, overlap_steps=1, tail_share=0.25
    )

    models = [tiny_model() for _ in range(2)]

    def work(transport: Any) -> tuple[Any, Any]:
        model, config = models[transport.rank], _config(num_steps=12)
        state = TrainState(model, config, build_exchange(exchange), transport)
        is_faulty = transport.rank == 1
        hook = state.model.lm_head.register_forward_hook(
            lambda *arguments: arguments[2] * (math.nan if is_faulty else 1.0)
        )
        for step in range(12):
            if step == 1:
                hook.remove()
            if step == 8:
                before = state.shared_state_dict()["precision"]
            state.run_step([random_batch(2, 8, seed=step)])
        state.exchange.flush()
        state.exchange.close()
        return before, state.shared_state_dict()["precision"]

    (one, first), (other, second) = run_workers(2, work)
    assert one != other
    assert first == second


def test_the_state_survives_a_checkpoint(tmp_path: Path) -> None:
    batch = random_batch(4, 16, seed=0)
    model = tiny_model()
    has_products = [bool(group.products) for group in split_groups(model)]
    policy = RangeController(has_products, torch.float16)
    saved = Precision(model, _config(), LocalTransport(), policy)
    policy.promoted, policy.loss_scale = frozenset({1}), 2.0**-3
    with saved.autocast():
        (summed_loss(model, batch) * saved.loss_scale).backward()
    totals = StepTotals(1.0, 10, 10, saved.measure())
    for _ in range(3):
        saved.update(StepOutcome("apply", totals))
    torch.save(saved.state_dict(), tmp_path / "state.pt")

    restored = Precision(tiny_model(), _config(), LocalTransport())
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.state_dict() == saved.state_dict()
    assert (restored.loss_scale, restored.num_promoted) == (saved.loss_scale, 1)

    other = Precision(tiny_model(), _config("bf16"), LocalTransport())
    other.load_state_dict(saved.state_dict())  # fp16's figures say nothing about bf16
    assert (other.loss_scale, other.num_promoted) == (1.0, 0)


def test_accumulated_micro_batches_are_measured_as_one_gradient() -> None:
    batch, peaks = random_batch(8, 16, seed=0), []
    for parts in (1, 4):
        model = tiny_model()
        precision = Precision(model, _config("bf16"), LocalTransport())
        for part in split(batch, parts):
            summed_loss(model, part).backward()
        peaks.append(precision.measure())
    for whole, many in itertools.zip_longest(*peaks):
        assert many == pytest.approx(whole, rel=1e-4)  # float32 sums in another order
