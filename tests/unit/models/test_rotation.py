"""Another basis: the same logits, also for others, and a smaller loss by rounding."""

from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from r1ray.config import load_config
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ConfigError
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.base import count_parameters
from r1ray.models.config import Family
from r1ray.models.quantization import quantize_modules
from r1ray.models.rotation import rotate, rotated
from r1ray.training.step import TrainState
from tests.fakes import tiny_model
from tests.unit.oracle import FAMILIES, build_oracle, random_ids, save_oracle

ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
READERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_rotated_model_is_the_same_function(
    family: Family, is_tied: bool, tmp_path: Path
) -> None:
    oracle = build_oracle(family, tie_word_embeddings=is_tied)  # its norms have gains
    model = load_model(save_oracle(oracle, tmp_path / "source"))
    count, ids = count_parameters(model), random_ids(2, 24)

    rotate(model)

    save_model(model, tmp_path / "rotated")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rotated")
    with torch.inference_mode():
        expected = oracle(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=1e-4)
    assert not model.config.tie_embeddings
    assert count_parameters(model) == count + is_tied * 96 * 32
    norms = [item for name, item in model.named_parameters() if "layernorm" in name]
    assert all((item == 1).all() for item in [*norms, model.model.norm.weight])


def test_a_channel_that_stands_out_is_spread_before_it_is_rounded() -> None:
    ids = random_ids(4, 32)

    def build() -> Decoder:
        """One channel is large in every token, and of little weight to what reads it."""
        model = tiny_model()
        with torch.no_grad():
            model.model.embed_tokens.get_parameter("weight")[:, 3] = 40.0
            for name, weight in model.named_parameters():
                if name.split(".")[-2] in READERS:
                    weight[:, 3] *= 0.01
        return model

    with torch.inference_mode():
        expected = build()(ids)
        plain, rotated = build(), build()
        rotate(rotated)
        lost = []
        for model in (plain, rotated):
            quantize_modules(model)
            lost.append(float((model(ids) - expected).norm() / expected.norm()))

    assert lost[1] < 0.6 * lost[0]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_rotated_model_reach_its_own_weights(family: Family, is_tied: bool) -> None:
    model, ids = tiny_model(family, tie_embeddings=is_tied), random_ids(2, 24)
    with torch.no_grad():
        for item in model.parameters():
            item += 0.1 * torch.randn(item.shape)  # norms with gains, biases
    model.model.layers[1].requires_grad_(False)
    own = dict(model.named_parameters())
    before = {name: item.detach().clone() for name, item in own.items()}

    def read_gradients() -> dict[str, Tensor]:
        found = {name: item.grad for name, item in own.items() if item.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    expected = model(ids)
    expected.square().sum().backward()
    wanted = read_gradients()
    with rotated(model):
        inside = {name: item.detach().clone() for name, item in model.named_parameters()}
        for part in (slice(0, 1), slice(1, 2)):  # gradients add up
            found = model(ids[part])
            torch.testing.assert_close(found, expected[part], rtol=0, atol=1e-4)
            found.square().sum().backward()
    gradients = read_gradients()

    assert gradients.keys() == wanted.keys() == {name for name in own if "layers.1." not in name}
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name
    changed = {name for name in own if not torch.equal(inside[name], before[name])}
    assert all("norm" in name or "proj.weight" in name for name in changed - ENDS)
    assert changed >= ENDS & own.keys()
    again = dict(model.named_parameters())
    assert all(
        again[name] is item and torch.equal(item, before[name]) for name, item in own.items()
    )
    assert again.keys() == own.keys()


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    own = dict(model.named_parameters())

    def fail() -> None:
        with rotated(model):
            model(random_ids(1, 8)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(item is own[name] and item.grad is None for name, item in model.named_parameters())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_training_through_rotated_rounding_ends_in_what_is_served(
    tmp_path: Path, precision: Literal["fp32", "bf16"], tolerance: float
) -> None:
    """The loss that a step reports is that of the integers that its weights are rounded to."""
    config = TrainConfig(num_steps=4, warmup_steps=1, precision=precision, learning_rate=1e-2)
    state = TrainState(tiny_model(), config, build_exchange(config.exchange), LocalTransport())
    ids = random_ids(2, 24)
    batch = MicroBatch(ids, ids.roll(-1, 1), ids.numel(), ids.numel())
    state.run_step([batch])
    state.begin_rounding("w8a8", is_rotated=True)
    state.run_step([batch])
    save_model(state.model, tmp_path / "trained")

    record = state.run_step([batch])  # of the weights that were just saved

    served = load_model(tmp_path / "trained")
    rotate(served)
    quantize_modules(served)
    with torch.inference_mode():
        loss = F.cross_entropy(served(ids).flatten(0, 1), batch.labels_BT.flatten())
    assert record.loss == pytest.approx(float(loss), abs=tolerance)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.fake_quant=null", "train.fake_quant_rotate=true"], "goes with fake_quant"),
        (
            ["train.fake_quant=w8a8", "train.fake_quant_rotate=true"],
            r"fake_quant_rotate \(True\) .* compress.rotate \(False\)",
        ),
        (
            ["train.fake_quant=w8a8", "compress.rotate=true"],
            r"fake_quant_rotate \(False\) .* compress.rotate \(True\)",
        ),
        (
            [
                *("train.fake_quant=w8a8", "train.fake_quant_rotate=true", "compress.rotate=true"),
                "continual={ewc: {strength: 1.0}}",
            ],
            r"continual\.ewc holds weights",
        ),
        (
            ["base.fusion={type: mid, image_size: 16, patch_size: 8}", "compress.rotate=true"],
            r"does not go with compress\.rotate",
        ),
    ],
)
def test_what_does_not_go_with_rotation_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("jobs/configs/tiny.yaml", overrides)
