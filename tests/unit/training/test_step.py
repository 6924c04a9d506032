import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from r1ray.config.exchange import AutoExchangeConfig
from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    PackingConfig,
    PrepareConfig,
)
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import SUMMARY_NAME, BatchSet, MicroBatch
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.planners import BatchPlanner, FixedBuckets, PackingPlanner
from r1ray.errors import ArtifactError, DivergenceError
from r1ray.exchange import LocalTransport, StepOutcome, StepTotals, UpdateRule, build_exchange
from r1ray.exchange.dense import DenseExchange
from r1ray.training.checkpoint import (
    HISTORY_NAME,
    STATE_NAME,
    load_checkpoint,
    load_history,
    save_checkpoint,
)
from r1ray.training.step import TrainState, learning_rate_at
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch, random_samples, split


def _config(**changes: Any) -> TrainConfig:
    settings = {"num_steps": 20, "warmup_steps": 4, "precision": "fp32", "learning_rate": 1e-2}
    return TrainConfig(**{**settings, **changes})


class Recording(DenseExchange):
    """A dense exchange that keeps a copy of the mean gradient, before clipping."""

    def setup(self, parameters: Any, transport: Any, rule: UpdateRule) -> None:
        super().setup(parameters, transport, rule)
        self.parameters = parameters

    def step(self, totals: StepTotals) -> StepOutcome:
        gradients = [parameter.grad.clone() for parameter in self.parameters]
        outcome = super().step(totals)
        self.gradients = [gradient / outcome.totals.num_targets for gradient in gradients]
        return outcome


class Worker(TrainState):
    """A `TrainState` whose exchange is known to record."""

    exchange: Recording


def _state(*, seed: int = 0, tie_embeddings: bool = False, **changes: Any) -> Worker:
    model = tiny_model(seed=seed, tie_embeddings=tie_embeddings)
    return Worker(model, _config(**changes), Recording(), LocalTransport())


def _weights(state: TrainState) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def _is_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_four_micro_batches_give_the_gradient_of_one_big_batch() -> None:
    batch = random_batch(12, 16, seed=0)
    whole, parts = _state(), _state()
    whole_record = whole.run_step([batch])
    parts_record = parts.run_step(split(batch, 4))
    # float32 sums in another order; the gradient's norm is of order 1.
    for one, many in zip(whole.exchange.gradients, parts.exchange.gradients, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    assert parts_record.loss == pytest.approx(whole_record.loss, rel=1e-5)
    assert parts_record.grad_norm == pytest.approx(whole_record.grad_norm, rel=1e-4)
    assert parts_record.num_targets == whole_record.num_targets == batch.num_targets
    assert parts_record.num_tokens == whole_record.num_tokens == batch.num_tokens


def _prepare(directory: Path, samples: pa.Table, *, arm: str) -> BatchSet:
    """`samples` in one padded batch, in bucketed batches, or in packed ones."""
    config = PrepareConfig(
        sources=[FileSourceConfig(type="files", paths=["rows.jsonl"])],
        max_tokens=40,
        batch_tokens=40 * samples.num_rows if arm == "whole" else 150,
        batching=PackingConfig(type="packing")
        if arm == "packed"
        else BucketsConfig(type="buckets"),
    )
    planner: BatchPlanner = PackingPlanner(config)
    if arm != "packed":
        planner = FixedBuckets(config, [40] if arm == "whole" else [10, 20, 30, 40])
    directory.mkdir()
    with BatchWriter(directory, planner, config) as writer:
        writer.add(samples)
    (directory / SUMMARY_NAME).write_text(json.dumps(writer.summarize()))
    return BatchSet(directory)


@pytest.mark.parametrize("seed", range(3))
def test_padded_bucketed_and_packed_batches_give_the_gradient_of_the_same_samples(
    seed: int, tmp_path: Path
) -> None:
    samples = random_samples(seed)
    sets = {
        arm: _prepare(tmp_path / arm, samples, arm=arm) for arm in ("whole", "buckets", "packed")
    }
    assert len(sets["whole"]) == 1
    assert len(sets["buckets"]) > len(sets["packed"]) >= 5
    states = {arm: _state() for arm in sets}
    records = {}
    for arm, batches in sets.items():
        buffers = batches.build_buffers()
        records[arm] = states[arm].run_step(
            batches.read(index, buffers) for index in range(len(batches))
        )
    for arm in ("buckets", "packed"):
        assert records[arm].num_targets == records["whole"].num_targets
        assert records[arm].num_tokens == records["whole"].num_tokens
        # float32 sums in another order; the gradient's norm is of order 1.
        assert records[arm].loss == pytest.approx(records["whole"].loss, rel=1e-5)
        for one, many in zip(
            states["whole"].exchange.gradients, states[arm].exchange.gradients, strict=True
        ):
            torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_batches_that_share_memory_count_as_if_each_had_its_own(tmp_path: Path) -> None:
    batches = _prepare(tmp_path / "packed", random_samples(0), arm="packed")
    shared, separate = _state(), _state()
    buffers = batches.build_buffers()
    indices = range(len(batches))
    shared.run_step(batches.read(index, buffers) for index in indices)
    separate.run_step([batches.read(index) for index in indices])
    assert _is_equal(shared.exchange.gradients, separate.exchange.gradients)


def test_training_lowers_the_loss_of_what_it_trains_on() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    losses = [state.run_step([batch]).loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_that_is_not_finite_changes_nothing_but_the_count() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    state.run_step([batch])
    weights = _weights(state)
    moments = [
        {name: value.clone() for name, value in moment.items()}
        for moment in state.exchange.optimizer.state.values()
    ]
    hook = state.model.lm_head.register_forward_hook(lambda *arguments: arguments[2] * math.nan)
    record = state.run_step([batch])
    hook.remove()
    assert record.was_skipped
    assert record.step == state.step == 2
    assert record.loss is record.grad_norm is None
    assert _is_equal(_weights(state), weights)
    for before, after in zip(moments, state.exchange.optimizer.state.values(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    following = state.run_step([batch])
    assert not following.was_skipped
    assert following.learning_rate == learning_rate_at(1, state.config)  # the skip did not count
    assert not _is_equal(_weights(state), weights)


def test_three_steps_in_a_row_that_are_not_finite_end_training_with_the_reason() -> None:
    state, batch = _state(), random_batch(4, 16, seed=0)
    state.model.lm_head.register_forward_hook(lambda *arguments: arguments[2] * math.nan)
    for _ in range(2):
        assert state.run_step([batch]).was_skipped
    with pytest.raises(DivergenceError, match="not finite in 3 steps in a row"):
        state.run_step([batch])


def test_a_checkpoint_before_auto_has_chosen_leaves_no_gradient_behind() -> None:
    exchange = build_exchange(AutoExchangeConfig(type="auto"))
    state = TrainState(tiny_model(), _config(), exchange, LocalTransport())
    record = state.run_step([random_batch(4, 16, seed=0)], flush=True)
    assert record.loss is not None
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_gradients_are_clipped_to_the_global_norm() -> None:
    batch = random_batch(4, 16, seed=0)
    free, clipped = _state(max_grad_norm=1e6), _state(max_grad_norm=1e-3)
    norm = free.run_step([batch]).grad_norm
    assert norm > 1e-3
    assert clipped.run_step([batch]).grad_norm == norm  # the record holds the norm before clipping
    for state, factor in ((free, 1.0), (clipped, 1e-3 / norm)):
        # Adam's first moment after one step is (1 - beta1) times the gradient it saw.
        for parameter, gradient in zip(
            state.exchange.parameters,
            state.exchange.gradients,
            strict=True,
        ):
            seen = state.exchange.optimizer.state[parameter]["exp_avg"] / (1 - 0.9)
            torch.testing.assert_close(seen, gradient * factor, atol=1e-6, rtol=1e-3)


def test_weight_decay_spares_vectors() -> None:
    decayed, plain = _state(weight_decay=0.5), _state()
    batch = random_batch(4, 16, seed=0)
    decayed.run_step([batch])
    plain.run_step([batch])
    for first, second in zip(decayed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(first, second) == (first.dim() < 2)


def test_tied_embeddings_are_trained_once() -> None:
    state = _state(tie_embeddings=True)
    state.run_step([random_batch(4, 16, seed=0)])
    assert state.model.lm_head.weight is state.model.model.embed_tokens.weight
    assert len(state.exchange.optimizer.state) == len(list(state.model.parameters()))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    config = _config(
        num_steps=104, warmup_steps=4, learning_rate=1e-2, final_learning_rate_share=0.1
    )
    rates = [learning_rate_at(step, config) for step in range(105)]
    assert rates[:4] == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[54] == pytest.approx(0.55e-2)  # halfway between the peak and its tenth
    assert rates[104] == pytest.approx(0.1e-2)
    assert all(first > second for first, second in itertools.pairwise(rates[4:]))


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate_at(0, _config(warmup_steps=0)) == 1e-2


def test_each_step_uses_the_scheduled_learning_rate() -> None:
    state, batch = _state(), random_batch(2, 8, seed=0)
    for step in range(6):
        expected = learning_rate_at(step, state.config)
        assert state.run_step([batch]).learning_rate == expected
        assert {group["lr"] for group in state.exchange.optimizer.param_groups} == {expected}


def _batches(step: int) -> list[MicroBatch]:
    return [random_batch(3, 12, seed=10 * step + part) for part in range(2)]


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    tie_embeddings: bool, tmp_path: Path
) -> None:
    straight = _state(tie_embeddings=tie_embeddings)
    records = [straight.run_step(_batches(step)) for step in range(8)]

    killed = _state(tie_embeddings=tie_embeddings)
    history = [killed.run_step(_batches(step)) for step in range(3)]
    save_checkpoint(tmp_path, killed, history, rank=0, world_size=1)

    resumed = _state(seed=5, tie_embeddings=tie_embeddings)  # other weights, to be overwritten
    history = load_checkpoint(tmp_path, resumed)
    assert resumed.step == 3
    history += [resumed.run_step(_batches(step)) for step in range(3, 8)]

    assert _is_equal(_weights(resumed), _weights(straight))
    for found, expected in zip(history, records, strict=True):
        assert (found.step, found.loss, found.grad_norm, found.learning_rate) == (
            expected.step,
            expected.loss,
            expected.grad_norm,
            expected.learning_rate,
        )


def test_the_history_survives_skipped_steps(tmp_path: Path) -> None:
    state = _state()
    record = state.run_step(_batches(0))
    history = [
        dataclasses.replace(record, loss=None, grad_norm=None, was_skipped=True),
        record,
    ]
    save_checkpoint(tmp_path, state, history, rank=0, world_size=1)
    first, second = load_history(tmp_path)
    assert first.was_skipped
    assert first.loss is None
    assert second == history[1]


@pytest.mark.parametrize(
    "name", [STATE_NAME, HISTORY_NAME, "model.safetensors", "exchange-0000.pt"]
)
@pytest.mark.parametrize("contents", [None, b"", b"garbage", b"PK\x03\x04half a zip"])
def test_a_damaged_checkpoint_is_named(name: str, contents: bytes | None, tmp_path: Path) -> None:
    state = _state()
    save_checkpoint(tmp_path, state, [], rank=0, world_size=1)
    (tmp_path / name).unlink()
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ArtifactError, match=name.split(".")[0]):
        load_checkpoint(tmp_path, state)


def test_a_truncated_state_is_named(tmp_path: Path) -> None:
    state = _state()
    state.run_step(_batches(0))
    save_checkpoint(tmp_path, state, [], rank=0, world_size=1)
    data = (tmp_path / STATE_NAME).read_bytes()
    (tmp_path / STATE_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=STATE_NAME):
        load_checkpoint(tmp_path, state)
