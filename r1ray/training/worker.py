"""What one Ray Train worker does: load, resume, step, report, checkpoint.

Every worker writes its part of a checkpoint; `ray.train.report` is a barrier: every rank calls it
equally often.
"""

import itertools
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.logit_store import LogitStore
from r1ray.config.continual import ContinualConfig
from r1ray.config.distill import DistillConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import BatchSet, plan_order, shuffled
from r1ray.errors import BudgetError, ConfigError, DivergenceError
from r1ray.exchange import (
    CollectiveTransport,
    Exchange,
    LocalTransport,
    OffloadedExchange,
    Transport,
    build_exchange,
)
from r1ray.models.checkpoint import load_model
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.gates import attach_gates, detach_gates, list_attentions
from r1ray.models.tiered import load_to_train
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.training import continual
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.gates import GateTraining, average_missed
from r1ray.training.metrics import StepMetrics
from r1ray.training.objective import (
    CrossEntropy,
    Objective,
    OnlineDistillation,
    OnPolicyDistillation,
    StoredDistillation,
)
from r1ray.training.step import StepRecord, TrainState

__all__ = ["Teaching", "WorkerJob", "run_worker"]

logger = logging.getLogger(__name__)

_BOARD_S = 60  # what the driver's process may take to answer, on a busy machine


@dataclass(frozen=True)
class Teaching:
    """A teacher, for the workers.

    Attributes:
        teacher_run_id: the `teacher` artifact.
        logits_run_id: the `logits` artifact; None where the teacher runs beside the student.
    """

    config: DistillConfig
    teacher_run_id: str
    logits_run_id: str | None


@dataclass(frozen=True)
class WorkerJob:
    """What the driver sends to every worker: plain values only.

    Attributes:
        root, name: of the artifact store; every worker's node must reach it.
        start: stage and run id of the model to start from.
        batches_run_id: the `prepare` artifact.
        board: actor that step records are posted to, and divergence.
        salvaged: checkpoint directory to go on from where Ray Train knows of none.
        continual: how this data set is learned as one of a sequence; None where it is the only one.
    """

    config: TrainConfig
    seed: int
    root: str
    name: str | None
    start: tuple[str, str]
    batches_run_id: str
    board: Any
    teaching: Teaching | None = None
    salvaged: str | None = None
    continual: ContinualConfig | None = None


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train to `num_steps` from the base model or from the run's last checkpoint."""
    setup_logging()
    job: WorkerJob = loop_config["job"]
    if ray.get(job.board.read.remote(), timeout=_BOARD_S).fatal:
        return  # this start is one too many
    try:
        _run(job)
    except (BudgetError, ConfigError, DivergenceError) as error:
        ray.get(job.board.stop.remote(error), timeout=_BOARD_S)
        raise


def _run(job: WorkerJob) -> None:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not job.config.resources.use_gpu:
        torch.set_num_threads(max(1, int(job.config.resources.num_cpus_per_worker)))
    transport = _build_transport(job, world_size)
    state, batches, history = _build(job, transport)
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
    unrounded = job.config.fake_quant if job.config.resources.tiers is None else None
    while state.step < job.config.num_steps:
        if unrounded is not None and state.step >= _first_rounded_step(job.config):
            state.begin_rounding(unrounded, is_rotated=job.config.fake_quant_rotate)
            unrounded = None
        indices = [index for _, index in itertools.islice(order, per_step // world_size)]
        is_saved = _is_saved_after(state.step + 1, job.config)
        chosen = (batches.read(index, buffers) for index in indices)
        record = state.run_step(chosen, flush=is_saved)
        history.append(record)
        metrics.observe(record)
        if rank == 0:
            job.board.post.remote(record, state.exchange.plan)
        if is_saved:
            if job.config.gates is not None:
                average_missed(state.model, transport, job.config.gates)
            _report(job, state, batches, history, rank, world_size)
    state.exchange.close()


def _first_rounded_step(config: TrainConfig) -> int:
    return int(config.fake_quant_start_share * config.num_steps)


def _is_saved_after(step: int, config: TrainConfig) -> bool:
    return step == config.num_steps or step % config.resources.checkpoint_every_steps == 0


def _build_transport(job: WorkerJob, world_size: int) -> Transport:
    if world_size == 1:
        return LocalTransport()
    return CollectiveTransport(timeout_s=job.config.resources.timeout_s)


def _build(job: WorkerJob, transport: Transport) -> tuple[TrainState, BatchSet, list[StepRecord]]:
    device = ray.train.torch.get_device()
    torch.manual_seed(job.seed)
    model, exchange = _build_model(job, device)
    objective = _build_objective(job, device)
    if job.continual is not None:
        start = _read(job, *job.start).local_dir
        objective = continual.hold(objective, model, job.continual, start)
    state = TrainState(
        model,
        job.config,
        exchange,
        transport,
        objective,
    )
    history: list[StepRecord] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and job.salvaged is not None:
        checkpoint = ray.train.Checkpoint.from_directory(job.salvaged)
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            history = load_checkpoint(Path(directory), state)
    return state, BatchSet(_read(job, "prepare", job.batches_run_id).local_dir), history


def _build_model(job: WorkerJob, device: torch.device) -> tuple[Decoder, Exchange]:
    config, source = job.config, _read(job, *job.start).local_dir
    tiers = config.resources.tiers
    if tiers is None:
        model = load_model(source, dtype=torch.float32).to(device)
        if job.continual is not None:
            continual.begin(model, job.continual)
        if config.freeze_decoder:
            _train_fusion_alone(model)
        if config.gates is not None:
            _train_gates_alone(model)
        elif not config.freeze_decoder and detach_gates(model):
            logger.warning("the base's gates fit the weights as they were, and are left behind")
        return model, build_exchange(config.exchange)
    tiered = load_to_train(
        source,
        tiers.directory,
        budget_bytes=tiers.budget_mib << 20,
        fake_quant=config.fake_quant,
    )
    return tiered.model, OffloadedExchange(tiered, tiers.directory)


def _train_gates_alone(model: Decoder) -> None:
    if model.config.rope.depends_on_length:
        raise ConfigError(
            f"train.gates: with rope type {model.config.rope.type!r} attention stays dense, and "
            "gates would never be used; leave train.gates out"
        )
    model.requires_grad_(False)
    attach_gates(model)
    for attention in list_attentions(model):
        assert attention.gate is not None
        attention.gate.requires_grad_(True)


def _train_fusion_alone(model: Decoder) -> None:
    if model.fusion is None:
        raise ConfigError(
            "train.freeze_decoder leaves nothing to train: the model reads text alone; set "
            "base.fusion or leave it out"
        )
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)


def _build_objective(job: WorkerJob, device: torch.device) -> Objective:
    if job.config.gates is not None:
        return GateTraining(job.config.gates, job.seed)
    if job.teaching is None:
        return CrossEntropy()
    config, logits_run_id = job.teaching.config, job.teaching.logits_run_id
    teacher = None
    if logits_run_id is None or config.on_policy is not None:
        directory = _read(job, "teacher", job.teaching.teacher_run_id).local_dir
        teacher = load_model(directory, dtype=torch.float32).to(device)
    objective: Objective
    if logits_run_id is None:
        assert teacher is not None
        objective = OnlineDistillation(config, teacher)
    else:
        store = LogitStore(_read(job, "logits", logits_run_id).local_dir)
        objective = StoredDistillation(config, store)
    if config.on_policy is None:
        return objective
    assert teacher is not None
    start = _read(job, *job.start).local_dir
    return OnPolicyDistillation(
        config.on_policy,
        objective,
        teacher,
        stop_ids=[Tokenizer(start).eos_token_id, *ModelConfig.load(start).eos_token_ids],
        num_steps=job.config.num_steps,
        seed=job.seed,
    )


def _read(job: WorkerJob, stage: str, run_id: str) -> Artifact:
    store = ArtifactStore(job.root, job.name)
    return store.require(stage, run_id, hint="it must be readable from every node", verify=False)


def _report(
    job: WorkerJob,
    state: TrainState,
    batches: BatchSet,
    history: list[StepRecord],
    rank: int,
    world_size: int,
) -> None:
    with tempfile.TemporaryDirectory(prefix="r1ray-checkpoint-") as directory:
        save_checkpoint(Path(directory), state, history, rank=rank, world_size=world_size)
        if rank == 0 and state.step == job.config.num_steps:
            _remember(job, batches, Path(directory))
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(asdict(history[-1]), checkpoint=checkpoint)


def _remember(job: WorkerJob, batches: BatchSet, directory: Path) -> None:
    """Measure what further data is not to change, on the model that the checkpoint will become."""
    if job.continual is None or job.continual.ewc is None:
        return
    device = ray.train.torch.get_device()
    start = _read(job, *job.start).local_dir
    model = load_model(directory, dtype=torch.float32).to(device)
    continual.finish(model, job.continual, load_model(start).state_dict())
    chosen = shuffled(range(len(batches)), f"fisher-{job.seed}")[: job.continual.ewc.fisher_batches]
    found = (batches.read(index).to(device) for index in chosen)
    continual.remember(model, found, start, directory, seed=job.seed)
