"""Training on CUDA: exchanges, precision, rounding, checkpoints, teachers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from r1ray.config.distill import DistillConfig, OnPolicyConfig
from r1ray.config.exchange import ExchangeConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.exchange import LocalTransport, Transport, build_exchange
from r1ray.models import Decoder
from r1ray.models.quantization import fake_quantize_modules
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.objective import Objective, OnlineDistillation, OnPolicyDistillation
from r1ray.training.step import TrainState
from tests.fakes import EOS_ID, tiny_config, tiny_model
from tests.unit.exchange.gloo import run_ranks
from tests.unit.training.batches import random_batch, split, write_batch_set

BATCH = random_batch(8, 24, seed=0)
EXCHANGES: dict[str, dict[str, Any]] = {
    "dense": {"type": "dense"},
    "delta4": {"type": "delta4"},
    "delta4_async": {"type": "delta4_async"},
    "stream": {
        "type": "stream",
        "local_steps": 4,
        "num_fragments": 2,
        "overlap_steps": 1,
        "tail_share": 0.3,
    },
    "auto": {"type": "auto"},
}


def _config(**changes: Any) -> TrainConfig:
    settings = {"num_steps": 12, "warmup_steps": 2, "precision": "fp32", "learning_rate": 1e-2}
    return TrainConfig(**{**settings, **changes})


def _state(
    device: str = "cuda",
    transport: Transport | None = None,
    objective: Objective | None = None,
    model: Decoder | None = None,
    **changes: Any,
) -> TrainState:
    config = _config(**changes)
    model = (model or tiny_model()).to(device)
    if config.fake_quant is not None:
        fake_quantize_modules(model, config.fake_quant)
    exchange = build_exchange(config.exchange)
    return TrainState(model, config, exchange, transport or LocalTransport(), objective)


def _weights(state: TrainState) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in state.model.parameters()]


def _train(transport: Transport, device: str, exchange: dict[str, Any]) -> list[Tensor]:
    parsed = TypeAdapter(ExchangeConfig).validate_python(exchange)
    size = transport.world_size
    state = _state(device, transport, exchange=parsed, batches_per_step=size)
    part = split(BATCH, size)[transport.rank]
    for step in range(state.config.num_steps):
        state.run_step([part], flush=step == state.config.num_steps - 1)
    state.exchange.close()
    return _weights(state)


@pytest.mark.parametrize("name", EXCHANGES)
def test_two_workers_end_with_the_same_weights_near_those_of_cpus(name: str) -> None:
    """Both on one GPU, over gloo: NCCL wants a GPU for each worker."""
    first, second = run_ranks(_train, 2, "cuda", EXCHANGES[name])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if name in ("dense", "delta4"):
        (expected, _) = run_ranks(_train, 2, "cpu", EXCHANGES[name])
        distance = sum(float((a - b).norm() ** 2) for a, b in zip(first, expected, strict=True))
        moved = sum(
            float((a - b.detach()).norm() ** 2)
            for a, b in zip(expected, tiny_model().parameters(), strict=True)
        )
        assert distance < (1e-3 if name == "dense" else 0.05) * moved


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize("fake_quant", [None, "w8a8", "w4a8"])
def test_training_in_narrow_formats_lowers_the_loss(precision: str, fake_quant: str | None) -> None:
    state = _state(precision=precision, fake_quant=fake_quant)
    records = [state.run_step([BATCH]) for _ in range(12)]
    assert {record.precision for record in records} == {
        "bf16" if precision == "auto" else precision
    }
    assert not any(record.was_skipped for record in records)
    assert records[0].loss is not None
    assert records[-1].loss is not None
    assert records[-1].loss < 0.8 * records[0].loss


@pytest.mark.parametrize("name", ["dense", "delta4", "delta4_async"])
def test_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    exchange = TypeAdapter(ExchangeConfig).validate_python(EXCHANGES[name])
    settings = {"exchange": exchange, "precision": "fp16"}
    whole = _state(**settings)
    history = [whole.run_step([BATCH], flush=step == 5) for step in range(6)]
    save_checkpoint(tmp_path, whole, history, rank=0, world_size=1)
    resumed = _state(model=tiny_model(seed=5), **settings)
    load_checkpoint(tmp_path, resumed)
    for state in (whole, resumed):
        for step in range(6):
            state.run_step([BATCH], flush=step == 5)
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(resumed), strict=True))


def test_packed_batches_train_as_on_a_cpu(tmp_path: Path) -> None:
    """FlexAttention's kernels need a head dimension of 16."""
    batches = write_batch_set(tmp_path / "packed")
    assert batches[0].document_lengths is not None
    config = dataclasses.replace(tiny_config(), head_dim=16)
    torch.manual_seed(0)
    model = Decoder(config)
    weights = model.state_dict()
    losses = {}
    for device in ("cpu", "cuda"):
        other = Decoder(config)
        other.load_state_dict(weights)
        state = _state(device, model=other)
        buffers = batches.build_buffers()
        losses[device] = [
            state.run_step(batches.read(i, buffers) for i in range(len(batches))).loss
            for _ in range(4)
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_a_student_learns_from_a_teacher_beside_it_and_from_its_own_answers() -> None:
    teacher = tiny_model(seed=1).to("cuda")
    distill = DistillConfig(teacher="x", ce_share=0.0)
    objective: Objective = OnlineDistillation(distill, teacher)
    state = _state(objective=objective)
    losses = [state.run_step([BATCH]).loss for _ in range(12)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.7 * losses[0]
    objective = OnPolicyDistillation(
        OnPolicyConfig(last_steps=12, max_new_tokens=6),
        objective,
        teacher,
        stop_ids=[EOS_ID],
        num_steps=12,
        seed=0,
    )
    state = _state(objective=objective, model=state.model)
    prompts: MicroBatch = BATCH
    assert state.run_step([prompts]).loss is not None
