import dataclasses
import functools
import logging
from pathlib import Path

import pytest
import torch

from r1ray.config.fusion import FusionConfig
from r1ray.errors import ArtifactError, BudgetError, ConfigError
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.config import Family
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import quantize_modules
from r1ray.models.streaming import list_units, stream_units
from r1ray.models.tiered import load_to_serve, load_to_train
from r1ray.models.tiers import plan_placement
from tests.fakes import tiny_config, tiny_model
from tests.unit.oracle import FAMILIES, random_ids

MIB = 1 << 20


class RecordingTier:
    """Notes which unit is where, and insists on order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.present: set[str] = set()

    def prefetch(self, unit: str) -> None:
        self.calls.append(f"prefetch {unit}")

    def fetch(self, unit: str) -> None:
        self.calls.append(f"fetch {unit}")
        self.present.add(unit)
        assert len(self.present) == 1

    def release(self, unit: str) -> None:
        self.calls.append(f"release {unit}")
        self.present.remove(unit)


def test_a_plan_keeps_what_fits_beside_two_of_the_largest() -> None:
    units = {"embedding": 40, "layer 0": 10, "layer 1": 10, "layer 2": 10, "head": 40}
    plan = plan_placement(units, 2 * (80 + 25))
    assert plan == plan_placement(units, 2 * (120 + 25), is_training=True)  # and a gradient
    assert plan.core == ("layer 0", "layer 1")
    assert plan.static == ("embedding", "layer 2", "head")
    assert (plan.core_bytes, plan.static_bytes) == (20, 90)
    assert plan_placement(units, 1000).static == ()
    with pytest.raises(BudgetError, match="raise it to at least 1 MiB"):
        plan_placement(units, 100)


def test_a_plan_can_be_read() -> None:
    units = {"embedding": 8 * MIB, **{f"layer {i}": MIB for i in range(9)}, "head": 8 * MIB}
    text = plan_placement(units, 40 * MIB).describe()
    assert text == (
        "fast tier: 4 layers (4 MiB); slow tier, streamed: 5 layers, embedding, head (21 MiB)"
    )


def test_units_are_fetched_in_order_one_ahead_and_released() -> None:
    model, tier = tiny_model(), RecordingTier()
    stream_units(model, ["embedding", "layer 0", "layer 1"], tier)
    with torch.inference_mode():
        model(random_ids(1, 4))
    assert tier.calls == [
        *("fetch embedding", "prefetch layer 0", "release embedding"),
        *("fetch layer 0", "prefetch layer 1", "release layer 0"),
        *("fetch layer 1", "release layer 1"),
    ]
    tier.calls.clear()
    model(random_ids(1, 4)).sum().backward()
    assert tier.calls[8:] == [
        *("fetch layer 1", "prefetch layer 0", "release layer 1"),
        *("fetch layer 0", "release layer 0"),
    ]


def test_a_unit_is_released_when_its_forward_fails() -> None:
    model, tier = tiny_model(), RecordingTier()
    stream_units(model, ["layer 0"], tier)
    with pytest.raises(RuntimeError), torch.inference_mode():
        model.model.layers[0](torch.zeros(1, 2, 7), None, None, None)
    assert not tier.present


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_streaming_every_unit_changes_neither_logits_nor_gradients(
    family: Family, tie_embeddings: bool, is_autocast: bool
) -> None:
    plain = tiny_model(family, tie_embeddings=tie_embeddings)
    streamed = tiny_model(family, tie_embeddings=tie_embeddings)
    stream_units(streamed, list(list_units(streamed)), RecordingTier())
    ids = random_ids(2, 12)
    outputs = []
    for model in (plain, streamed):
        with torch.autocast("cpu", enabled=is_autocast):
            outputs.append(model(ids))
        outputs[-1].float().square().mean().backward()
    assert torch.equal(*outputs)
    for (name, mine), theirs in zip(streamed.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None
        # A tied matrix adds its two parts in another order.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_layers_pass_gradients_on_and_get_none() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    stream_units(model, ["layer 0", "layer 1"], RecordingTier())
    model(random_ids(1, 4)).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[1].mlp.up_proj.weight.grad is None


def _wide_model(tmp_path: Path, *, num_layers: int = 12, scheme: str | None = None) -> Path:
    """About 1.3 million parameters a layer."""
    config = dataclasses.replace(
        tiny_config(), hidden_size=256, intermediate_size=1024, head_dim=64, num_layers=num_layers
    )
    torch.manual_seed(0)
    model = Decoder(config)
    if scheme == "w8a8":
        quantize_modules(model)
    elif scheme == "w4a8":
        quantize_modules(model, "w4a8")
    save_model(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_a_model_larger_than_its_budget_is_served_from_disk(
    scheme: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    path = _wide_model(tmp_path, num_layers=24, scheme=scheme)
    ids = random_ids(1, 6)
    with torch.inference_mode():
        load_model(path)(ids)  # libraries and thread pools
    size = (path / "model.safetensors").stat().st_size
    tiered = load_to_serve(path, budget_bytes=size * 2 // 3)
    model = tiered.model
    assert len(tiered.placement.static) > 6
    assert "slow tier, streamed: " in caplog.text
    with torch.inference_mode():
        found = model(ids)
        cache = KVCache(model.config, max_rows=1, max_tokens=8, dtype=torch.float32)
        rows = cache.add_rows(1)
        again = model(ids, rows)
        expected = load_model(path)(ids)
    assert torch.equal(found, expected)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_a_budget_that_is_spent_ends_the_forward(tmp_path: Path) -> None:
    path = _wide_model(tmp_path)
    for budget in (48, 200):  # some layers are streamed, or none
        model = load_to_serve(path, budget_bytes=budget * MIB).model
        hog = torch.ones(512 * MIB // 4)
        with pytest.raises(BudgetError, match=rf"above the budget of {budget} MiB; raise"):
            model(random_ids(1, 6))
        del hog


def test_what_is_reserved_is_not_planned_with(tmp_path: Path) -> None:
    path = _wide_model(tmp_path)
    whole = load_to_serve(path, budget_bytes=200 * MIB)
    assert not whole.placement.static
    some = load_to_serve(path, budget_bytes=200 * MIB, reserved_bytes=120 * MIB)
    assert some.placement.static


def test_weights_that_have_to_be_decoded_are_refused(tmp_path: Path) -> None:
    path = _wide_model(tmp_path, num_layers=1, scheme="w4a8")
    with pytest.raises(ArtifactError, match="w4a8 weights are decoded when they are loaded"):
        load_to_serve(path, budget_bytes=64 * MIB)
    with pytest.raises(ArtifactError, match="training starts from a float model"):
        load_to_train(path, None, budget_bytes=64 * MIB)


def test_a_model_that_sees_images_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    attach_fusion(model, FusionConfig(type="late", image_size=16, patch_size=8))
    save_model(model, tmp_path)

    for load in (load_to_serve, functools.partial(load_to_train, directory=None)):
        with pytest.raises(ArtifactError, match="sees images"):
            load(tmp_path, budget_bytes=1 << 30)


def test_a_damaged_model_is_named_as_by_load_model(tmp_path: Path) -> None:
    path = _wide_model(tmp_path / "model", num_layers=1)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace("1024", "512"))
    for load in (
        lambda: load_to_serve(path, budget_bytes=64 * MIB),
        lambda: load_to_train(path, None, budget_bytes=64 * MIB),
    ):
        with pytest.raises(ArtifactError, match="weights do not fit"):
            load()


def test_weights_in_another_format_are_trained_in_float32(tmp_path: Path) -> None:
    save_model(tiny_model().bfloat16(), tmp_path / "model")
    tiered = load_to_train(tmp_path / "model", None, budget_bytes=64 * MIB)
    assert {item.dtype for item in tiered.model.parameters()} == {torch.float32}
    with torch.no_grad():
        tiered.model.model.norm.weight.fill_(3.0)
    name = "model.norm.weight"
    assert torch.equal(tiered.files[name][name], torch.full((32,), 3.0))


def test_a_directory_in_memory_is_no_slow_tier(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not _in_memory(shm):
        pytest.skip("NO MEMORY FILE SYSTEM here: its refusal is NOT TESTED")
    with pytest.raises(ConfigError, match=r"tiers\.directory '/dev/shm' is in memory \(tmpfs\)"):
        load_to_train(tmp_path, "/dev/shm", budget_bytes=64 * MIB)


def _in_memory(path: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return any(mount[1] == str(path) and mount[2] == "tmpfs" for mount in mounts)
