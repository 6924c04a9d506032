"""The exchange whose gradients and moments lie in files, against `dense`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1ray.config.training import TrainConfig
from r1ray.errors import ConfigError, ExchangeError
from r1ray.exchange import (
    LocalTransport,
    OffloadedExchange,
    StepTotals,
    Transport,
    build_exchange,
)
from r1ray.models import Decoder, save_model
from r1ray.models.streaming import list_units, stream_units
from r1ray.models.tiered import load_to_train
from r1ray.models.tiers import MappedTier, resident_bytes
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.step import TrainState
from tests.fakes import tiny_config, tiny_model
from tests.unit.exchange.threads import run_workers
from tests.unit.training.batches import random_batch, split

NUM_STEPS = 8
BATCH = random_batch(8, 24, seed=0)
INITIAL = tiny_model(tie_embeddings=True).state_dict()
# AdamW's first steps divide gradients by their own size: rounding of 1e-7 in a gradient near 0
# moves a weight by a visible part of the learning rate.
TOLERANCE = 2e-4


def _config(num_workers: int = 1) -> TrainConfig:
    return TrainConfig(
        num_steps=NUM_STEPS,
        warmup_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        batches_per_step=num_workers,
        precision="fp32",
    )


def _offloaded(
    transport: Transport, model_dir: Path, *, static: bool = False
) -> tuple[TrainState, OffloadedExchange]:
    """A worker whose weights, gradients and moments are files; `static`: and its units streamed."""
    tiered = load_to_train(model_dir, None, budget_bytes=1 << 30)
    if static:
        tensors = {unit: [] for unit in list_units(tiered.model)}
        tier = MappedTier(tensors, tiered.files, tiered.budget)
        stream_units(tiered.model, list(tensors), tier)
    exchange = OffloadedExchange(tiered, None)
    return TrainState(tiered.model, _config(transport.world_size), exchange, transport), exchange


def _dense() -> TrainState:
    model = Decoder(tiny_config(tie_embeddings=True))
    model.load_state_dict(INITIAL)
    config = _config()
    return TrainState(model, config, build_exchange(config.exchange), LocalTransport())


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_model(tiny_model(tie_embeddings=True), tmp_path / "model")
    return tmp_path / "model"


def _assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("static", [False, True])
def test_training_from_files_is_training(static: bool, model_dir: Path) -> None:
    dense = _dense()
    offloaded, _ = _offloaded(LocalTransport(), model_dir, static=static)
    for _ in range(NUM_STEPS):
        parts = split(BATCH, 2)  # gradients of two micro-batches add up
        expected, found = dense.run_step(parts), offloaded.run_step(parts)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    _assert_close(dict(offloaded.model.state_dict()), dict(dense.model.state_dict()))
    assert all(parameter.grad is None for parameter in offloaded.model.parameters())


def test_two_workers_sum_their_gradients(model_dir: Path) -> None:
    def work(transport: Any) -> dict[str, Tensor]:
        state, _ = _offloaded(transport, model_dir)
        part = split(BATCH, 2)[transport.rank]
        for _ in range(NUM_STEPS):
            state.run_step([part])
        return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}

    results = run_workers(2, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    dense = _dense()
    for _ in range(NUM_STEPS):
        dense.run_step([BATCH])
    _assert_close(first, dict(dense.model.state_dict()))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, model_dir: Path) -> None:
    whole, _ = _offloaded(LocalTransport(), model_dir)
    for step in range(NUM_STEPS):
        if step == 3:
            torch.save(whole.exchange.state_dict(), tmp_path / "exchange.pt")
            torch.save(whole.model.state_dict(), tmp_path / "model.pt")
            shared = whole.shared_state_dict()
        whole.run_step([BATCH])
    resumed, _ = _offloaded(LocalTransport(), model_dir)
    resumed.model.load_state_dict(torch.load(tmp_path / "model.pt"))
    resumed.load_state_dict(shared, [torch.load(tmp_path / "exchange.pt")])
    for _ in range(3, NUM_STEPS):
        resumed.run_step([BATCH])
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpoints_with_and_without_tiers_are_told_apart(model_dir: Path) -> None:
    plain, (_, exchange) = _dense(), _offloaded(LocalTransport(), model_dir)

    with pytest.raises(ConfigError, match=r"saved without train\.resources\.tiers; leave them out"):
        exchange.load_state_dict([plain.exchange.state_dict()])
    with pytest.raises(ConfigError, match=r"saved with train\.resources\.tiers; restore them"):
        plain.exchange.load_state_dict([exchange.state_dict()])


def test_a_gradient_that_is_not_finite_changes_nothing(model_dir: Path) -> None:
    state, exchange = _offloaded(LocalTransport(), model_dir)
    state.run_step([BATCH])
    before = [parameter.clone() for parameter in state.model.parameters()]
    state.model(BATCH.input_ids_BT).sum().mul(math.nan).backward()
    outcome = exchange.step(StepTotals(1.0, 4, 4))
    assert outcome.verdict == "skip"
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert not state.run_step([BATCH]).was_skipped  # nothing of it is left


def test_a_step_without_targets_is_refused(model_dir: Path) -> None:
    _, exchange = _offloaded(LocalTransport(), model_dir)
    with pytest.raises(ExchangeError, match="no worker had a target token"):
        exchange.step(StepTotals(0.0, 0, 4))


def test_a_checkpoint_is_written_and_read_and_its_pages_given_back(
    tmp_path: Path, model_dir: Path
) -> None:
    state, exchange = _offloaded(LocalTransport(), model_dir)
    history = [state.run_step([BATCH])]
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(tmp_path / "checkpoint", state, history, rank=0, world_size=1)
    again, _ = _offloaded(LocalTransport(), model_dir)
    assert load_checkpoint(tmp_path / "checkpoint", again) == history
    for mine, theirs in zip(again.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.run_step([BATCH]).loss == state.run_step([BATCH]).loss
    exchange.close()


def test_a_large_model_is_saved_without_staying_in_memory(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), hidden_size=512, intermediate_size=2048)
    torch.manual_seed(0)
    save_model(Decoder(config), tmp_path / "model")
    tiered = load_to_train(tmp_path / "model", None, budget_bytes=1 << 30)
    exchange = OffloadedExchange(tiered, None)
    state = TrainState(tiered.model, _config(), exchange, LocalTransport())
    history = [state.run_step([BATCH])]
    (tmp_path / "checkpoint").mkdir()
    exchange.release_memory()
    before = resident_bytes()
    save_checkpoint(tmp_path / "checkpoint", state, history, rank=0, world_size=1)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert size > 60 << 20
    assert resident_bytes() - before < size / 3
