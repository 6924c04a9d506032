"""A worker of the exchange benchmark trains as told, and the baselines are the same training."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jobs.benchmarks import exchange_worker
from jobs.benchmarks.exchange_arms import build_arm
from jobs.benchmarks.exchange_cells import Cell, WorkerSpec, train_values
from jobs.benchmarks.exchange_data import (
    CompactTokenizer,
    build_small_model,
    list_batches,
    validation_loss,
    write_batches,
)
from jobs.benchmarks.exchange_worker import SNAPSHOTS_NAME, plan_steps, run_worker
from jobs.benchmarks.links import LinkBytes
from r1ray.config.prepare import BucketsConfig, PrepareConfig, TaskSourceConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.data.tokenize import Sample
from r1ray.errors import ShapeError
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model

_VOCAB_SIZE = 40


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of 24 random samples, as `build_task` lays it out."""
    directory = tmp_path_factory.mktemp("task")
    prepare = PrepareConfig(
        sources=[TaskSourceConfig(type="tasks", num_samples=1)],
        max_tokens=32,
        batch_tokens=64,
        batching=BucketsConfig(type="buckets", num_buckets=4),
    )
    rng = np.random.default_rng(0)
    samples = []
    for length in rng.integers(8, 24, 24):
        is_target = np.arange(length) >= 4
        samples.append(Sample(rng.integers(0, _VOCAB_SIZE, length, np.int32), is_target))
    for split in ("training", "validation"):
        write_batches(samples, prepare, directory / "small" / split)
    (directory / "vocabulary.json").write_text(json.dumps(list(range(_VOCAB_SIZE))))
    return directory


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process as its only worker."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _config(arm: str = "ddp_fp32") -> TrainConfig:
    return TrainConfig(**train_values(Cell("test", arm, 1, None, 0, num_steps=20)))


def _train(arm: str, batches: list[MicroBatch], num_steps: int) -> list[torch.Tensor]:
    model = build_small_model(_VOCAB_SIZE, seed=0)
    runner = build_arm(arm, model, _config(arm))
    for step in plan_steps(batches, num_steps=num_steps, per_step=3, seed=0, world_size=1, rank=0):
        runner.step(step.batches, step.num_targets, is_last=False)
    runner.close()
    return [parameter.detach() for parameter in model.parameters()]


def test_workers_share_the_same_global_batches_at_any_world_size(task_dir: Path) -> None:
    batches = list_batches(task_dir, "small", "training")
    options = {"num_steps": 7, "per_step": 4, "seed": 3}
    alone = plan_steps(batches, **options, world_size=1, rank=0)
    for world_size in (2, 4):
        ranks = [
            plan_steps(batches, **options, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for number, whole in enumerate(alone):
            parts = [rank[number] for rank in ranks]
            assert {part.num_targets for part in parts} == {whole.num_targets}
            together = [id(batch) for part in parts for batch in part.batches]
            assert sorted(together) == sorted(map(id, whole.batches))
            assert sum(b.num_targets for p in parts for b in p.batches) == whole.num_targets


def test_ddp_and_dense_are_the_same_training(lone_group: None, task_dir: Path) -> None:
    batches = list_batches(task_dir, "small", "training")
    ours, theirs = (_train(arm, batches, 4) for arm in ("alone", "ddp_fp32"))
    start = [parameter.detach() for parameter in build_small_model(_VOCAB_SIZE, 0).parameters()]
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - before).abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-4)  # Adam magnifies rounding


@pytest.mark.parametrize("arm", ["ddp_bf16", "ddp_powersgd"])
def test_compressed_baselines_train_nearly_as_ddp(
    lone_group: None, task_dir: Path, arm: str
) -> None:
    batches = list_batches(task_dir, "small", "training")
    losses = {}
    for name in ("ddp_fp32", arm):
        model = build_small_model(_VOCAB_SIZE, seed=0)
        for parameter, value in zip(model.parameters(), _train(name, batches, 13), strict=True):
            parameter.data.copy_(value)
        losses[name] = validation_loss(model, batches)
    start = validation_loss(build_small_model(_VOCAB_SIZE, seed=0), batches)
    assert losses["ddp_fp32"] < start - 0.3
    assert losses[arm] != losses["ddp_fp32"]
    # PowerSGD has compressed a few steps only, at rank 4.
    assert start - losses[arm] > 0.7 * (start - losses["ddp_fp32"])


def _run(cell: Cell, task_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    passed = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(exchange_worker, "read_link_bytes", lambda: LinkBytes(next(passed), 0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spec = WorkerSpec(
        cell, train_values(cell), "127.0.0.1", port, str(task_dir), "none", str(out_dir)
    )
    run_worker(WorkerSpec.from_json(json.loads(json.dumps(spec.to_json()))), rank=0)
    return dict(json.loads((out_dir / "rank0.json").read_text()))


def test_a_worker_measures_every_step_and_keeps_weights_aside(
    task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("test", "ddp_fp32", 1, None, 0, num_steps=11, eval_every=4)
    measured = _run(cell, task_dir, tmp_path, monkeypatch)
    assert measured["sent"] == [1000 * number for number in range(1, 12)]
    assert measured["ended_s"] == sorted(measured["ended_s"])
    assert measured["kept"] == [4, 8, 11]
    model = build_small_model(_VOCAB_SIZE, seed=0)
    batches = list_batches(task_dir, "small", "validation")
    losses = [validation_loss(model, batches)]
    for weights in torch.load(tmp_path / SNAPSHOTS_NAME):
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(value)
        losses.append(validation_loss(model, batches))
    assert losses == sorted(losses, reverse=True)
    assert measured["digest"] == exchange_worker.digest_weights(model)


def test_a_run_beyond_its_cap_ends_early(
    task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("test", "ddp_fp32", 1, None, 0, num_steps=20, eval_every=4, cap_s=0.0)
    assert _run(cell, task_dir, tmp_path, monkeypatch)["kept"] == [4, 8, 9]


def test_a_compact_tokenizer_renumbers_and_refuses_what_is_not_in_the_task(tmp_path: Path) -> None:
    whole = Tokenizer(write_tiny_model(tmp_path))
    text = "the quick fox"
    ids = whole.encode(text)
    vocabulary = sorted({*ids, whole.eos_token_id})
    compact = CompactTokenizer(tmp_path, vocabulary)
    assert [vocabulary[place] for place in compact.encode(text)] == ids
    assert compact.decode(compact.encode(text)) == text
    assert vocabulary[compact.eos_token_id] == whole.eos_token_id
    with pytest.raises(ShapeError, match="are not among"):
        compact.encode("jumps")
