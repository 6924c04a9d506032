"""The `train` stage: a Ray Train run that survives failures and resumes after a kill.

1. Workers run `run_worker`; the group restarts from the last checkpoint when one of them dies.
2. Checkpoints live in the stage's own directory; a driver that was killed finds them there when
   the same run is started again (Ray Train resumes by storage path and name).
3. The last checkpoint becomes the stage's model directory, the history `history.json`.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from pyarrow.fs import FileSystem
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.config.continual import ContinualConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import BatchSet
from r1ray.errors import ArtifactError, ExchangeError, R1RayError
from r1ray.files import read_json
from r1ray.models.checkpoint import copy_tokenizer, load_model, save_model
from r1ray.models.memory import FISHER_NAME, copy_memory
from r1ray.training import continual as sequence
from r1ray.training.checkpoint import HISTORY_NAME, is_whole, load_history
from r1ray.training.gates import check_gate_lengths
from r1ray.training.memory import KEEP_FREED_MEMORY
from r1ray.training.step import StepRecord
from r1ray.training.watch import Posted, Recovery, Watch
from r1ray.training.worker import Teaching, WorkerJob, run_worker

__all__ = ["CHECKPOINTS_DIR", "train_model"]

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
_POLL_S = 0.5


@ray.remote(num_cpus=0)
class _Board:
    """What rank 0 posts about its progress, and any worker of its end; the driver reads."""

    def __init__(self) -> None:
        self._posted = Posted()

    def start(self, step: int) -> None:
        self._posted = self._posted.with_start(step)

    def post(self, record: StepRecord, plan: str | None) -> None:
        self._posted = self._posted.with_record(record, plan)

    def stop(self, error: R1RayError) -> None:
        self._posted = self._posted.with_fatal(error)

    def read(self) -> Posted:
        return self._posted


def _start_board() -> Any:
    """A board that only this process's node can take with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def train_model(
    config: TrainConfig,
    *,
    seed: int,
    store: ArtifactStore,
    start: Artifact,
    prepared: Artifact,
    teaching: Teaching | None = None,
    continual: ContinualConfig | None = None,
    run_id: str,
    out_dir: Path,
    on_step: Callable[[StepRecord], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train, then write the model directory and `history.json` into `out_dir`; returns metrics.

    Args:
        start: artifact of the model to start from.
        teaching: whom else to learn from than `prepared`'s targets.
        continual: how this data set is learned as one of a sequence.
    Raises:
        ExchangeError: more workers failed than `train.resources.max_failures` allows.
        DivergenceError: the gradients are not finite, step after step.
        BudgetError: the model does not fit, or the memory of `train.resources.tiers` is spent.
        ConfigError: gates are trained, and all sequences are too short for them.
    """
    if config.gates is not None:
        lengths = BatchSet(prepared.local_dir).summary["lengths"]
        check_gate_lengths(max(map(int, lengths), default=0))
    board = _start_board()
    checkpoints = f"{store.directory('train', run_id)}/{CHECKPOINTS_DIR}"
    name = f"{store.name}-train-{run_id}"  # what the dashboard shows
    salvaged = _salvage_checkpoint(Path(checkpoints) / name)
    job = WorkerJob(
        config=config,
        seed=seed,
        root=store.root,
        name=store.name,
        start=(start.manifest.stage, start.manifest.run_id),
        batches_run_id=prepared.manifest.run_id,
        board=board,
        teaching=teaching,
        salvaged=None if salvaged is None else str(salvaged),
        continual=continual,
    )
    trainer = _build_trainer(job, name, checkpoints, store.filesystem)
    result, recoveries = _fit(trainer, board, on_step)
    checkpoint = result.checkpoint
    if checkpoint is None and salvaged is not None:  # of the last step: there was nothing to do
        checkpoint = ray.train.Checkpoint.from_directory(salvaged)
    assert checkpoint is not None, "the last step reports a checkpoint"
    with checkpoint.as_directory() as directory:
        history = load_history(Path(directory))
        model = load_model(directory)
        if continual is not None:
            sequence.finish(model, continual, load_model(start.local_dir).state_dict())
            # A reservoir without this data would pass for one of all data; weights that mattered
            # still do.
            copy_memory(start.local_dir, out_dir, [FISHER_NAME])
            copy_memory(Path(directory), out_dir)
            copy_memory(prepared.local_dir, out_dir)
        save_model(model, out_dir)
        (out_dir / HISTORY_NAME).write_bytes((Path(directory) / HISTORY_NAME).read_bytes())
    copy_tokenizer(start.local_dir, out_dir)
    return _summarize(history) | {"recoveries": [asdict(item) for item in recoveries]}


def _build_trainer(
    job: WorkerJob, name: str, checkpoints: str, filesystem: FileSystem
) -> TorchTrainer:
    """Workers for `job`, whose checkpoints go below `checkpoints` in `filesystem`."""
    resources = job.config.resources
    keeps_memory = not resources.use_gpu and resources.tiers is None
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.num_cpus_per_worker}
            | ({"GPU": 1} if resources.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=checkpoints,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            # mypy sees the RunConfig of Ray Train's first version.
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY} if keeps_memory else {},  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(
            # What workers agree on lies on their hosts, which NCCL cannot read.
            backend="cpu:gloo,cuda:nccl" if resources.use_gpu else "gloo",
            timeout_s=int(resources.timeout_s),
        ),
    )


def _fit(
    trainer: TorchTrainer, board: Any, on_step: Callable[[StepRecord], None]
) -> tuple[ray.train.Result, list[Recovery]]:
    """`trainer.fit()` on a thread, while this one shows progress and can be interrupted.

    On the main thread `fit` would replace the handler of Ctrl-C, and not give it back.
    """
    outcome: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    watch = Watch(on_step)
    while thread.is_alive():
        thread.join(_POLL_S)
        try:
            watch.look(ray.get(board.read.remote(), timeout=10))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            continue  # progress is a convenience; training goes on without it
    with contextlib.suppress(ray.exceptions.RayError):  # the board is gone; so is what it knew
        if error := ray.get(board.read.remote(), timeout=10).fatal:
            raise error
    return _unwrap(outcome), watch.recoveries


def _unwrap(outcome: "Future[ray.train.Result]") -> ray.train.Result:
    try:
        return outcome.result()
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}).values()
        for cause in causes:
            # An ExchangeError is what the survivors of a lost worker see, not the cause.
            if isinstance(cause, R1RayError) and not isinstance(cause, ExchangeError):
                raise cause from error
        raise ExchangeError(
            f"training gave up after train.resources.max_failures restarts; the last failure: "
            f"{error}"
        ) from error


def _salvage_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in `root`, where Ray Train's index of them cannot tell.

    Ray Train rewrites that file in place. After a kill or a full disk in that moment it would
    refuse to start the run again, so the damaged file is removed.
    """
    is_indexed = False
    for index in root.glob("checkpoint_manager_snapshot*"):
        try:
            read_json(index)
            is_indexed = True
        except ArtifactError as error:
            logger.warning("%s is damaged (%s) and removed", index, error)
            index.unlink()
    if is_indexed:
        return None
    found = sorted(path for path in root.glob("checkpoint_*") if path.is_dir())
    whole = next((path for path in reversed(found) if is_whole(path)), None)
    if found and whole is None:
        logger.warning("%s holds no whole checkpoint; training starts from the beginning", root)
    return whole


def _summarize(history: list[StepRecord]) -> dict[str, Any]:
    seconds = sum(record.seconds for record in history)
    losses = [record.loss for record in history if record.loss is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": len(history),
        "first_loss": losses[0] if losses else None,
        "final_loss": sum(tail) / len(tail) if tail else None,
        "tokens": sum(record.num_tokens for record in history),
        "seconds": seconds,
        "tokens_per_s": sum(record.num_tokens for record in history) / seconds,
        "exchange_wait_share": sum(record.exchange_wait_s for record in history) / seconds,
        "sent_bytes_per_step": sum(record.sent_bytes for record in history) / len(history),
        "skipped_steps": sum(record.was_skipped for record in history),
        "longest_step_s": max(record.seconds for record in history),
        "precision": history[-1].precision,
    }
