"""What one Ray Train worker does: load, resume, step, report, checkpoint.

Every worker writes its part of a checkpoint; `ray.train.report` is a barrier: every rank calls it
equally often.
"""

import itertools
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from r1ray.artifacts import ArtifactStore
from r1ray.config.schema import TrainConfig
from r1ray.data.batch_set import BatchSet, plan_order
from r1ray.errors import DivergenceError
from r1ray.exchange import CollectiveTransport, LocalTransport, build_exchange
from r1ray.models.checkpoint import load_model
from r1ray.models.quantization import fake_quantize_modules
from r1ray.observability.logging import setup_logging
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.metrics import StepMetrics
from r1ray.training.step import StepRecord, TrainState

__all__ = ["WorkerJob", "run_worker"]


@dataclass(frozen=True)
class WorkerJob:
    """What the driver sends to every worker: plain values only.

    Attributes:
        root, name: of the artifact store; every worker's node must reach it.
        base_run_id, batches_run_id: the `base` and `prepare` artifacts to read there.
        board: actor that step records are posted to, and divergence.
        salvaged: checkpoint directory to go on from where Ray Train knows of none.
    """

    config: TrainConfig
    seed: int
    root: str
    name: str | None
    base_run_id: str
    batches_run_id: str
    board: Any
    salvaged: str | None = None


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train to `num_steps` from the base model or from the run's last checkpoint."""
    setup_logging()
    job: WorkerJob = loop_config["job"]
    if ray.get(job.board.read.remote()).diverged:
        return  # this start is one too many
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not job.config.resources.use_gpu:
        torch.set_num_threads(max(1, int(job.config.resources.num_cpus_per_worker)))
    state, batches, history = _build(job, world_size)
    if rank == 0:
        job.board.start.remote(state.step)
    per_step = job.config.batches_per_step
    buffers = batches.build_buffers()
    order = plan_order(
        len(batches),
        seed=job.seed,
        start=state.step * per_step,
        world_size=world_size,
        rank=rank,
    )
    metrics = StepMetrics(job.name, rank)
    while state.step < job.config.num_steps:
        indices = [index for _, index in itertools.islice(order, per_step // world_size)]
        is_saved = _is_saved_after(state.step + 1, job.config)
        chosen = (batches.read(index, buffers) for index in indices)
        try:
            record = state.run_step(chosen, flush=is_saved)
        except DivergenceError as error:
            ray.get(job.board.stop.remote(str(error)))
            raise
        history.append(record)
        metrics.observe(record)
        if rank == 0:
            job.board.post.remote(record, state.exchange.plan)
        if is_saved:
            _report(state, history, rank, world_size)
    state.exchange.close()


def _is_saved_after(step: int, config: TrainConfig) -> bool:
    return step == config.num_steps or step % config.resources.checkpoint_every_steps == 0


def _build(job: WorkerJob, world_size: int) -> tuple[TrainState, BatchSet, list[StepRecord]]:
    store = ArtifactStore(job.root, job.name)
    hint = "it must be readable from every node"
    base = store.require("base", job.base_run_id, hint=hint, verify=False)
    prepared = store.require("prepare", job.batches_run_id, hint=hint, verify=False)
    device = ray.train.torch.get_device()
    torch.manual_seed(job.seed)
    model = load_model(base.local_dir, dtype=torch.float32).to(device)
    if job.config.fake_quant is not None:
        fake_quantize_modules(model, job.config.fake_quant)
    state = TrainState(
        model,
        job.config,
        build_exchange(job.config.exchange),
        CollectiveTransport(timeout_s=job.config.resources.timeout_s)
        if world_size > 1
        else LocalTransport(),
    )
    history: list[StepRecord] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and job.salvaged is not None:
        checkpoint = ray.train.Checkpoint.from_directory(job.salvaged)
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            history = load_checkpoint(Path(directory), state)
    return state, BatchSet(prepared.local_dir), history


def _report(state: TrainState, history: list[StepRecord], rank: int, world_size: int) -> None:
    with tempfile.TemporaryDirectory(prefix="r1ray-checkpoint-") as directory:
        save_checkpoint(Path(directory), state, history, rank=rank, world_size=world_size)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(asdict(history[-1]), checkpoint=checkpoint)
